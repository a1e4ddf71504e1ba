"""Sampling: one token per row from its logits, independent of the other rows.

Pipeline: logits -> [sample] -> (tokens, logprobs) -> engine.

A token is sampled by inverse CDF on two levels: first a group of 128 vocabulary entries
in proportion to its mass, then an entry of that group. This needs two random numbers
per row. Gumbel-max sampling needs V, which take most of its time on a CPU. See
docs/decisions/sampling.md.

Shape symbols: S rows, V vocabulary, G groups, W entries of a group.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import sum_in_order
from jpaged.decoding.base import (
    Chain,
    Context,
    Decision,
    DecodingAlgorithm,
    LogitsTransform,
    NumberTransform,
    State,
    own_rows,
)
from jpaged.decoding.transforms import (
    filter_threshold,
    finite_or_zero,
    grouped,
    leading,
)

GREEDY_BELOW = 1e-5  # lower temperatures mean greedy decoding
GROUP_SIZE = 128  # vocabulary entries per group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of the rows of a step as arrays."""

    temperature: jax.Array  # f32[S], below GREEDY_BELOW: greedy, without filters
    top_k: jax.Array  # i32[S], 0 is off
    top_p: jax.Array  # f32[S], 1 is off
    min_p: jax.Array  # f32[S], 0 is off
    seed: jax.Array  # u32[S], the request's seed
    sample: jax.Array  # i32[S], index of the sample in the request

    @classmethod
    def greedy(cls, num_rows: int) -> "SamplingRows":
        """Rows that decode greedily, which are also the values of unused rows."""
        return cls(
            temperature=jnp.zeros(num_rows, jnp.float32),
            top_k=jnp.zeros(num_rows, jnp.int32),
            top_p=jnp.ones(num_rows, jnp.float32),
            min_p=jnp.zeros(num_rows, jnp.float32),
            seed=jnp.zeros(num_rows, jnp.uint32),
            sample=jnp.zeros(num_rows, jnp.int32),
        )


def token_keys(seeds: jax.Array, samples: jax.Array, positions: jax.Array) -> jax.Array:
    """PRNG key of each row's token, key[S].

    A key depends only on the request's seed, the sample's index and the token's
    position, so that batch, schedule and preemption do not change a request's tokens.

    Args:
      seeds: u32[S].
      samples: i32[S].
      positions: i32[S].
    """

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        root = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(root, sample), position)

    return jax.vmap(key)(seeds.astype(jnp.uint32), samples, positions)


