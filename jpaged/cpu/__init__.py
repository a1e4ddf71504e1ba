"""The "cpu" backend: kernels in C++ for CPUs, called through XLA's FFI."""
