"""Workloads: arrivals, lengths and traces."""
