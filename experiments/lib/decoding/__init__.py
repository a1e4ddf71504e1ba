"""Loads, baseline and cost breakdown of the benchmark of decoding methods."""
