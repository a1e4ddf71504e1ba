"""Sampling: one token per row from its logits, whatever the batch around it.

Place on the road: logits -> [sample] -> (tokens, logprobs) -> engine.

A token is drawn by inverse CDF in two levels: first a group of 128 vocabulary
entries, in proportion to its mass, then an entry of that group. It takes two
random numbers per row instead of the V of the Gumbel trick, which are most of
that trick's time on a CPU. See docs/decisions/sampling.md.

Shape letters: S rows, V vocabulary, G groups, W entries of a group.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.decoding.base import (
    Decision,
    DecodingAlgorithm,
    LogitsTransform,
    State,
    own_rows,
)
from jpaged.decoding.transforms import (
    filter_threshold,
    finite_or_zero,
    grouped,
    leading,
)

GREEDY_BELOW = 1e-5  # temperatures below it mean greedy decoding
GROUP_SIZE = 128  # vocabulary entries per group


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingRows:
    """Sampling parameters of the rows of a step, as arrays."""

    temperature: jax.Array  # f32[S], below GREEDY_BELOW: greedy, filters do not matter
    top_k: jax.Array  # i32[S], 0 is off
    top_p: jax.Array  # f32[S], 1 is off
    min_p: jax.Array  # f32[S], 0 is off
    seed: jax.Array  # u32[S], of the request
    sample: jax.Array  # i32[S], which of the request's samples

    @classmethod
    def greedy(cls, num_rows: int) -> "SamplingRows":
        """Return rows that all decode greedily: the value of unused rows too."""
        return cls(
            temperature=jnp.zeros(num_rows, jnp.float32),
            top_k=jnp.zeros(num_rows, jnp.int32),
            top_p=jnp.ones(num_rows, jnp.float32),
            min_p=jnp.zeros(num_rows, jnp.float32),
            seed=jnp.zeros(num_rows, jnp.uint32),
            sample=jnp.zeros(num_rows, jnp.int32),
        )


def token_keys(seeds: jax.Array, samples: jax.Array, positions: jax.Array) -> jax.Array:
    """Return key[S]: the PRNG key of the token of each row.

    It depends on nothing but the request's seed (u32[S]), the sample's index
    (i32[S]) and the token's position (i32[S]), so neither the batch, the schedule
    nor a preemption changes what a request draws.
    """

    def key(seed: jax.Array, sample: jax.Array, position: jax.Array) -> jax.Array:
        root = jax.random.key(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(root, sample), position)

    return jax.vmap(key)(seeds.astype(jnp.uint32), samples, positions)


def sample(
    logits: jax.Array, rows: SamplingRows, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return tokens i32[S] and their raw log-probabilities f32[S].

    The cheapest way that serves all rows is chosen on the device: greedy, plain,
    with temperatures, with filters. What a row gets does not depend on which.
    The log-probabilities are those of the model: before temperature and filters.
    A row whose logits are all -inf gives token 0 with log-probability -inf.

    Args:
        logits: f32[S, V]; -inf marks tokens that cannot be chosen, and never are.
        rows: parameters of each row.
        positions: i32[S], index in its sequence of the token to be drawn.
    """
    logits = logits.astype(jnp.float32)
    keys = token_keys(rows.seed, rows.sample, positions)
    return _sample(keys, logits, rows)


def _sample(
    keys: jax.Array, logits: jax.Array, rows: SamplingRows
) -> tuple[jax.Array, jax.Array]:
    num_rows = len(logits)
    is_greedy = rows.temperature < GREEDY_BELOW
    is_filtered = (rows.top_k > 0) | (rows.top_p < 1.0) | (rows.min_p > 0.0)
    is_filtered &= ~is_greedy
    is_plain = is_greedy | ((rows.temperature == 1.0) & ~is_filtered)
    temperature = jnp.where(is_greedy, 1.0, rows.temperature)

    maxima, masses, log_total = _summary(logits)
    unfiltered = jnp.full(num_rows, -jnp.inf)

    def drawn() -> jax.Array:
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
        # Plain rows keep the masses that their log-probability needed anyway, in
        # every branch, so that their neighbours cannot move them by a rounding.
        weights = lax.cond(
            jnp.all(is_plain),
            lambda: masses,
            lambda: jnp.where(
                is_plain[:, None],
                masses,
                _masses(logits, maxima, temperature, threshold),
            ),
        )
        tokens = _draw(keys, logits, weights, temperature, threshold)
        return jnp.where(is_greedy, _largest(logits, maxima), tokens)

    tokens = lax.cond(jnp.all(is_greedy), lambda: _largest(logits, maxima), drawn)
    return tokens, _chosen(logits, tokens) - log_total


