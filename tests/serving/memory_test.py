"""Default sizes of the pool and the request table; the cache of compiled programs."""

import dataclasses
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from jpaged import compilation_cache, retention
from jpaged.models.config import ModelConfig
from jpaged.models.decoder import init_model
from jpaged.serving import memory

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=16,
    hidden_size=8,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    max_position_embeddings=100,
)
# Keys and values, 3 layers, 2 heads of 4 float32 numbers, 10 tokens.
BLOCK_BYTES = 2 * 3 * 2 * 4 * 4 * 10


@pytest.fixture(scope="module")
def model():
    return init_model(CONFIG)


def sizes(model, **changes):
    arguments = dict(
        block_size=10,
        kv_dtype="float32",
        num_blocks=None,
        memory_fraction=0.5,
        max_num_seqs=4,
        max_model_len=None,
    )
    return memory.choose_sizes(model, **(arguments | changes))


def test_the_pool_has_space_for_all_rows_at_full_length_if_memory_suffices(model):
    assert sizes(model) == (4 * 10, 100)
    assert sizes(model, max_model_len=21) == (4 * 3, 21)
    assert sizes(model, num_blocks=7) == (7, 70)
    assert sizes(model, num_blocks=7, max_model_len=100) == (7, 100)


def test_the_pool_uses_at_most_its_fraction_of_free_memory(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 5 * BLOCK_BYTES + 1)
    assert sizes(model) == (5, 50)
    assert sizes(model, kv_dtype="bfloat16") == (10, 100)
    with pytest.raises(ValueError, match="memory for at least one block of 1920 bytes"):
        sizes(model, memory_fraction=0.01)


def test_extremes_of_keys_use_memory_of_the_pool(model, monkeypatch):
    # Beside keys and values, the least and the greatest of 3 layers, 2 heads of 4.
    extremes = 2 * 3 * 2 * 4 * 4
    budget = 2 * 5 * (BLOCK_BYTES + extremes)
    monkeypatch.setattr(memory, "available_bytes", lambda: budget)
    assert sizes(model, retention=retention.quest()) == (5, 50)
    monkeypatch.setattr(memory, "available_bytes", lambda: budget - 1)
    assert sizes(model, retention=retention.quest()) == (4, 40)
    assert sizes(model, retention=retention.tova()) == (5, 50)


def test_on_a_cpu_the_pool_has_a_limit_of_its_own(model, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**40)
    assert memory.pool_budget(model, 0.9) == memory.CPU_POOL_BYTES
    monkeypatch.setattr(memory, "CPU_POOL_BYTES", 0)
    assert memory.pool_budget(model, 0.9) == sum(
        x.nbytes for x in jax.tree.leaves(model)
    )


def test_free_memory_is_read_from_the_machine():
    assert 2**20 < memory.available_bytes() < 2**50


def test_the_request_table_has_a_limit_in_bytes():
    assert memory.max_table_size(64, 2048, 0) == 256
    assert 64 <= memory.max_table_size(64, 131072, 20) < 256
    assert memory.max_table_size(64, 10**8, 20) == 64


@pytest.fixture
def no_cache():
    """Resets the configuration of jax's compilation cache to its defaults."""
    names = ["jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    jax.config.update(names[1], 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.mark.usefixtures("no_cache")
def test_compiled_programs_are_stored_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JPAGED_COMPILATION_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1))  # before the cache is enabled
    folder = compilation_cache.turn_on()
    assert folder.parent == tmp_path / "jpaged" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.block_until_ready(jax.jit(lambda x: x + 2)(1))
    assert os.listdir(folder)
    # A configured folder is not replaced.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert compilation_cache.turn_on() is None
    assert jax.config.jax_compilation_cache_dir == str(folder)


@pytest.mark.usefixtures("no_cache")
def test_the_cache_can_be_disabled_and_is_skipped_without_a_writable_home(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("JPAGED_COMPILATION_CACHE", "off")
    assert compilation_cache.turn_on() is None
    monkeypatch.delenv("JPAGED_COMPILATION_CACHE")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation_cache.turn_on() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_the_cache_folder_follows_the_conventions_of_the_platform(
    monkeypatch, tmp_path
):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert compilation_cache.user_folder() == tmp_path / ".cache" / "jpaged" / "xla"
    monkeypatch.setattr("sys.platform", "darwin")
    expected = tmp_path / "Library" / "Caches" / "jpaged" / "xla"
    assert compilation_cache.user_folder() == expected


def test_block_bytes_match_the_paper():
    # OPT-13B in float16: 800 KB per token (paper section 3).
    opt = dataclasses.replace(
        CONFIG, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128
    )
    assert memory.block_bytes(opt, 1, "float16") == 800 * 1024
