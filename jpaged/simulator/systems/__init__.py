"""Serving systems on the virtual clock: the engine and the paper's baselines."""
