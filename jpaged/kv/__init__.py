"""KV bookkeeping: which block stores which tokens. Tables only, no keys or values.

`block_state` has the block tables, and `block_manager` their operations. `prefix_cache`
reuses the blocks of equal prefixes, `shared_prefix` finds the rows that share blocks,
and `swap` moves rows between the device's pool and the host's.
"""
