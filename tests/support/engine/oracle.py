"""The reference for the engine: a plain loop in which each token recomputes everything.

It has no cache, no blocks and no schedule, and batches only to keep shapes equal. It
shares with the engine the model and, for requests that sample, the sampler.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import engine
from jpaged.config import EngineConfig
from jpaged.decoding.sample import SamplingRows, sample
from jpaged.engine import EngineState, Result
from jpaged.kv import block_manager
from jpaged.models import Decoder
from jpaged.params import SamplingParams

FOREVER = 100_000


@dataclasses.dataclass(frozen=True)
class Generated:
    """The expected output of one sample of a request."""

    tokens: list[int]
    reason: str


@jax.jit
def _last_logits(model: Decoder, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return model(tokens)[jnp.arange(len(tokens)), lengths - 1]


@jax.jit
def all_logprobs(model: Decoder, tokens: jax.Array) -> jax.Array:
    """Log-softmax f32[B, T, V] of the plain forward."""
    return jax.nn.log_softmax(model(tokens), axis=-1)


def naive(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    max_model_len: int,
    eos_token_ids: Sequence[int] = (),
) -> list[list[Generated]]:
    """Tokens and reason of each request's samples; requests that sample need `seed`."""
    rows = [
        (list(prompt), param, number)
        for prompt, param in zip(prompts, params, strict=True)
        for number in range(param.n)
    ]
    width = 1 << (len(rows) - 1).bit_length()
    tokens = np.zeros((width, max_model_len), np.int32)
    lengths = np.ones(width, np.int32)
    for row, (prompt, _, _) in enumerate(rows):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    reasons: list[str | None] = [None] * len(rows)
    sampling = _sampling(rows, width)
    is_any_sampled = any(param.temperature > 0 for _, param, _ in rows)
    while None in reasons:
        logits = _last_logits(model, jnp.asarray(tokens), jnp.asarray(lengths))
        chosen = np.asarray(logits).argmax(axis=-1)
        if is_any_sampled:
            sampled, _ = _sample(logits, sampling, jnp.asarray(lengths))
            chosen = np.where(sampling.temperature > 0, sampled, chosen)
        for row, (prompt, param, _) in enumerate(rows):
            if reasons[row] is not None:
                continue
            token = int(chosen[row])
            tokens[row, lengths[row]] = token
            lengths[row] += 1
            stops = set(param.stop_token_ids)
            stops |= set() if param.ignore_eos else set(eos_token_ids)
            num_generated = lengths[row] - len(prompt)
            if token in stops:
                reasons[row] = "stop"
            elif num_generated == param.max_tokens or lengths[row] == max_model_len:
                reasons[row] = "length"
    found = [
        Generated(tokens[row, len(prompt) : lengths[row]].tolist(), reasons[row])
        for row, (prompt, _, _) in enumerate(rows)
    ]
    ends = np.cumsum([param.n for param in params])
    return [found[end - p.n : end] for end, p in zip(ends, params, strict=True)]


_sample = jax.jit(sample)


def _sampling(rows: list, width: int) -> SamplingRows:
    def column(values: list, kind: type, fill: float) -> np.ndarray:
        return np.array(values + [fill] * (width - len(values)), kind)

    params = [param for _, param, _ in rows]
    return SamplingRows(
        temperature=column([p.temperature for p in params], np.float32, 0.0),
        top_k=column([max(p.top_k, 0) for p in params], np.int32, 0),
        top_p=column([p.top_p for p in params], np.float32, 1.0),
        min_p=column([p.min_p for p in params], np.float32, 0.0),
        seed=column([p.seed or 0 for p in params], np.uint32, 0),
        sample=column([number for _, _, number in rows], np.int32, 0),
    )


def generate(
    model: Decoder,
    config: EngineConfig,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    order: Sequence[int] | None = None,
    run: Callable[..., EngineState] = engine.run,
    **options,
) -> tuple[EngineState, list[list[Result]]]:
    """Run the engine on all requests.

    Returns the idle engine, and the results of each request's samples.
    """
    order = list(range(len(prompts))) if order is None else list(order)
    state = engine.init(model, config)
    state, _ = engine.submit(
        state, [prompts[i] for i in order], [params[i] for i in order], **options
    )
    state = run(model, state, jnp.int32(FOREVER))
    results: list[list[Result]] = [[] for _ in prompts]
    for result in engine.collect(state):
        results[order[result.arrival]].append(result)
    return state, results


def differences(
    state: EngineState,
    results: Sequence[Sequence[Result]],
    expected: Sequence[Sequence[Generated]],
) -> list[str]:
    """One sentence for each fault of a finished run; empty if there is none."""
    found = block_manager.violations(state.blocks)
    if int(block_manager.num_free_blocks(state.blocks)) != state.config.num_blocks:
        found.append("not all blocks are free at the end")
    if bool(state.counters.is_stalled):
        found.append("the engine stalled")
    if bool(engine.has_work(state)):
        found.append("not all requests have finished")
    for request, (got, want) in enumerate(zip(results, expected, strict=True)):
        pairs = [(result.token_ids, result.finish_reason) for result in got]
        tokens_and_reasons = [(one.tokens, one.reason) for one in want]
        if pairs != tokens_and_reasons:
            found.append(
                f"request {request}: expected {tokens_and_reasons}, got {pairs}"
            )
    return found
