"""Loading: from the name of a model to a decoder with its weights, and saving."""
