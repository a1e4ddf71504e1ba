"""KV bookkeeping: which block holds which tokens. Tables only, no keys or values."""
