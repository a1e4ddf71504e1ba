"""Pallas kernels for TPUs and Hopper GPUs; they read pages in place."""
