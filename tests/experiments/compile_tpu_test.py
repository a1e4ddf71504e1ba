"""The runner `compile_tpu` without a TPU's compiler: its engine is that of an `LLM`."""

import dataclasses

import pytest

import jpaged
from experiments import compile_tpu
from jpaged.models.shapes import random_config


@pytest.mark.parametrize("is_grouped", [True, False])
def test_layers_with_a_window_have_tables_of_their_own(is_grouped, monkeypatch):
    mesh = jpaged.make_mesh()
    monkeypatch.setattr(compile_tpu, "tpu_mesh", lambda *_: mesh)
    # 13 of 26 layers have a window; the smallest pool of 64 blocks of all layers.
    shape = dataclasses.replace(
        random_config("gemma-3-1b"), full_layers=tuple(range(0, 26, 2)), num_layers=26
    )
    monkeypatch.setattr(compile_tpu, "random_config", lambda _: shape)
    options = dict(
        topology="v5e:2x2",
        model="gemma-3-1b",
        tensor_parallel=1,
        num_layers=None,
        num_blocks=64,
        block_size=16,
        max_num_seqs=2,
        max_model_len=1024,
        max_num_batched_tokens=32,
        cache_groups=is_grouped,
    )
    model, config, _ = compile_tpu._configs(options)
    _, state = compile_tpu.abstract_engine(model, config, mesh)
    assert state.cache is not None
    number = 2 if is_grouped else 1
    assert config.group_windows == ((None, 512) if is_grouped else (None,))
    assert state.blocks.block_tables.shape == (2, number * 1024 // 16)
    assert state.cache.k_pages.shape[:2] == (26 // number, 64 * number)
