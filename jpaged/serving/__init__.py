"""The host side of serving: requests of all callers, batching and statistics."""
