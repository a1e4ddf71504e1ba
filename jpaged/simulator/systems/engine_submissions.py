"""Engine submissions: simulated requests in the form of the engine's request table.

Pipeline: simulated request -> [engine_submissions] -> submission -> request table.

The engine's own `submission.encode_requests` runs once on the host for each kind of
request, a pair (num_samples, beam_width). These templates are completed inside the
compiled program with the number and the lengths of each request.

Shape symbols: K kinds of requests, B most sequences of one request, R sequence indices.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.config import EngineConfig
from jpaged.decoding import constraints
from jpaged.engine import request_table, submission
from jpaged.engine.request_table import Submission
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.scheduler import EMPTY, Attributes
from jpaged.simulator.systems.base import SimulatedRequest
from jpaged.simulator.systems.synthetic_tokens import VOCABULARY, prompt_tokens

RequestKinds = tuple[tuple[int, int], ...]  # pairs (num_samples, beam_width)


def request_params(
    kind: tuple[int, int], max_tokens: int
) -> BeamSearchParams | SamplingParams:
    """Return the request parameters of a kind (num_samples, beam_width)."""
    num_samples, beam_width = kind
    if beam_width:
        return BeamSearchParams(beam_width, max_tokens=max_tokens, ignore_eos=True)
    return SamplingParams(
        n=num_samples, temperature=1.0, max_tokens=max_tokens, ignore_eos=True
    )


@functools.lru_cache(maxsize=64)
def templates(config: EngineConfig, kinds: RequestKinds) -> Submission:
    """Return the engine's submission of a request of each kind, numpy [K, B, ...].

    Each is a submission to an empty table, at its first sequence indices. Sequence
    indices of a template therefore number the sequences of its request.

    Raises:
      ValueError: the engine rejects a request of one of the kinds.
    """
    table = jax.eval_shape(lambda: request_table.init_table(config))
    table = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), table)
    found = []
    for kind in kinds:
        encoded, _ = submission.encode_requests(
            table,
            config,
            [[0, 0]],
            [request_params(kind, max_tokens=1)],
            [constraints.UNCONSTRAINED],
            seed=0,
            arrivals=[0],
            submitted_ms=[0],
            vocab_size=VOCABULARY,
            eos_token_ids=(),
        )
        assert encoded is not None
        found.append(dataclasses.replace(encoded, tokens=encoded.tokens[:, :0]))
    most = max(len(one.seq_indices) for one in found)

    def pad(leaf: np.ndarray, fill: int = 0) -> np.ndarray:
        shape = ((0, most - leaf.shape[0]),) + ((0, 0),) * (leaf.ndim - 1)
        return np.pad(leaf, shape, constant_values=fill)

    padded = [
        dataclasses.replace(
            jax.tree.map(pad, one),
            seq_indices=pad(np.asarray(one.seq_indices), config.max_num_requests),
        )
        for one in found
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *padded)


def find_entries(
    config: EngineConfig,
    kinds: RequestKinds,
    request: SimulatedRequest,
    status: jax.Array,
) -> tuple[Submission, jax.Array, jax.Array]:
    """Find empty entries of the request table for the sequences of a request.

    Args:
      config: the engine's.
      kinds: the kinds of requests that there are.
      request: the request, of one of the kinds.
      status: i32[R], the status of each sequence of the request table.

    Returns:
      The template of the request's kind; its sequence indices i32[B], R after the last;
      and bool[]: whether the table has enough empty entries.
    """
    params = jnp.stack([request.num_samples, request.beam_width])
    pairs = jnp.array(kinds, jnp.int32)
    kind = jnp.argmax(jnp.all(pairs == params[None, :], axis=1))
    template = jax.tree.map(
        lambda leaf: jnp.asarray(leaf)[kind], templates(config, kinds)
    )
    (size,) = template.seq_indices.shape
    table_size = config.max_num_requests
    is_used = template.seq_indices < table_size
    is_empty = status == EMPTY
    (empty,) = jnp.nonzero(is_empty, size=size, fill_value=table_size)
    ok = jnp.sum(is_empty) >= jnp.sum(is_used)
    seq_indices = jnp.where(is_used & ok, empty.astype(jnp.int32), table_size)
    return template, seq_indices, ok


def complete_submission(
    config: EngineConfig,
    template: Submission,
    request: SimulatedRequest,
    seq_indices: jax.Array,
    content_size: int,
) -> Submission:
    """Return the submission of a request.

    Args:
      config: the engine's.
      template: of the request's kind.
      request: the request.
      seq_indices: i32[B], where its sequences are inserted.
      content_size: prompt tokens that an id of `request.content` represents.
    """
    tokens = prompt_tokens(request, config.max_model_len, content_size)
    shared = jnp.where(template.queue["shared_lens"] > 0, request.prompt_len - 1, 0)
    own = jnp.arange(seq_indices.shape[0], dtype=jnp.int32)
    sources = jnp.where(shared > 0, template.queue["sources"], own)
    columns = template.queue | dict(
        arrivals=jnp.full_like(seq_indices, request.number),
        prompt_lens=jnp.full_like(seq_indices, request.prompt_len),
        num_tokens=jnp.full_like(seq_indices, request.prompt_len),
        leaders=seq_indices[template.queue["leaders"]],
        sources=seq_indices[sources],
        shared_lens=shared,
    )
    if "attributes" in columns:
        columns["attributes"] = Attributes(
            max_tokens=jnp.full_like(seq_indices, request.output_len),
            submitted=jnp.full_like(seq_indices, request.arrival_ms),
            deadlines=jnp.full_like(seq_indices, request.deadline_ms),
            users=jnp.full_like(seq_indices, request.user),
            user_tokens=jnp.zeros_like(seq_indices),
        )
    limit = request.prompt_len + request.output_len
    sampling = dataclasses.replace(
        template.params.sampling,
        seed=jnp.full_like(template.params.sampling.seed, request.number),
    )
    params = dataclasses.replace(
        template.params,
        token_limits=jnp.full_like(seq_indices, limit),
        sampling=sampling,
    )
    states = template.states
    if config.max_beam_width:
        most = jnp.full_like(states[0].max_tokens, request.output_len)
        states = (dataclasses.replace(states[0], max_tokens=most), *states[1:])
    return Submission(
        seq_indices=seq_indices,
        queue=columns,
        tokens=jnp.broadcast_to(tokens, (seq_indices.shape[0], *tokens.shape)),
        params=params,
        states=states,
    )
