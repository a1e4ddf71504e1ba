"""The cost model of padded sizes matches a staircase in plain Python."""

import bisect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.config import EngineConfig
from jpaged.simulator.costs.buckets import Bucketed, fit_buckets
from jpaged.simulator.costs.load import StepLoad

CONFIG = EngineConfig(num_blocks=64, max_num_seqs=16, max_num_batched_tokens=64)
ROWS, TOKENS = [1, 4, 8, 16], [32, 64]
ROW_S, TOKEN_S, CONTEXT_S = [1.0, 2.5, 3.0, 7.0], [10.0, 16.0], 1e-3


def staircase(chunks: list[int], contexts: list[int]) -> float:
    busy = [(n, c) for n, c in zip(chunks, contexts, strict=True) if n]
    if not busy:
        return 0.0
    seconds = CONTEXT_S * sum(c for _, c in busy)
    if max(n for n, _ in busy) > 1:
        total = sum(n for n, _ in busy)
        return seconds + TOKEN_S[bisect.bisect_left(TOKENS, total)]
    return seconds + ROW_S[bisect.bisect_left(ROWS, len(busy))]


def load(chunks, contexts) -> StepLoad:
    zero = jnp.zeros(np.shape(chunks)[:-1], jnp.int32)
    chunks, contexts = (jnp.asarray(x, jnp.int32) for x in (chunks, contexts))
    return StepLoad(chunks, contexts, zero, zero, zero, zero)


def random_steps(count: int, seed: int, most_rows: int = 16):
    """Return chunks and contexts of 16 rows for steps, half of which only decode."""
    rng = np.random.default_rng(seed)
    chunks = np.zeros((count, 16), np.int32)
    for step, row in enumerate(chunks):
        row[: rng.integers(1, most_rows + 1)] = 1
        rng.shuffle(row)
        if step % 2:
            row[rng.integers(16)] = rng.integers(2, 48)
    contexts = np.where(chunks > 0, chunks + rng.integers(0, 500, chunks.shape), 77)
    return chunks, contexts.astype(np.int32)


def test_the_fit_recovers_a_staircase_from_its_times():
    chunks, contexts = random_steps(200, seed=0)
    seconds = [staircase(*map(list, one)) for one in zip(chunks, contexts, strict=True)]
    model, report = fit_buckets(CONFIG, load(chunks, contexts), np.array(seconds))
    np.testing.assert_allclose(model.row_seconds, ROW_S, rtol=1e-4)
    np.testing.assert_allclose(model.token_seconds, TOKEN_S, rtol=1e-4)
    np.testing.assert_allclose(model.context_seconds, CONTEXT_S, rtol=1e-3)
    assert report.max_error < 1e-6
    assert report.coefficients["8 rows"] == pytest.approx(3.0)
    # It predicts other steps too, up to float32 sums.
    chunks, contexts = random_steps(50, seed=1)
    found = jax.vmap(model)(load(chunks, contexts))
    expected = [
        staircase(*map(list, one)) for one in zip(chunks, contexts, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_step_without_tokens_takes_no_time():
    model = Bucketed(*map(jnp.array, (ROWS, TOKENS, ROW_S, TOKEN_S, CONTEXT_S)))
    assert model(load([0] * 16, [5] * 16)) == 0


def test_sizes_without_measurements_are_interpolated():
    chunks, contexts = random_steps(200, seed=0)
    is_kept = [
        max(c) > 1 or not 4 < sum(c) <= 8 for c in chunks.tolist()
    ]  # no step of 8 rows
    chunks, contexts = chunks[is_kept], contexts[is_kept]
    seconds = [staircase(*map(list, one)) for one in zip(chunks, contexts, strict=True)]
    model, _ = fit_buckets(CONFIG, load(chunks, contexts), np.array(seconds))
    # 8 rows are a third of the way from 4 to 16.
    assert math.isclose(model.row_seconds[2], 2.5 + (7.0 - 2.5) / 3, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("choose", "count", "message"),
    [
        (lambda chunks: chunks.max(axis=1) > 1, None, "only decode, got none"),
        (lambda chunks: chunks.max(axis=1) == 1, None, "have prompts, got none"),
        (lambda chunks: chunks.max(axis=1) > 0, 3, "expected 20 numbers"),
    ],
)
def test_insufficient_measurements_raise(choose, count, message):
    chunks, contexts = random_steps(20, seed=0)
    chunks, contexts = chunks[choose(chunks)], contexts[choose(chunks)]
    seconds = np.ones(count or len(chunks))
    with pytest.raises(ValueError, match=message):
        fit_buckets(CONFIG, load(chunks, contexts), seconds)
