"""Tree searches of an LLM: checks, free blocks, texts.

Pipeline: user -> [tree_searching] -> search -> [tree_searching] -> user. Host only.

A search runs between two slices of the engine, in blocks of its pool that no sequence
uses. A prompt maps its blocks in the prefix cache. When a search ends, its blocks are
free again, and the state of open requests is unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.arithmetic import cdiv
from jpaged.config import EngineConfig
from jpaged.decoding.values import check_value
from jpaged.engine import EngineState
from jpaged.kv import prefix_cache
from jpaged.names import rechecked
from jpaged.outputs import CompletionOutput, SearchStep, TreeSearchOutput
from jpaged.search import SearchRequests, SearchSizes, TreeSearchParams, search
from jpaged.search.texts import Texts
from jpaged.search.tree import Exploration
from jpaged.serving.engine_host import EngineHost
from jpaged.text import prompts as text_prompts
from jpaged.text.output_text import OutputText
from jpaged.text.tokenizer import Tokenizer
from jpaged.validation import LARGEST_INT32, error

_SHORT_PROMPT = 1024  # shorter prompts are padded to it


class _Job(NamedTuple):
    """The searches of a call."""

    host: EngineHost
    tokenizer: Tokenizer | None
    params: TreeSearchParams
    config: EngineConfig  # the engine's, without the features of requests
    stop_ids: tuple[int, ...]
    seed: int


def run_searches(
    host: EngineHost,
    tokenizer: Tokenizer | None,
    prompts: Any,
    params: TreeSearchParams | None,
    seed: int,
) -> list[TreeSearchOutput]:
    """Search for a text after each prompt; see `LLM.tree_search`.

    Args:
      host: the engine; the caller holds its lock.
      tokenizer: the model's tokenizer, or None.
      prompts: one prompt or several.
      params: parameters of all searches; None: the defaults.
      seed: for parameters without one.

    Returns:
      One output per prompt, in order.

    Raises:
      ValueError: an argument is invalid, or the engine cannot run searches.
    """
    params = TreeSearchParams() if params is None else rechecked(params)
    if not isinstance(params, TreeSearchParams):
        raise error("params", "TreeSearchParams or None", params)
    prompts = text_prompts.prompt_list("prompts", prompts)
    tokens = [
        text_prompts.token_ids(tokenizer, f"prompts[{i}]", prompt)
        for i, prompt in enumerate(prompts)
    ]
    job = _job(host, tokenizer, params, seed)
    for i, one in enumerate(tokens):
        _check_prompt(f"prompts[{i}]", one, job)
    sizes = _sizes(job, tokens)
    length = _padded_prompt(tokens, job.config) + sizes.max_tokens
    model = host.model.config
    check_value(
        cast(Any, params.value),
        dict(params.parameters or {}),
        (length, model.vocab_size, model.hidden_size),
        model.dtype,
    )
    most = _check_blocks(job, tokens, sizes)
    found: list[TreeSearchOutput] = []
    for first in range(0, len(tokens), most):
        group = slice(first, first + most)
        found += _run_group(job, prompts[group], tokens[group], first, sizes)
    return found


def _job(
    host: EngineHost,
    tokenizer: Tokenizer | None,
    params: TreeSearchParams,
    seed: int,
) -> _Job:
    """Return the searches of a call; check what does not depend on the prompts."""
    config, model = host.config, host.model.config
    if host.runner.mesh is not None:
        raise ValueError(
            "tree_search: expected an LLM on one device, got one on a mesh; create it "
            "without mesh and tensor_parallel_size"
        )
    if config.retention is not None:
        raise ValueError(
            "tree_search: expected an LLM that keeps all blocks, because nodes share "
            "them, got one with a retention method; create it with retention=None"
        )
    if params.num_actions > model.vocab_size:
        raise error(
            "num_actions", f"at most {model.vocab_size} tokens", params.num_actions
        )
    for token in params.stop_token_ids:
        if token >= model.vocab_size:
            raise error(
                "stop_token_ids",
                f"ids from 0 to {model.vocab_size - 1} (the model's vocabulary)",
                token,
            )
    eos = () if params.ignore_eos else tuple(model.eos_token_ids)
    # Without features of requests, so that these do not compile another search.
    own = EngineConfig(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_prompt_chunk=config.max_prompt_chunk,
        attention=config.attention,
        cascade=config.cascade,
        batch_invariant=config.batch_invariant,
        group_windows=config.group_windows,
    )
    stop_ids = tuple(sorted({*eos, *params.stop_token_ids}))
    return _Job(host, tokenizer, params, own, stop_ids, seed)


def _check_prompt(name: str, tokens: Sequence[int], job: _Job) -> None:
    most, vocab_size = job.config.max_model_len, job.host.model.config.vocab_size
    if not 0 < len(tokens) < most:
        raise ValueError(
            f"{name}: expected at least one token and fewer than max_model_len "
            f"({most}), got {len(tokens)}"
        )
    wrong = [token for token in tokens if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(
            f"{name}: expected token ids from 0 to {vocab_size - 1} (the model's "
            f"vocabulary), got {wrong[0]}"
        )


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _padded_prompt(tokens: Sequence[Sequence[int]], config: EngineConfig) -> int:
    """The compiled length of prompts, rounded up so that few programs are needed."""
    longest = max(map(len, tokens))
    return max(_power_of_two(longest), min(config.max_model_len, _SHORT_PROMPT))


def _sizes(job: _Job, tokens: Sequence[Sequence[int]]) -> SearchSizes:
    """The compiled sizes, rounded up so that few programs are needed."""
    params, shortest = job.params, min(map(len, tokens))
    max_tokens = min(params.max_tokens, job.config.max_model_len - shortest)
    return SearchSizes(
        num_nodes=8 * cdiv(params.num_simulations + 1, 8),
        num_actions=params.num_actions,
        max_tokens=_power_of_two(max_tokens),
    )


def _blocks_needed(job: _Job, prompt_len: int) -> int:
    """The most blocks that a search needs at a time, in all cache groups."""
    longest = min(prompt_len + job.params.max_tokens, job.config.max_model_len)
    text = cdiv(longest, job.config.block_size)
    return (text + job.params.num_simulations) * len(job.config.group_windows)


def _check_blocks(
    job: _Job, tokens: Sequence[Sequence[int]], sizes: SearchSizes
) -> int:
    """Return how many searches run at a time; raise ValueError if not even one can."""
    free = int(np.sum(np.asarray(job.host.runner.state.blocks.ref_counts) == 0))
    needed = max(_blocks_needed(job, len(one)) for one in tokens)
    if needed > free:
        raise ValueError(
            f"num_simulations: expected so few that a search fits into the free blocks "
            f"of the pool, got {job.params.num_simulations}, which with a prompt of "
            f"{max(map(len, tokens))} and {job.params.max_tokens} generated tokens "
            f"need up to {needed} blocks of {job.config.block_size}; {free} of "
            f"{job.config.num_blocks} are free; lower num_simulations or max_tokens, "
            "or raise num_blocks"
        )
    return min(free // needed, job.config.max_num_seqs, len(tokens))


def _run_group(
    job: _Job,
    prompts: Sequence[Any],
    tokens: Sequence[Sequence[int]],
    first: int,
    sizes: SearchSizes,
) -> list[TreeSearchOutput]:
    """Run some searches at the same time; `first` is the index of the first prompt."""
    host, count = job.host, _power_of_two(len(tokens))
    needed = sum(_blocks_needed(job, len(one)) for one in tokens)
    padded = np.zeros((count, _padded_prompt(tokens, job.config)), np.int32)
    lens = np.zeros((count,), np.int32)
    for row, one in enumerate(tokens):
        padded[row, : len(one)], lens[row] = one, len(one)
    width = cdiv(padded.shape[1] + sizes.max_tokens, job.config.block_size)
    state, paths, path_lens, kept = _prepare(
        host.runner.state,
        jnp.asarray(padded),
        jnp.asarray(lens),
        jnp.int32(needed),
        width,
    )
    columns = dict(
        tokens=padded, prompt_lens=lens, paths=paths, path_lens=path_lens, kept=kept
    )
    assert state.cache is not None
    cache, found = search(
        host.model,
        state.cache,
        _requests(job, first, columns),
        value=cast(Any, job.params.value),
        sizes=sizes,
        config=job.config,
    )
    host.runner.state = dataclasses.replace(state, cache=cache)
    found = jax.device_get(found)
    if bool(found.is_full):
        raise RuntimeError("tree_search: the pool was too small, which is a bug")
    cached = np.asarray(path_lens)
    return [
        _output(job, prompt, one, found, row, int(cached[row]))
        for row, (prompt, one) in enumerate(zip(prompts, tokens, strict=True))
    ]


def _requests(job: _Job, first: int, columns: dict[str, Any]) -> SearchRequests:
    """Return the searches as arrays.

    Args:
      job: the searches of the call.
      first: index of the first prompt among those of the call.
      columns: the fields that depend on the prompts.
    """
    params = job.params
    stop_ids = np.full((_power_of_two(max(len(job.stop_ids), 4)),), -1, np.int32)
    stop_ids[: len(job.stop_ids)] = job.stop_ids
    # A given seed is the seed of each search: its text depends on no other prompt.
    seeds = [
        np.random.SeedSequence(
            (job.seed, first + i) if params.seed is None else params.seed
        ).generate_state(1)[0]
        for i in range(len(columns["prompt_lens"]))
    ]
    values: dict[str, Any] = dict(
        stop_ids=stop_ids,
        seeds=np.asarray(seeds, np.uint32),
        num_simulations=np.int32(params.num_simulations),
        max_tokens=np.int32(min(params.max_tokens, LARGEST_INT32)),
        max_len=np.int32(job.config.max_model_len),
        exploration=Exploration(
            jnp.float32(params.exploration), jnp.float32(params.exploration_base)
        ),
        temperature=np.float32(params.temperature),
        reuses_tree=np.bool_(params.reuse_tree),
        parameters=dict(params.parameters or {}),
    )
    return SearchRequests(**columns, **values)


@functools.partial(jax.jit, static_argnames="width", donate_argnums=0)
def _prepare(
    state: EngineState,
    tokens: jax.Array,
    lens: jax.Array,
    needed: jax.Array,
    width: int,
) -> tuple[EngineState, jax.Array, jax.Array, jax.Array]:
    """Evict blocks of the prefix cache as needed, and look up the prompts.

    Returns:
      The state; paths i32[B, G * width] and their tokens i32[B]; and bool[num_blocks],
      blocks that the search must not use.
    """
    number = len(state.config.group_windows)
    paths = jnp.full((lens.shape[0], width * number), -1, jnp.int32)
    path_lens = jnp.zeros_like(lens)
    kept = state.blocks.ref_counts > 0
    if state.prefix_cache is None:
        return state, paths, path_lens, kept
    cache = prefix_cache.evict(state.prefix_cache, state.blocks.ref_counts, needed)
    most = jnp.maximum(lens - 1, 0)  # the last token is computed for its logits
    length = width * state.config.block_size
    padded = jnp.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
    paths, path_lens = prefix_cache.match(cache, padded, most)
    kept |= prefix_cache.is_cached(cache)
    return dataclasses.replace(state, prefix_cache=cache), paths, path_lens, kept


def _output(
    job: _Job, prompt: Any, tokens: Sequence[int], found: Any, row: int, cached: int
) -> TreeSearchOutput:
    """Return the output of one search for users."""
    error_message = None
    if not found.is_finite[row]:
        name = getattr(job.params.value, "__name__", "value")
        error_message = (
            f"value: expected finite numbers from {name}, got NaN or an infinite one "
            "for a text of this search"
        )
    chosen = _completion(job, tokens, found.texts, (row, 0))
    best = None
    if np.isfinite(found.best.values[row]):
        best = _completion(job, tokens, found.best, (row,))
    steps = found.steps
    return TreeSearchOutput(
        prompt=text_prompts.text_of(prompt),
        prompt_token_ids=list(tokens),
        outputs=[] if error_message else [chosen],
        best=None if error_message else best,
        steps=[
            SearchStep(steps.tokens[row, i], steps.visits[row, i], steps.values[row, i])
            for i in range(int(found.num_tokens[row]))
        ],
        metrics={
            "num_nodes": int(found.num_nodes[row]),
            "num_cached_tokens": cached,
            "num_steps": int(found.num_steps),
            "max_used_blocks": int(found.used_blocks[row]),
            "max_blocks_without_sharing": int(found.copied_blocks[row]),
            "num_block_copies": int(found.num_copies),
        },
        error=error_message,
    )


def _completion(
    job: _Job, prompt: Sequence[int], texts: Texts, at: tuple[int, ...]
) -> CompletionOutput:
    """Return the text of `texts` with index `at`, which is on the host."""
    length = int(texts.lens[at])
    ids = np.asarray(texts.tokens[at])[:length].tolist()
    logprobs = np.asarray(texts.logprobs[at])[:length]
    is_stop = bool(ids) and ids[-1] in job.stop_ids
    text = OutputText(job.tokenizer, prompt, (), 0)
    for token in ids[: length - is_stop]:
        text.push(token)
    text.finish()
    eos = job.host.model.config.eos_token_ids
    is_eos = is_stop and ids[-1] in eos and not job.params.ignore_eos
    return CompletionOutput(
        index=0,
        token_ids=ids,
        text=text.text,
        cumulative_logprob=float(np.sum(logprobs, dtype=np.float64)),
        finish_reason="stop" if is_stop else "length",
        stop_reason=ids[-1] if is_stop and not is_eos else None,
        score=float(texts.values[at]),
        token_logprobs=logprobs.copy(),
    )
