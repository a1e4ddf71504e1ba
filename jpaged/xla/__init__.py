"""Paged attention and page updates in plain XLA: every backend, and the CPU's path."""
