"""Simulator: the engine's own step on a virtual clock."""
