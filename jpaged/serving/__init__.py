"""The host side of serving: requests of all callers, batching, clock, statistics."""