def sample(
    logits: jax.Array,
    rows: SamplingRows,
    positions: jax.Array,
    kind: str = "filtered",
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row.

    The device chooses the cheapest method that serves all rows: greedy, plain, with
    temperatures, or with filters. The token of a row does not depend on this choice. A
    row whose logits are all -inf gets token 0 with log-probability -inf.

    Args:
      logits: f32[S, V]; tokens with -inf are never chosen.
      rows: Parameters of each row.
      positions: i32[S], index of the sampled token in its sequence.
      kind: what the rows may use: "greedy" ignores everything but the logits, "random"
        ignores filters. Less compiles faster.

    Returns:
      Tokens i32[S], and their log-probabilities f32[S] under the raw model, before
      temperature and filters.
    """
    logits = logits.astype(jnp.float32)
    if kind == "greedy":
        maxima, _, log_total = _summary(logits)
        tokens = _largest(logits, maxima)
        return tokens, _chosen(logits, tokens) - log_total
    keys = token_keys(rows.seed, rows.sample, positions)
    return _sample(keys, logits, rows, has_filters=kind == "filtered")


def _sample(
    keys: jax.Array, logits: jax.Array, rows: SamplingRows, has_filters: bool
) -> tuple[jax.Array, jax.Array]:
    num_rows = len(logits)
    is_greedy = rows.temperature < GREEDY_BELOW
    is_filtered = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
    is_filtered &= ~is_greedy
    is_plain = is_greedy | ((rows.temperature == 1.0) & ~is_filtered)
    temperature = jnp.where(is_greedy, 1.0, rows.temperature)

    maxima, masses, log_total = _summary(logits)
    unfiltered = jnp.full(num_rows, -jnp.inf)

    def sampled() -> jax.Array:
        threshold = unfiltered
        if has_filters:
            threshold = lax.cond(
                jnp.any(is_filtered),
                lambda: jnp.where(
                    is_filtered,
                    filter_threshold(
                        logits, temperature, rows.top_k, rows.top_p, rows.min_p
                    ),
                    unfiltered,
                ),
                lambda: unfiltered,
            )
        # In every branch, plain rows use the masses that their log-probability needs
        # anyway, so that other rows cannot change their rounding.
        weights = lax.cond(
            jnp.all(is_plain),
            lambda: masses,
            lambda: jnp.where(
                is_plain[:, None],
                masses,
                _masses(logits, maxima, temperature, threshold),
            ),
        )
        tokens = _sample_groups(keys, logits, weights, temperature, threshold)
        return jnp.where(is_greedy, _largest(logits, maxima), tokens)

    tokens = lax.cond(jnp.all(is_greedy), lambda: _largest(logits, maxima), sampled)
    return tokens, _chosen(logits, tokens) - log_total


def _summary(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Maxima f32[S, G] and masses f32[S, G] of groups; log-sum-exp f32[S] of rows."""
    maxima = jnp.max(grouped(logits, GROUP_SIZE), axis=-1)
    row_max = finite_or_zero(jnp.max(maxima, axis=-1))
    masses = jnp.exp(grouped(logits, GROUP_SIZE) - row_max[:, None, None]).sum(axis=-1)
    total = jnp.sum(masses, axis=-1)
    # 0 for a row that is all -inf, since -inf minus -inf would be NaN.
    return maxima, masses, jnp.where(total == 0.0, 0.0, row_max + jnp.log(total))


def _masses(
    logits: jax.Array, maxima: jax.Array, temperature: jax.Array, threshold: jax.Array
) -> jax.Array:
    """Masses of the groups at a temperature and above a threshold, f32[S, G]."""
    row_max = finite_or_zero(jnp.max(maxima, axis=-1))[:, None, None]
    x_SGW = grouped(logits, GROUP_SIZE)
    weights = jnp.exp((x_SGW - row_max) * (1.0 / temperature)[:, None, None])
    return jnp.where(x_SGW >= threshold[:, None, None], weights, 0.0).sum(axis=-1)


def _group(logits: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token ids i32[S, W] and logits f32[S, W] of one group per row."""
    ids = group[:, None] * GROUP_SIZE + jnp.arange(GROUP_SIZE, dtype=jnp.int32)[None]
    values = jnp.take_along_axis(logits, ids, axis=1, mode="fill", fill_value=-jnp.inf)
    return ids, values


def _largest(logits: jax.Array, maxima: jax.Array) -> jax.Array:
    """Argmax i32[S], the first on ties; XLA's argmax is 6 times slower on CPUs."""
    group = jnp.argmax(maxima, axis=-1).astype(jnp.int32)
    _, values = _group(logits, group)
    return group * GROUP_SIZE + jnp.argmax(values, axis=-1).astype(jnp.int32)


def _sample_groups(
    keys: jax.Array,
    logits: jax.Array,
    masses: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """Samples i32[S]: a group by its mass, and a token of the group by its weight."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    # 24 bits are the precision of uniformly spaced float32 numbers below 1.
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    group = _inverse_cdf(masses, uniform[:, 0])
    ids, values = _group(logits, group)
    values = jnp.where(values >= threshold[:, None], values, -jnp.inf)
    # Weights are relative to the group's maximum: its largest entry has weight 1, even
    # if it is tiny within the row, so that a sampled group always has a possible entry.
    largest = finite_or_zero(jnp.max(values, axis=-1))
    scale = 1.0 / temperature
    weights = jnp.exp((values - largest[:, None]) * scale[:, None])
    entry = _inverse_cdf(weights, uniform[:, 1])
    return jnp.take_along_axis(ids, entry[:, None], axis=1)[:, 0]


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """First index whose cumulative weight exceeds uniform * total, i32[S].

    An index of weight 0 is never returned unless all weights are 0, even if rounding of
    the cumulative sum, which need not be monotonic, points to one.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    is_possible = weights > 0.0
    exceeds = is_possible & (cumulative > uniform[:, None] * cumulative[:, -1:])
    indices = jnp.arange(weights.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(is_possible, indices[None], 0), axis=-1)
    first = jnp.argmax(exceeds, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(exceeds, axis=-1), first, last)


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Logits of the rows' tokens, f32[S]."""
    return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]


def processed_logits(
    logits: jax.Array, rows: SamplingRows, kind: str = "filtered"
) -> jax.Array:
    """Logits f32[S, V] of the distributions that `sample` samples from.

    Logits are divided by the temperature, and those of tokens that the filters drop are
    -inf. Greedy rows have no temperature and no filters.

    Args:
      logits: f32[S, V], after rules.
      rows: Parameters of each row.
      kind: as in `sample`.
    """
    logits = logits.astype(jnp.float32)
    if kind == "greedy":
        return logits
    is_greedy = rows.temperature < GREEDY_BELOW
    temperature = jnp.where(is_greedy, 1.0, rows.temperature)
    scaled = logits * (1.0 / temperature)[:, None]
    if kind == "random":
        return scaled

    def filtered() -> jax.Array:
        threshold = filter_threshold(
            logits, temperature, rows.top_k, rows.top_p, rows.min_p
        )
        is_kept = is_greedy[:, None] | (logits >= threshold[:, None])
        return jnp.where(is_kept, scaled, -jnp.inf)

    is_filtered = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
    is_any = jnp.any(is_filtered & ~is_greedy)
    return lax.cond(is_any, filtered, lambda: scaled)


def top_logprobs(logits: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """The largest raw log-probabilities of each row.

    Args:
      logits: f32[S, V].
      num: How many, at most V; static.

    Returns:
      Log-probabilities f32[S, num] in descending order, and their token ids i32[S,
      num]; equal values are in the order of ids.
    """
    logits = logits.astype(jnp.float32)
    values, ids = leading(logits, num)
    _, _, log_total = _summary(logits)
    return values - log_total[:, None], ids


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Raw log-probabilities and ranks of given tokens.

    Args:
      logits: f32[S, V].
      tokens: i32[S].

    Returns:
      Log-probabilities f32[S], and ranks i32[S]: 1 + the number of tokens with a larger
      logit, as in vLLM.
    """
    logits = logits.astype(jnp.float32)
    chosen = _chosen(logits, tokens)
    _, _, log_total = _summary(logits)
    ranks = 1 + jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32)
    return chosen - log_total, ranks


def invariant_logprobs(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities f32[S] whose bits depend on a row alone; differentiable.

    Args:
      logits: f32[S, V].
      tokens: i32[S].
    """
    logits = logits.astype(jnp.float32)
    row_max = finite_or_zero(lax.stop_gradient(jnp.max(logits, axis=-1)))
    total = sum_in_order(jnp.exp(logits - row_max[:, None]))
    log_total = lax.optimization_barrier(jnp.log(jnp.where(total == 0.0, 1.0, total)))
    return (_chosen(logits, tokens) - row_max) - log_total


def greedy() -> DecodingAlgorithm:
    """Builds the algorithm that chooses each row's most probable token."""

    def init(num_rows: int) -> State:
        del num_rows
        return ()

    def step(
        keys: jax.Array, logits: jax.Array, state: State
    ) -> tuple[State, Decision]:
        del keys
        logits = logits.astype(jnp.float32)
        maxima, _, log_total = _summary(logits)
        tokens = _largest(logits, maxima)
        return state, _own(tokens, _chosen(logits, tokens) - log_total)

    return DecodingAlgorithm(init, step, keeps_rows=True)


def sample_rows(
    keys: jax.Array, scores: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Samples a token of each row from softmax(scores / temperature).

    Args:
      keys: key[S].
      scores: f32[S, V].
      temperature: f32[]; below GREEDY_BELOW: the largest score.

    Returns:
      i32[S].
    """
    maxima, _, _ = _summary(scores)
    is_greedy = temperature < GREEDY_BELOW
    warped = scores / jnp.where(is_greedy, 1.0, temperature)
    _, masses, _ = _summary(warped)
    ones, unfiltered = jnp.ones(len(scores)), jnp.full(len(scores), -jnp.inf)
    tokens = _sample_groups(keys, warped, masses, ones, unfiltered)
    return jnp.where(is_greedy, _largest(scores, maxima), tokens)


def sampling(transform: LogitsTransform | None = None) -> DecodingAlgorithm:
    """Builds the algorithm that samples from softmax(transform(logits)).

    For example `sampling(chain(temperature(0.8), top_k(40)))`. The numbers of the
    transforms of jpaged are parameters, "temperature_0" and "top_k_1" here: other
    numbers compile nothing. The log-probabilities of its decisions are those of the raw
    model.

    Args:
      transform: Applied to the logits of each step; None: no transform.
    """
    parts = _parts(transform)
    names = tuple(
        f"{part.name}_{i}" if isinstance(part, NumberTransform) else None
        for i, part in enumerate(parts)
    )
    functions = tuple(getattr(part, "function", part) for part in parts)
    init, step = _sampling(functions, names)
    named = [(n, part) for n, part in zip(names, parts, strict=True) if n is not None]
    return DecodingAlgorithm(
        init,
        step,
        parameters={name: float(part.value) for name, part in named},
        ranges={name: part.range for name, part in named},
        keeps_rows=True,
    )


def _parts(transform: Any) -> list[Any]:
    """The transforms of a chain, one after the other."""
    if transform is None:
        return []
    if isinstance(transform, Chain):
        return [part for one in transform.transforms for part in _parts(one)]
    return [transform]


@functools.lru_cache(maxsize=256)
def _sampling(
    functions: tuple[Any, ...], names: tuple[str | None, ...]
) -> tuple[Any, Any]:
    """`init` and `step` of `sampling`; the same for the same functions."""

    def init(num_rows: int) -> State:
        del num_rows
        return ()

    def step(
        keys: jax.Array, logits: jax.Array, state: State, *context: Context
    ) -> tuple[State, Decision]:
        logits = logits.astype(jnp.float32)
        _, _, log_total = _summary(logits)
        warped = logits
        for function, name in zip(functions, names, strict=True):
            values = () if name is None else (context[0].parameters[name],)
            warped = function(warped, *values)
        _, masses, _ = _summary(warped)
        ones, unfiltered = jnp.ones(len(logits)), jnp.full(len(logits), -jnp.inf)
        tokens = _sample_groups(keys, warped, masses, ones, unfiltered)
        return state, _own(tokens, _chosen(logits, tokens) - log_total)

    return init, step


def _own(tokens: jax.Array, logprobs: jax.Array) -> Decision:
    """The decision in which every row continues itself."""
    num_rows = len(tokens)
    return Decision(
        tokens=tokens,
        parents=own_rows(num_rows),
        logprobs=logprobs,
        finished=jnp.zeros(num_rows, bool),
    )
