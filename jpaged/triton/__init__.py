"""Triton kernels for NVIDIA GPUs from Ampere on; they read pages in place."""
