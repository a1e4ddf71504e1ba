"""Runners, one per figure or benchmark: `python -m experiments.NAME --help`."""
