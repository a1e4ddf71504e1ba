"""Pallas kernels, which read pages where they lie: TPUs."""
