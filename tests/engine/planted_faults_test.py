"""The check of the engine's tests finds each fault that is planted into the product.

The check is `oracle.differences`, on one small workload with samples that share blocks
and requests that wait. The expected tokens are computed before a fault is planted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.attention import api as attention
from jpaged.kv import block_manager
from jpaged.models import rotary
from jpaged.params import SamplingParams
from tests.support.engine.configs import QUICKLY, OneSizeConfig
from tests.support.engine.oracle import differences, generate, naive
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

CONFIG = OneSizeConfig(
    num_blocks=12,
    block_size=4,
    max_num_seqs=3,
    max_model_len=32,
    max_num_batched_tokens=8,
    max_num_requests=8,
)
PROMPTS = [np.arange(n).tolist() for n in (9, 14, 3)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=8),
    SamplingParams(n=3, seed=1, max_tokens=8),
    SamplingParams(temperature=0.0, max_tokens=8),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=1))


@pytest.fixture(scope="module")
def expected(model):
    return naive(model, PROMPTS, PARAMS, max_model_len=CONFIG.max_model_len)


def found(model, expected) -> list[str]:
    """Result of the check for a run that is compiled with the fault."""

    # A new function each time, because jax caches the program without the fault. With a
    # fault, requests may not end: 200 steps are several times what they need.
    @functools.partial(jax.jit, donate_argnames="state", compiler_options=QUICKLY)
    def run(model, state, max_steps):
        return engine.run.__wrapped__(model, state, jnp.minimum(max_steps, 200))

    state, results = generate(model, CONFIG, PROMPTS, PARAMS, run=run)
    return differences(state, results, expected)


def patched(monkeypatch, module, name, change) -> None:
    monkeypatch.setattr(module, name, functools.partial(change, getattr(module, name)))


def values_for_keys(write, k_pages, v_pages, k, v, slots, **options):
    return write(k_pages, v_pages, v, v, slots, **options)


def one_key_less(attend, q, k_pages, v_pages, tables, context_lens, **options):
    return attend(
        q, k_pages, v_pages, tables, jnp.maximum(context_lens - 1, 0), **options
    )


def one_key_more(attend, q, k_pages, v_pages, tables, context_lens, **options):
    longer = jnp.where(context_lens > 0, context_lens + 1, 0)
    return attend(q, k_pages, v_pages, tables, longer, **options)


def lost_reference(fork, state, parents):
    """Forked rows are not counted: their blocks appear to have one owner."""
    forked = fork(state, parents)
    return dataclasses.replace(forked, ref_counts=jnp.minimum(forked.ref_counts, 1))


def kept_reference(free, state, rows):
    """The first block of a row that ends keeps its count and is never freed."""
    freed = free(state, rows)
    kept = jnp.where(rows, state.block_tables[:, 0], -1)
    kept = jnp.where(kept < 0, state.ref_counts.shape[0], kept)
    counts = freed.ref_counts.at[kept].add(1, mode="drop")
    return dataclasses.replace(freed, ref_counts=counts)


def shifted_slots(slots, state, rows, positions):
    found = slots(state, rows, positions)
    return jnp.where(found < 0, found, found + 1)


def late_positions(tables, positions, config, **options):
    return tables(jnp.maximum(positions - 1, 0), config, **options)


def no_copies(copy, k_pages, v_pages, src, dst, **options):
    return copy(k_pages, v_pages, jnp.full_like(src, -1), dst, **options)


FAULTS = {
    "V written for K": (attention, "write_kv", values_for_keys),
    "context_lens one too small": (attention, "paged_attention", one_key_less),
    "context_lens one too large": (attention, "paged_attention", one_key_more),
    "a lost reference count": (block_manager, "fork", lost_reference),
    "a reference count that is never decremented": (
        block_manager,
        "free",
        kept_reference,
    ),
    "slot_mapping shifted by one": (block_manager, "slots", shifted_slots),
    "rotary positions one too small": (rotary, "tables", late_positions),
    "copy-on-write without the copy": (attention, "copy_blocks", no_copies),
}


def test_the_check_finds_nothing_without_a_fault(model, expected):
    assert found(model, expected) == []


@pytest.mark.parametrize("name", FAULTS)
def test_the_check_finds(name, model, expected, monkeypatch):
    patched(monkeypatch, *FAULTS[name])
    assert found(model, expected) != []
