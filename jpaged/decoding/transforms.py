"""Logits transforms: temperature, min-p, top-k and top-p, without a sort.

Pipeline: logits -> [transforms] -> sampling.

XLA sorts 32 rows of 32,000 logits in about 100 ms on a CPU core. These filters need no
sort: each keeps the tokens at or above one threshold per row. The threshold is searched
among the 64 largest values, and otherwise by bisection over the float32 numbers.

Shape symbols: S rows, V vocabulary, G groups of the vocabulary, W entries of a group, N
leading values.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv, midpoint
from jpaged.decoding.base import LogitsTransform, NumberTransform
from jpaged.decoding.parameters import Range

NUM_LEADING = 64  # sorted values per row, among which thresholds are cheap
_SEARCH_ROWS = 8  # rows per chunk of the bisection
_LEADING_GROUP = 32  # vocabulary entries per group in the search for leading values


def grouped(logits: jax.Array, group_size: int) -> jax.Array:
    """Reshapes logits into groups f32[S, G, W]; the last is padded with -inf."""
    num_rows, vocab_size = logits.shape
    num_groups = cdiv(vocab_size, group_size)
    padding = num_groups * group_size - vocab_size
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(num_rows, num_groups, group_size)


def finite_or_zero(values: jax.Array) -> jax.Array:
    """Replaces -inf by 0, so that exp(x - max) is 0 in a masked row."""
    return jnp.where(values == -jnp.inf, 0.0, values)


def leading(logits: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits of each row, as `lax.top_k`.

    Only the `num` groups with the largest maxima are searched: for an entry of any
    other group there are `num` group maxima that are larger, or equal with a lower id.

    Args:
      logits: f32[S, V].
      num: How many.

    Returns:
      Values f32[S, num] in descending order, and ids i32[S, num]; equal values are in
      the order of ids.
    """
    vocab_size = logits.shape[1]
    if vocab_size <= 2 * num * _LEADING_GROUP:
        return lax.top_k(logits, num)
    groups_SGW = grouped(logits, _LEADING_GROUP)
    _, group_ids = lax.top_k(jnp.max(groups_SGW, axis=-1), num)
    # Ascending, so that equal values stay in the order of ids.
    group_ids = jnp.sort(group_ids, axis=-1)
    found = jnp.take_along_axis(groups_SGW, group_ids[:, :, None], axis=1)
    values, index = lax.top_k(found.reshape(len(logits), -1), num)
    chosen = jnp.take_along_axis(group_ids, index // _LEADING_GROUP, axis=1)
    return values, chosen * _LEADING_GROUP + index % _LEADING_GROUP


def filter_threshold(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Threshold of each row's logits for all three filters, f32[S].

    Tokens with a logit at or above the threshold are kept. min_p is applied first: it
    keeps probabilities of at least min_p times the largest one. Then top_k keeps logits
    of at least the k-th largest one, including ties. Then the remaining probabilities
    are renormalised, and top_p keeps the fewest tokens, by descending logit, whose mass
    reaches top_p, including ties with the last of them. The largest logit is always
    kept. The threshold is -inf for a row without filters.

    Args:
      logits: f32[S, V], before temperature.
      temperature: f32[S], above 0; probabilities are softmax(logits / temperature).
      top_k: i32[S]; 0 or at least V is off.
      top_p: f32[S]; 1 is off.
      min_p: f32[S]; 0 is off.
    """
    row_max = jnp.max(logits, axis=-1)
    # For min_p = 0 this is -inf.
    relative = row_max + temperature * jnp.log(min_p)
    threshold = jnp.where(min_p > 0.0, jnp.minimum(relative, row_max), -jnp.inf)
    num = min(NUM_LEADING, logits.shape[1])
    values, _ = leading(logits, num)
    threshold = jnp.maximum(threshold, _kth_largest(logits, values, top_k))
    return lax.cond(
        jnp.any(top_p < 1.0),
        lambda: _nucleus_threshold(logits, values, temperature, top_p, threshold),
        lambda: threshold,
    )


def _kth_largest(logits: jax.Array, values: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest logit, f32[S]; -inf if k is 0 or at least V."""
    vocab_size, num = logits.shape[1], values.shape[1]
    is_on = (k > 0) & (k < vocab_size)
    index = jnp.clip(k - 1, 0, num - 1)
    among_leading = jnp.take_along_axis(values, index[:, None], axis=1)[:, 0]
    beyond = is_on & (k > num)

    def search() -> jax.Array:
        found = _largest_threshold(
            logits,
            None,
            target=k.astype(jnp.float32),
            low=jnp.full_like(among_leading, -jnp.inf),
            high=values[:, -1],
            is_open=beyond,
        )
        return jnp.where(beyond, found, among_leading)

    kth = lax.cond(jnp.any(beyond), search, lambda: among_leading)
    return jnp.where(is_on, kth, -jnp.inf)


def _nucleus_threshold(
    logits: jax.Array,
    values: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
    threshold: jax.Array,
) -> jax.Array:
    """Raises `threshold` until the mass above it is just top_p of the whole mass."""
    row_max = finite_or_zero(values[:, 0])
    scale = 1.0 / temperature

    def weigh(x: jax.Array, rows: jax.Array | slice = slice(None)) -> jax.Array:
        weights = jnp.exp((x - row_max[rows, None]) * scale[rows, None])
        return jnp.where(x >= threshold[rows, None], weights, 0.0)

    cumulative = jnp.cumsum(weigh(values), axis=-1)
    is_on = top_p < 1.0
    # If all remaining tokens are among the leading values, so is their whole mass.
    is_wide = is_on & (values[:, -1] >= threshold)
    total = lax.cond(
        jnp.any(is_wide),
        lambda: jnp.where(is_wide, weigh(logits).sum(axis=-1), cumulative[:, -1]),
        lambda: cumulative[:, -1],
    )
    target = top_p * total
    reached = cumulative >= target[:, None]
    first = jnp.argmax(reached, axis=-1)
    nucleus = jnp.take_along_axis(values, first[:, None], axis=1)[:, 0]
    beyond = is_wide & ~jnp.any(reached, axis=-1)

    def search() -> jax.Array:
        # All tokens below `low` have less than (1 - top_p) / 2 of the whole mass.
        least = jnp.maximum((1.0 - top_p) * total / (2.0 * logits.shape[1]), 1e-37)
        low = jnp.maximum(threshold, row_max + temperature * jnp.log(least))
        high = values[:, -1]
        low = jnp.minimum(low, high)
        found = _largest_threshold(logits, weigh, target, low, high, is_open=beyond)
        return jnp.where(beyond, found, nucleus)

    nucleus = lax.cond(jnp.any(beyond), search, lambda: nucleus)
    return jnp.where(is_on, jnp.maximum(threshold, nucleus), threshold)


def _largest_threshold(
    logits: jax.Array,
    weigh: Callable[[jax.Array, jax.Array], jax.Array] | None,
    target: jax.Array,
    low: jax.Array,
    high: jax.Array,
    is_open: jax.Array,
) -> jax.Array:
    """Largest threshold in [low, high] at or above which the weight reaches `target`.

    The result may also be a smaller number with the same tokens at or above it. The
    search is a bisection over the ordered float32 numbers, which is exact and takes at
    most 32 passes. It searches only the rows of `is_open`, in small chunks, so that the
    work is proportional to their number and a chunk fits into a core's cache.

    Args:
      logits: f32[S, V].
      weigh: (logits f32[C, V] of a chunk, rows i32[C]) -> f32[C, V]; None: each token
        has weight 1 (exact below 2**24 tokens).
      target: f32[S], weight to reach.
      low: f32[S], a threshold that reaches the target, and the result if no larger
        one does.
      high: f32[S].
      is_open: bool[S], rows to search.

    Returns:
      f32[S]; the values of other rows are undefined.
    """
    num_rows = len(logits)
    chunk = min(_SEARCH_ROWS, num_rows)
    order = jnp.argsort(~is_open, stable=True).astype(jnp.int32)
    num_open = jnp.sum(is_open, dtype=jnp.int32)

    def search_chunk(start: jax.Array, found: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(order, (start,), (chunk,))
        x_CV = logits[rows]
        weights = 1.0 if weigh is None else weigh(x_CV, rows)
        needed = target[rows]

        def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, last = bounds
            middle = midpoint(first, last)
            kept = jnp.where(x_CV >= from_ordered(middle)[:, None], weights, 0.0)
            weight = jnp.sum(kept, axis=-1)
            last = jnp.where(weight >= needed, last, middle)
            # The weight equals the target: no larger threshold can reach it.
            last = jnp.where(weight == needed, middle + 1, last)
            return jnp.where(weight >= needed, middle, first), last

        first, last = to_ordered(low[rows]), to_ordered(high[rows]) + 1
        last = jnp.where(is_open[rows], last, first)
        first, _ = lax.while_loop(
            lambda bounds: jnp.any(bounds[0] + 1 < bounds[1]), narrow, (first, last)
        )
        return found.at[rows].set(from_ordered(first), unique_indices=True)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, found = carry
        # The last chunk starts earlier to fit, and searches some rows again.
        found = search_chunk(jnp.minimum(start, num_rows - chunk), found)
        return start + chunk, found

    _, found = lax.while_loop(
        lambda carry: carry[0] < num_open, body, (jnp.int32(0), low)
    )
    return found


def to_ordered(values: jax.Array) -> jax.Array:
    """Maps float32 values to i32 keys of the same order."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def from_ordered(keys: jax.Array) -> jax.Array:
    """Inverse of `to_ordered`."""
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)


def _filtered(logits: jax.Array, **setting: jax.Array) -> jax.Array:
    """Logits f32[S, V] with one filter; the others are off."""
    num_rows = len(logits)
    rows = dict(
        temperature=jnp.ones(num_rows),
        top_k=jnp.zeros(num_rows, jnp.int32),
        top_p=jnp.ones(num_rows),
        min_p=jnp.zeros(num_rows),
    )
    for name, value in setting.items():
        rows[name] = jnp.broadcast_to(value, num_rows).astype(rows[name].dtype)
    threshold = filter_threshold(logits, **rows)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)


def _divide(logits: jax.Array, value: jax.Array) -> jax.Array:
    return logits / value


def _keep_min_p(logits: jax.Array, value: jax.Array) -> jax.Array:
    return _filtered(logits, min_p=value)


def _keep_top_k(logits: jax.Array, value: jax.Array) -> jax.Array:
    return _filtered(logits, top_k=value)


def _keep_top_p(logits: jax.Array, value: jax.Array) -> jax.Array:
    return _filtered(logits, top_p=value)


def temperature(value: float) -> LogitsTransform:
    """Builds the transform that divides logits by a temperature above 0."""
    return NumberTransform(_divide, "temperature", value, Range(above=0))


def min_p(value: float) -> LogitsTransform:
    """Builds the transform that drops tokens of low probability.

    Args:
      value: Share of the largest probability below which tokens are dropped; 0 is off.
    """
    return NumberTransform(_keep_min_p, "min_p", value, Range(0, 1))


def top_k(value: int) -> LogitsTransform:
    """Builds the transform that keeps the k largest logits and ties; 0 is off."""
    return NumberTransform(_keep_top_k, "top_k", value, Range(low=0))


def top_p(value: float) -> LogitsTransform:
    """Builds the transform that keeps the smallest set of tokens with a mass of top_p.

    Args:
      value: The least mass to keep; 1 is off.
    """
    return NumberTransform(_keep_top_p, "top_p", value, Range(high=1, above=0))
