"""The rules of a request that change its logits: which tokens, how much, how often.

Place on the road: logits -> [rules] -> sample. vLLM's rules in vLLM's order:

    allowed_token_ids -> bad_words -> min_tokens -> logit_bias
        -> repetition_penalty -> frequency_penalty -> presence_penalty

and only then temperature and filters. All of them at most read what a row holds, so a
preempted row that is recomputed gets the same logits again.

Shape letters: S rows, L tokens of the longest sequence, V vocabulary, E stop ids,
A words of a bit mask.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.decoding.rule_arrays import MASK_BITS, NO_TOKEN, LogitsRules, RuleSizes

_PROMPT_TOKEN = -2  # stands for tokens that no bad word may match


class _Rows(NamedTuple):
    """All that the rules of a step look at."""

    rules: LogitsRules
    tokens: jax.Array  # i32[S, L]
    prompt_lens: jax.Array  # i32[S]
    num_tokens: jax.Array  # i32[S]
    stop_ids: jax.Array  # i32[S, E]

    @property
    def is_short(self) -> jax.Array:
        """bool[S], whether fewer than min_tokens were generated."""
        return self.num_tokens - self.prompt_lens < self.rules.min_tokens

    @property
    def token_index(self) -> jax.Array:
        """i32[1, L], the place of each token in its sequence."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]

    def tokens_where(self, chosen: jax.Array) -> jax.Array:
        """i32[S, L], the tokens so far where bool[S, L] holds, else NO_TOKEN."""
        is_token = self.token_index < self.num_tokens[:, None]
        return jnp.where(is_token & chosen, self.tokens, NO_TOKEN)


def _has_allowed(rules: LogitsRules) -> jax.Array:
    return rules.has_allowed


def _only_allowed(logits: jax.Array, rows: _Rows) -> jax.Array:
    words_SA, vocab_size = rows.rules.allowed, logits.shape[1]
    covered = words_SA.shape[1] * MASK_BITS
    if covered < vocab_size:
        raise ValueError(
            f"rules: wanted a mask of at least {vocab_size} tokens, as many as there "
            f"are logits, got one of {covered}"
        )
    shifts = jnp.arange(MASK_BITS, dtype=jnp.uint32)[None, None]
    bits = (words_SA[:, :, None] >> shifts) & jnp.uint32(1)
    bits_SV = bits.reshape(len(logits), covered)[:, :vocab_size]
    is_allowed = (bits_SV == jnp.uint32(1)) | ~rows.rules.has_allowed[:, None]
    return jnp.where(is_allowed, logits, -jnp.inf)


def _has_bad_words(rules: LogitsRules) -> jax.Array:
    return jnp.any(rules.bad_words[..., -1] >= 0, axis=-1)


def _without_bad_words(logits: jax.Array, rows: _Rows) -> jax.Array:
    prefixes = rows.rules.bad_words[..., :-1]
    steps_back = jnp.arange(prefixes.shape[-1], 0, -1, dtype=jnp.int32)
    at = rows.num_tokens[:, None] - steps_back[None]
    end = jnp.take_along_axis(rows.tokens, at, axis=1, mode="clip")
    end = jnp.where(at >= rows.prompt_lens[:, None], end, _PROMPT_TOKEN)[:, None]
    matches = jnp.all((prefixes == end) | (prefixes == NO_TOKEN), axis=-1)
    last = jnp.where(matches, rows.rules.bad_words[..., -1], NO_TOKEN)
    return _at(logits, last).set(-jnp.inf, mode="drop")


def _has_min_tokens(rules: LogitsRules) -> jax.Array:
    return rules.min_tokens > 0


def _without_stop(logits: jax.Array, rows: _Rows) -> jax.Array:
    stop_ids = jnp.where(rows.is_short[:, None], rows.stop_ids, NO_TOKEN)
    return _at(logits, stop_ids).set(-jnp.inf, mode="drop")


def _has_bias(rules: LogitsRules) -> jax.Array:
    return jnp.any(rules.bias_ids >= 0, axis=-1)


def _biased(logits: jax.Array, rows: _Rows) -> jax.Array:
    return _at(logits, rows.rules.bias_ids).add(rows.rules.biases, mode="drop")


def _has_repetition(rules: LogitsRules) -> jax.Array:
    return rules.repetition_penalty != 1.0


