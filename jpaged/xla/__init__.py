"""The "xla" backend: paged attention and page updates in plain XLA."""
