"""Huge pages: large arrays are moved, and nothing else happens to them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.cpu import huge_pages
from jpaged.llm import LLM
from jpaged.serving import runner
from tests.support.tiny_llm import SIZES

MIB = 2**20

needs_huge_pages = pytest.mark.skipif(
    not huge_pages.is_possible(), reason="the system has no transparent huge pages"
)


def huge_bytes() -> int:
    """Bytes of this process in huge pages, as the system counts them."""
    rollup = pathlib.Path("/proc/self/smaps_rollup").read_text("utf-8")
    (line,) = (one for one in rollup.splitlines() if one.startswith("AnonHugePages"))
    return int(line.split()[1]) * 1024


@needs_huge_pages
def test_a_large_array_is_moved_and_keeps_its_values():
    array = jnp.arange(16 * MIB, dtype=jnp.float32)  # 64 MiB
    before, address = huge_bytes(), array.unsafe_buffer_pointer()
    moved = huge_pages.move({"weights": array})
    # The system may lack free huge pages; what it says it moved, it has moved.
    assert moved <= array.nbytes
    assert huge_bytes() - before <= array.nbytes + 4 * MIB
    assert huge_bytes() - before >= min(moved, 2 * MIB)
    assert array.unsafe_buffer_pointer() == address
    np.testing.assert_array_equal(array, np.arange(16 * MIB, dtype=np.float32))


def test_only_whole_huge_pages_of_large_live_arrays_are_named():
    large, small = jnp.zeros((8 * MIB,), jnp.int8), jnp.zeros((MIB,), jnp.int8)
    deleted = jnp.zeros((8 * MIB,), jnp.int8)
    deleted.delete()
    tree = (large, small, deleted, np.zeros((8 * MIB,), np.int8), None, 3)
    ((start, stop),) = huge_pages._regions(tree)
    address = large.unsafe_buffer_pointer()
    assert start % (2 * MIB) == stop % (2 * MIB) == 0
    assert address <= start < address + 2 * MIB
    assert address + 6 * MIB < stop <= address + 8 * MIB
    assert jax.jit(lambda x: x + len(huge_pages._regions(x)))(large)[0] == 0


def test_the_user_can_turn_them_off(monkeypatch):
    monkeypatch.setenv("JPAGED_HUGE_PAGES", "off")
    huge_pages.is_possible.cache_clear()
    try:
        assert huge_pages.move(jnp.zeros((8 * MIB,), jnp.int8)) == 0
        assert huge_pages.move_in_background(jnp.zeros((8 * MIB,), jnp.int8)) is None
    finally:
        huge_pages.is_possible.cache_clear()


@pytest.mark.long
def test_an_llm_moves_its_weights_and_pages(monkeypatch):
    trees = []
    monkeypatch.setattr(runner.huge_pages, "move_in_background", trees.append)
    with LLM("tiny-python", **SIZES) as llm:
        host = llm._open_host()
        addresses = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(trees[0])}
        cache = jax.tree.leaves(host.runner.state.cache)
        leaves = [*jax.tree.leaves(llm.model), *cache]
        assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == addresses
        llm.generate([[1, 2, 3]], progress=False)
        # The engine updates its pages in place, so they stay where they were moved.
        later = jax.tree.leaves(host.runner.state.cache)
        assert {leaf.unsafe_buffer_pointer() for leaf in later} <= addresses