def _less_repetition(logits: jax.Array, rows: _Rows) -> jax.Array:
    penalty = rows.rules.repetition_penalty[:, None]
    token_ids = rows.tokens_where(penalty != 1.0)
    seen = _at(jnp.zeros(logits.shape, bool), token_ids).set(True, mode="drop")
    scaled = jnp.where(logits > 0.0, logits / penalty, logits * penalty)
    return jnp.where(seen, scaled, logits)


def _has_output_penalty(rules: LogitsRules) -> jax.Array:
    return (rules.presence_penalty != 0.0) | (rules.frequency_penalty != 0.0)


def _less_of_the_output(logits: jax.Array, rows: _Rows) -> jax.Array:
    is_output = rows.token_index >= rows.prompt_lens[:, None]
    is_on = _has_output_penalty(rows.rules)[:, None]
    token_ids = rows.tokens_where(is_output & is_on)
    counts = _at(jnp.zeros(logits.shape, jnp.int32), token_ids).add(1, mode="drop")
    frequency = rows.rules.frequency_penalty[:, None] * counts.astype(jnp.float32)
    less = logits - frequency - rows.rules.presence_penalty[:, None]
    return jnp.where(counts > 0, less, logits)


def _at(array: jax.Array, token_ids: jax.Array) -> Any:
    """Return array[s, token_ids[s, i]], to be updated; negative ids fall outside."""
    num_rows, vocab_size = array.shape
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    # As an index of jax a negative number would count from the end.
    return array.at[rows, jnp.where(token_ids < 0, vocab_size, token_ids)]


# In this order: which rows have the rule, and what it does to the logits.
_ORDER = (
    (_has_allowed, _only_allowed),
    (_has_bad_words, _without_bad_words),
    (_has_min_tokens, _without_stop),
    (_has_bias, _biased),
    (_has_repetition, _less_repetition),
    (_has_output_penalty, _less_of_the_output),
)


def _with_room(sizes: RuleSizes) -> list[tuple[Callable, Callable]]:
    """Return the rules of _ORDER that a row of these sizes can have."""
    room = {
        _has_allowed: sizes.num_allowed,
        _has_bad_words: sizes.num_bad_words * sizes.bad_word_len,
        _has_bias: sizes.num_bias,
    }
    return [rule for rule in _ORDER if room.get(rule[0], 1) > 0]


def is_any(rules: LogitsRules) -> jax.Array:
    """Return bool[S]: which rows have any rule, whether or not it acts in this step."""
    rows_with = [has_rule(rules) for has_rule, _ in _with_room(rules.sizes)]
    return functools.reduce(jnp.logical_or, rows_with)


def apply(
    logits: jax.Array,
    rules: LogitsRules,
    tokens: jax.Array,
    prompt_lens: jax.Array,
    num_tokens: jax.Array,
    stop_ids: jax.Array,
) -> jax.Array:
    """Return f32[S, V], the logits after each row's rules, in vLLM's order.

    A forbidden token gets -inf. What a row gets depends on nothing but that row; one
    without rules gets its own logits, bit for bit. Each rule costs only where some
    row has it. A row can end up with -inf everywhere, where bad words of several
    tokens forbid all that is allowed: `check_rules` cannot foresee it.

    Bad words match the output alone, as vLLM's do: a word that the prompt has begun
    may be completed. A word of one token is always masked, and of a longer word the
    last token where the output ends with the ones before it.

    Args:
        logits: f32[S, V] or a narrower float.
        rules: of arrays [S, ...].
        tokens: i32[S, L]; row s has its prompt and output in tokens[s, :num_tokens[s]].
        prompt_lens: i32[S].
        num_tokens: i32[S], prompt and output so far.
        stop_ids: i32[S, E], what ends the row, EOS included; below 0 is padding.

    Raises:
        ValueError: the mask of allowed tokens covers fewer than V tokens.
    """
    rows = _Rows(rules, tokens, prompt_lens, num_tokens, stop_ids)

    def all_rules(logits: jax.Array) -> jax.Array:
        for has_rule, change in _with_room(rules.sizes):
            logits = lax.cond(
                jnp.any(has_rule(rules)),
                lambda logits, change=change: change(logits, rows),
                lambda logits: logits,
                logits,
            )
        return logits

    logits = logits.astype(jnp.float32)
    return lax.cond(jnp.any(is_any(rules)), all_rules, lambda logits: logits, logits)
