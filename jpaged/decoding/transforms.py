"""Logits transforms: temperature, min-p, top-k and top-p, without a sort.

Place on the road: logits -> [transforms] -> sampling.

XLA sorts 32 rows of 32,000 logits in about 100 ms on a CPU core; none of these
filters needs it. Each of them keeps the tokens at or above one threshold per
row, so all that has to be found is that threshold: among the 64 largest values
when it lies there, and by bisection over the float32 numbers otherwise.

Shape letters: S rows, V vocabulary, G groups of the vocabulary, W entries of a
group, N leading values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.arithmetic import cdiv
from jpaged.decoding.base import LogitsTransform

NUM_LEADING = 64  # values per row that are sorted; thresholds among them are cheap
_SEARCH_ROWS = 8  # rows per chunk of the bisection
_LEADING_GROUP = 32  # vocabulary entries per group when looking for them


def grouped(logits: jax.Array, group_size: int) -> jax.Array:
    """Return f32[S, G, W]: the vocabulary in groups, the last padded with -inf."""
    num_rows, vocab_size = logits.shape
    num_groups = cdiv(vocab_size, group_size)
    padding = num_groups * group_size - vocab_size
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    return logits.reshape(num_rows, num_groups, group_size)


def finite_or_zero(values: jax.Array) -> jax.Array:
    """Return `values` with 0 for -inf, so that exp(x - max) of a masked row is 0."""
    return jnp.where(values == -jnp.inf, 0.0, values)


def leading(logits: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
    """Return the `num` largest logits per row and their ids, as `lax.top_k` does.

    values f32[S, num] descending, ids i32[S, num], the lower id first on ties.
    Only the `num` groups with the largest maxima are searched: an entry of any
    other group has `num` group maxima that are larger, or equal at a lower id.
    """
    vocab_size = logits.shape[1]
    if vocab_size <= 2 * num * _LEADING_GROUP:
        return lax.top_k(logits, num)
    groups_SGW = grouped(logits, _LEADING_GROUP)
    _, group_ids = lax.top_k(jnp.max(groups_SGW, axis=-1), num)
    # In ascending order, so that equal values still come lower id first.
    group_ids = jnp.sort(group_ids, axis=-1)
    found = jnp.take_along_axis(groups_SGW, group_ids[:, :, None], axis=1)
    values, at = lax.top_k(found.reshape(len(logits), -1), num)
    chosen = jnp.take_along_axis(group_ids, at // _LEADING_GROUP, axis=1)
    return values, chosen * _LEADING_GROUP + at % _LEADING_GROUP


def filter_threshold(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
) -> jax.Array:
    """Return f32[S]: tokens with a logit at or above it survive all three filters.

    min_p first (probability at least min_p times the largest), then top_k (at
    least the k-th largest logit; ties are kept), then top_p on what is left,
    renormalised: the fewest tokens, by descending logit, whose mass reaches top_p.
    Tokens that tie with the last of them are kept too. The largest logit always
    survives. -inf where a row has no filter.

    Args:
        logits: f32[S, V], before temperature.
        temperature: f32[S], above 0; probabilities are softmax(logits / temperature).
        top_k: i32[S], 0 (or at least V) is off.
        top_p: f32[S], 1 is off.
        min_p: f32[S], 0 is off.
    """
    row_max = jnp.max(logits, axis=-1)
    # log(0) is -inf: nothing is below it.
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
    """Return f32[S]: the k-th largest logit; -inf where k is 0 or at least V."""
    vocab_size, num = logits.shape[1], values.shape[1]
    is_on = (k > 0) & (k < vocab_size)
    at = jnp.clip(k - 1, 0, num - 1)
    among_leading = jnp.take_along_axis(values, at[:, None], axis=1)[:, 0]
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
    """Return `threshold` raised to where the mass above reaches top_p of the whole."""
    row_max = finite_or_zero(values[:, 0])
    scale = 1.0 / temperature

    def weigh(x: jax.Array, rows: jax.Array | slice = slice(None)) -> jax.Array:
        weights = jnp.exp((x - row_max[rows, None]) * scale[rows, None])
        return jnp.where(x >= threshold[rows, None], weights, 0.0)

    cumulative = jnp.cumsum(weigh(values), axis=-1)
    is_on = top_p < 1.0
    # Where the survivors so far all lie among the leading values, so does their mass.
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
        # All tokens below `low` together weigh less than (1 - top_p) / 2 of the whole.
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
    """Return f32[S]: the largest t in [low, high] with `target` or more at or above t.

    (Or a smaller one above which the same tokens lie.) Bisection over the float32
    numbers in their order: exact, and at most 32 passes. Only rows of `is_open` are
    searched, a few at a time: the work follows how many there are, and a chunk stays
    in a core's cache.

    Args:
        weigh: (logits f32[C, V] of a chunk, rows i32[C]) -> f32[C, V], or None for 1
            per token (exact below 2**24 tokens).
        low: reaches the target, so it is the answer where nothing else does.
    """
    num_rows = len(logits)
    chunk = min(_SEARCH_ROWS, num_rows)
    order = jnp.argsort(~is_open, stable=True).astype(jnp.int32)
    num_open = jnp.sum(is_open, dtype=jnp.int32)

    def search_chunk(start: jax.Array, found: jax.Array) -> jax.Array:
        rows = lax.dynamic_slice(order, (start,), (chunk,))
        x_CV = logits[rows]
        weights = 1.0 if weigh is None else weigh(x_CV, rows)
        wanted = target[rows]

        def narrow(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first, last = bounds
            # Without overflow: floor((first + last) / 2).
            middle = (first & last) + ((first ^ last) >> 1)
            kept = jnp.where(x_CV >= _from_ordered(middle)[:, None], weights, 0.0)
            weight = jnp.sum(kept, axis=-1)
            last = jnp.where(weight >= wanted, last, middle)
            # Exactly what was wanted: a larger threshold could only lose some of it.
            last = jnp.where(weight == wanted, middle + 1, last)
            return jnp.where(weight >= wanted, middle, first), last

        first, last = _to_ordered(low[rows]), _to_ordered(high[rows]) + 1
        last = jnp.where(is_open[rows], last, first)
        first, _ = lax.while_loop(
            lambda bounds: jnp.any(bounds[0] + 1 < bounds[1]), narrow, (first, last)
        )
        return found.at[rows].set(_from_ordered(first), unique_indices=True)

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, found = carry
        # The last chunk slides back to fit, and finds some rows a second time.
        found = search_chunk(jnp.minimum(start, num_rows - chunk), found)
        return start + chunk, found

    _, found = lax.while_loop(
        lambda carry: carry[0] < num_open, body, (jnp.int32(0), low)
    )
    return found


def _to_ordered(values: jax.Array) -> jax.Array:
    """Return i32 keys in the order of the float32 `values`."""
    bits = lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(keys: jax.Array) -> jax.Array:
    """Return the float32 values of `_to_ordered` keys."""
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)


def _per_row(value: Any, name: str, logits: jax.Array, params: Any) -> jax.Array:
    """Return the transform's own constant for every row, or the rows' parameter."""
    if value is None:
        if params is None:
            raise ValueError(
                f"{name}: no value given and no params; pass {name}(value), or call "
                f"the transform with params that have an array {name!r}"
            )
        return getattr(params, name)
    dtype = jnp.int32 if name == "top_k" else jnp.float32
    return jnp.full((len(logits),), value, dtype)


def _off(logits: jax.Array) -> dict[str, jax.Array]:
    num_rows = (len(logits),)
    return {
        "temperature": jnp.ones(num_rows),
        "top_k": jnp.zeros(num_rows, jnp.int32),
        "top_p": jnp.ones(num_rows),
        "min_p": jnp.zeros(num_rows),
    }


def _filter(name: str, value: Any) -> LogitsTransform:
    def transform(logits: jax.Array, params: Any = None) -> jax.Array:
        setting = {name: _per_row(value, name, logits, params)}
        threshold = filter_threshold(logits, **(_off(logits) | setting))
        return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)

    return transform


def temperature(value: float | None = None) -> LogitsTransform:
    """Return the transform that divides logits by a temperature above 0.

    `value` None reads `params.temperature`, f32[S].
    """

    def transform(logits: jax.Array, params: Any = None) -> jax.Array:
        return logits / _per_row(value, "temperature", logits, params)[:, None]

    return transform


def min_p(value: float | None = None) -> LogitsTransform:
    """Return the transform that drops tokens below min_p times the top probability.

    `value` None reads `params.min_p`, f32[S]; 0 is off.
    """
    return _filter("min_p", value)


def top_k(value: int | None = None) -> LogitsTransform:
    """Return the transform that keeps the k largest logits and what ties with them.

    `value` None reads `params.top_k`, i32[S]; 0 is off.
    """
    return _filter("top_k", value)


def top_p(value: float | None = None) -> LogitsTransform:
    """Return the transform that keeps the smallest set with a mass of at least top_p.

    `value` None reads `params.top_p`, f32[S]; 1 is off.
    """
    return _filter("top_p", value)
