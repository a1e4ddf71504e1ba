"""Cost models: how long a step takes on a chip."""
