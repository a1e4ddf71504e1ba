"""Simulated serving systems: the engine and the baselines of the paper."""
