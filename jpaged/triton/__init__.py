"""Triton kernels, which read pages where they lie: NVIDIA GPUs from Ampere on."""
