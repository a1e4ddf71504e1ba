"""Applies the logits rules of requests: forbidden tokens, biases and penalties.

Pipeline: logits -> [rules] -> sample.

The rules and their order are vLLM's; temperature and filters follow after them:

    allowed_token_ids -> bad_words -> min_tokens -> logit_bias
        -> repetition_penalty -> frequency_penalty -> presence_penalty

A rule depends only on the row's own parameters and tokens, so the logits of a preempted
row are the same after recomputation.

Shape symbols: S rows, L tokens of the longest sequence, V vocabulary, E stop ids.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.decoding.bit_masks import MASK_BITS, unpack
from jpaged.decoding.rule_arrays import NO_TOKEN, LogitsRules, RuleSizes

_PROMPT_TOKEN = -2  # replaces prompt tokens, which no bad word matches


class _RuleInputs(NamedTuple):
    """The inputs of the rules in a step."""

    rules: LogitsRules
    tokens: jax.Array  # i32[S, L]
    prompt_lens: jax.Array  # i32[S]
    num_tokens: jax.Array  # i32[S]
    stop_ids: jax.Array  # i32[S, E]

    @property
    def is_short(self) -> jax.Array:
        """Whether fewer than min_tokens tokens were generated, bool[S]."""
        return self.num_tokens - self.prompt_lens < self.rules.min_tokens

    @property
    def token_index(self) -> jax.Array:
        """Index of each token in its sequence, i32[1, L]."""
        return jnp.arange(self.tokens.shape[1], dtype=jnp.int32)[None]

    def tokens_where(self, chosen: jax.Array) -> jax.Array:
        """The known tokens that are `chosen` (bool[S, L]), else NO_TOKEN; i32[S, L]."""
        is_token = self.token_index < self.num_tokens[:, None]
        return jnp.where(is_token & chosen, self.tokens, NO_TOKEN)


def _has_allowed(rules: LogitsRules) -> jax.Array:
    return rules.has_allowed


def _mask_other_tokens(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    words, vocab_size = rows.rules.allowed, logits.shape[1]
    covered = words.shape[1] * MASK_BITS
    if covered < vocab_size:
        raise ValueError(
            f"rules: expected a mask of at least {vocab_size} tokens, as many as there "
            f"are logits, got one of {covered}"
        )
    is_allowed = unpack(words, vocab_size) | ~rows.rules.has_allowed[:, None]
    return jnp.where(is_allowed, logits, -jnp.inf)


def _has_bad_words(rules: LogitsRules) -> jax.Array:
    return jnp.any(rules.bad_words[..., -1] >= 0, axis=-1)


def _mask_bad_words(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    prefixes = rows.rules.bad_words[..., :-1]
    steps_back = jnp.arange(prefixes.shape[-1], 0, -1, dtype=jnp.int32)
    index = rows.num_tokens[:, None] - steps_back[None]
    end = jnp.take_along_axis(rows.tokens, index, axis=1, mode="clip")
    end = jnp.where(index >= rows.prompt_lens[:, None], end, _PROMPT_TOKEN)[:, None]
    matches = jnp.all((prefixes == end) | (prefixes == NO_TOKEN), axis=-1)
    last = jnp.where(matches, rows.rules.bad_words[..., -1], NO_TOKEN)
    return _at(logits, last).set(-jnp.inf, mode="drop")


def _has_min_tokens(rules: LogitsRules) -> jax.Array:
    return rules.min_tokens > 0


def _mask_stop_tokens(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    stop_ids = jnp.where(rows.is_short[:, None], rows.stop_ids, NO_TOKEN)
    return _at(logits, stop_ids).set(-jnp.inf, mode="drop")


def _has_bias(rules: LogitsRules) -> jax.Array:
    return jnp.any(rules.bias_ids >= 0, axis=-1)


def _add_bias(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    return _at(logits, rows.rules.bias_ids).add(rows.rules.biases, mode="drop")


def _has_repetition(rules: LogitsRules) -> jax.Array:
    return rules.repetition_penalty != 1.0


def _penalise_repetition(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    penalty = rows.rules.repetition_penalty[:, None]
    token_ids = rows.tokens_where(penalty != 1.0)
    seen = _at(jnp.zeros(logits.shape, bool), token_ids).set(True, mode="drop")
    scaled = jnp.where(logits > 0.0, logits / penalty, logits * penalty)
    return jnp.where(seen, scaled, logits)


def _has_output_penalty(rules: LogitsRules) -> jax.Array:
    return (rules.presence_penalty != 0.0) | (rules.frequency_penalty != 0.0)


def _penalise_output(logits: jax.Array, rows: _RuleInputs) -> jax.Array:
    is_output = rows.token_index >= rows.prompt_lens[:, None]
    is_on = _has_output_penalty(rows.rules)[:, None]
    token_ids = rows.tokens_where(is_output & is_on)
    counts = _at(jnp.zeros(logits.shape, jnp.int32), token_ids).add(1, mode="drop")
    frequency = rows.rules.frequency_penalty[:, None] * counts.astype(jnp.float32)
    less = logits - frequency - rows.rules.presence_penalty[:, None]
    return jnp.where(counts > 0, less, logits)


def _at(array: jax.Array, token_ids: jax.Array) -> Any:
    """The updatable elements array[s, token_ids[s, i]]; negative ids are dropped."""
    num_rows, vocab_size = array.shape
    rows = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    # In jax a negative index counts from the end.
    return array.at[rows, jnp.where(token_ids < 0, vocab_size, token_ids)]


# The rules in order: which rows have the rule, and how it changes the logits.
_ORDER = (
    (_has_allowed, _mask_other_tokens),
    (_has_bad_words, _mask_bad_words),
    (_has_min_tokens, _mask_stop_tokens),
    (_has_bias, _add_bias),
    (_has_repetition, _penalise_repetition),
    (_has_output_penalty, _penalise_output),
)


def _possible_rules(
    sizes: RuleSizes,
) -> list[tuple[Callable[..., jax.Array], Callable[..., jax.Array]]]:
    """The rules of _ORDER that rows of these sizes can have."""
    capacity: dict[Any, int] = {
        _has_allowed: sizes.num_allowed,
        _has_bad_words: sizes.num_bad_words * sizes.bad_word_len,
        _has_bias: sizes.num_bias,
    }
    return [rule for rule in _ORDER if capacity.get(rule[0], 1) > 0]


def is_any(rules: LogitsRules) -> jax.Array:
    """Which rows have any rule, even if it has no effect in this step; bool[S]."""
    rows_with = [has_rule(rules) for has_rule, _ in _possible_rules(rules.sizes)]
    return functools.reduce(jnp.logical_or, rows_with)


def apply(
    logits: jax.Array,
    rules: LogitsRules,
    tokens: jax.Array,
    prompt_lens: jax.Array,
    num_tokens: jax.Array,
    stop_ids: jax.Array,
) -> jax.Array:
    """Applies the rules of each row in vLLM's order.

    Forbidden tokens get -inf. The result of a row depends on that row only, and the
    logits of a row without rules do not change at all. A rule costs time only if some
    row has it. All tokens of a row can be forbidden, if bad words of several tokens
    forbid every allowed token; `check_rules` cannot detect this.

    As in vLLM, bad words match only the output: a word that starts in the prompt may be
    completed. A word of one token is always masked. Of a longer word, the last token is
    masked if the output ends with the tokens before it.

    Args:
      logits: f32[S, V] or a narrower float.
      rules: Arrays with the axis S.
      tokens: i32[S, L]; tokens[s, :num_tokens[s]] are prompt and output of row s.
      prompt_lens: i32[S].
      num_tokens: i32[S], tokens of prompt and output so far.
      stop_ids: i32[S, E], tokens that end the row, including EOS; negative: padding.

    Returns:
      f32[S, V].

    Raises:
      ValueError: The mask of allowed tokens covers fewer than V tokens.
    """
    rows = _RuleInputs(rules, tokens, prompt_lens, num_tokens, stop_ids)

    def all_rules(logits: jax.Array) -> jax.Array:
        for has_rule, change in _possible_rules(rules.sizes):
            logits = lax.cond(
                jnp.any(has_rule(rules)),
                lambda logits, change=change: change(logits, rows),
                lambda logits: logits,
                logits,
            )
        return logits

    logits = logits.astype(jnp.float32)
    return lax.cond(jnp.any(is_any(rules)), all_rules, lambda logits: logits, logits)
