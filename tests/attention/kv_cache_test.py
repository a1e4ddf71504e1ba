"""The KV cache of all layers: its sizes, and block copies in every layer at once."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jpaged.attention import backends, kv_cache

SIZES = dict(num_layers=3, num_kv_heads=2, block_size=4, head_dim=8)


# On a CPU, bfloat16 is stored as its bits, which kernels of other devices do not read.
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("float32", "float32"), ("float16", "float16"), ("bfloat16", "uint16")],
)
def test_a_block_has_as_many_bytes_as_bytes_per_block_says(dtype, stored):
    cache = kv_cache.init_kv_cache(num_blocks=5, dtype=dtype, **SIZES)
    for pages in (cache.k_pages, cache.v_pages):
        assert pages.shape == (3, 5, 2, 4, 8)
        assert pages.dtype == jnp.dtype(stored)
        assert not np.asarray(pages).any()
    total = sum(pages.nbytes for pages in jax.tree.leaves(cache))
    assert total == 5 * kv_cache.bytes_per_block(dtype=dtype, **SIZES)
    assert backends.layout("triton").stored_dtype(dtype) == dtype


def test_a_token_of_opt_13b_takes_800_kilobytes_as_in_the_paper():
    # Section 3: 2 (key and value) * 5120 (hidden) * 40 (layers) * 2 (bytes) per token.
    token = kv_cache.bytes_per_block(
        num_layers=40, num_kv_heads=40, block_size=1, head_dim=128, dtype="float16"
    )
    assert token == 800 * 1024


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_copies_move_whole_blocks_in_every_layer_and_nothing_else(dtype):
    rng = np.random.default_rng(0)
    arrays = rng.standard_normal((2, 3, 7, 2, 4, 8)).astype(dtype)
    cache = kv_cache.KVCache(*map(jnp.asarray, arrays))
    src, dst = (jnp.array(x, jnp.int32) for x in ([2, -1, 2, 0], [5, 1, 6, -1]))
    copied = jax.jit(kv_cache.copy_blocks)(cache, src, dst)
    arrays[:, :, 5] = arrays[:, :, 6] = arrays[:, :, 2]
    assert np.asarray(copied.k_pages).tobytes() == arrays[0].tobytes()
    assert np.asarray(copied.v_pages).tobytes() == arrays[1].tobytes()
