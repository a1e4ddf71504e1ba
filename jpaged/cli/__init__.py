"""The command line `python -m jpaged`: generate from prompts, and chat."""
