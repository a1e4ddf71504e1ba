"""KV bookkeeping: which block stores which tokens. Tables only, no keys or values."""
