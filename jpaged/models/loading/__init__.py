"""Checkpoints: from a model's name to a decoder with its weights, and back."""