def _summary(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return maxima f32[S, G], masses f32[S, G] and log-sum-exp f32[S] of the rows."""
    maxima = jnp.max(grouped(logits, GROUP_SIZE), axis=-1)
    row_max = finite_or_zero(jnp.max(maxima, axis=-1))
    masses = jnp.exp(grouped(logits, GROUP_SIZE) - row_max[:, None, None]).sum(axis=-1)
    total = jnp.sum(masses, axis=-1)
    # 0 for a row that is all -inf, where -inf minus -inf would be NaN.
    return maxima, masses, jnp.where(total == 0.0, 0.0, row_max + jnp.log(total))


def _masses(
    logits: jax.Array, maxima: jax.Array, temperature: jax.Array, threshold: jax.Array
) -> jax.Array:
    """Return f32[S, G]: the groups' masses at a temperature, above a threshold."""
    row_max = finite_or_zero(jnp.max(maxima, axis=-1))[:, None, None]
    x_SGW = grouped(logits, GROUP_SIZE)
    weights = jnp.exp((x_SGW - row_max) * (1.0 / temperature)[:, None, None])
    return jnp.where(x_SGW >= threshold[:, None, None], weights, 0.0).sum(axis=-1)


def _group(logits: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return ids i32[S, W] and logits f32[S, W] of one group per row."""
    ids = group[:, None] * GROUP_SIZE + jnp.arange(GROUP_SIZE, dtype=jnp.int32)[None]
    values = jnp.take_along_axis(logits, ids, axis=1, mode="fill", fill_value=-jnp.inf)
    return ids, values


def _largest(logits: jax.Array, maxima: jax.Array) -> jax.Array:
    """Return i32[S]: argmax, the first on ties; XLA's own is 6 times slower on CPU."""
    group = jnp.argmax(maxima, axis=-1).astype(jnp.int32)
    _, values = _group(logits, group)
    return group * GROUP_SIZE + jnp.argmax(values, axis=-1).astype(jnp.int32)


def _draw(
    keys: jax.Array,
    logits: jax.Array,
    masses: jax.Array,
    temperature: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """Return i32[S]: a group by its mass, and in it a token by its own."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
    # 24 bits, all that a float32 below 1 can hold evenly.
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24
    group = _inverse_cdf(masses, uniform[:, 0])
    ids, values = _group(logits, group)
    values = jnp.where(values >= threshold[:, None], values, -jnp.inf)
    # From the group's own maximum: its largest entry weighs 1, whatever it is worth
    # in the row, so a group that was drawn always has an entry to draw.
    largest = finite_or_zero(jnp.max(values, axis=-1))
    scale = 1.0 / temperature
    weights = jnp.exp((values - largest[:, None]) * scale[:, None])
    at = _inverse_cdf(weights, uniform[:, 1])
    return jnp.take_along_axis(ids, at[:, None], axis=1)[:, 0]


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Return i32[S]: the first index whose cumulated weight passes uniform * total.

    Never an index of weight 0, unless all are: rounding in the cumulated sum, which
    need not even ascend, may point to one, and is overruled.
    """
    cumulative = jnp.cumsum(weights, axis=-1)
    is_possible = weights > 0.0
    passes = is_possible & (cumulative > uniform[:, None] * cumulative[:, -1:])
    indices = jnp.arange(weights.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(is_possible, indices[None], 0), axis=-1)
    first = jnp.argmax(passes, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(passes, axis=-1), first, last)


def _chosen(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return f32[S]: the logits of the rows' tokens."""
    return jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]


def top_logprobs(logits: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Return the `num` largest raw log-probabilities per row and their token ids.

    values f32[S, num], descending, and ids i32[S, num], lower id first on ties.
    `num` is static and at most V.
    """
    logits = logits.astype(jnp.float32)
    values, ids = leading(logits, num)
    _, _, log_total = _summary(logits)
    return values - log_total[:, None], ids


def token_logprobs(logits: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return raw log-probabilities f32[S] and ranks i32[S] of given tokens i32[S].

    The rank is 1 + the number of tokens with a larger logit, as vLLM counts it.
    """
    logits = logits.astype(jnp.float32)
    chosen = _chosen(logits, tokens)
    _, _, log_total = _summary(logits)
    ranks = 1 + jnp.sum(logits > chosen[:, None], axis=-1, dtype=jnp.int32)
    return chosen - log_total, ranks


def greedy() -> DecodingAlgorithm:
    """Return the algorithm that takes each row's most probable token."""

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

    return DecodingAlgorithm(init, step)


def sampling(transform: LogitsTransform | None = None) -> DecodingAlgorithm:
    """Return the algorithm that draws each row's token from softmax(transform(logits)).

    For example `sampling(chain(temperature(0.8), top_k(40)))`. The log-probabilities
    of the decision are the raw model's.
    """

    def init(num_rows: int) -> State:
        del num_rows
        return ()

    def step(
        keys: jax.Array, logits: jax.Array, state: State
    ) -> tuple[State, Decision]:
        logits = logits.astype(jnp.float32)
        _, _, log_total = _summary(logits)
        warped = logits if transform is None else transform(logits, None)
        _, masses, _ = _summary(warped)
        ones, unfiltered = jnp.ones(len(logits)), jnp.full(len(logits), -jnp.inf)
        tokens = _draw(keys, warped, masses, ones, unfiltered)
        return state, _own(tokens, _chosen(logits, tokens) - log_total)

    return DecodingAlgorithm(init, step)


def _own(tokens: jax.Array, logprobs: jax.Array) -> Decision:
    """Return the decision in which every row continues itself."""
    num_rows = len(tokens)
    return Decision(
        tokens=tokens,
        parents=own_rows(num_rows),
        logprobs=logprobs,
        finished=jnp.zeros(num_rows, bool),
    )
