"""Text: tokenizers, streaming detokenisation and chat templates."""
