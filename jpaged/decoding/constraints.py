"""Constraints: masks the tokens that an automaton does not allow.

Pipeline: structured -> automaton -> [constraints] -> masked logits.

`pool` packs the automata of several requests into arrays. Each row has the index of its
automaton in the pool, and the automaton's state. All functions of rows are pure and
have no loops, and the result for a row depends on that row only.

Shape symbols: S rows, V vocabulary, A automata of a pool, Q states, C token classes, K
allowed sets (shared by states that allow the same tokens), W words of a bit mask.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.automaton import DEAD, EOS_CLASS, TokenAutomaton
from jpaged.decoding.bit_masks import num_words, power_of_two, unpack

UNCONSTRAINED = -1  # automaton index of a row without a constraint


@dataclasses.dataclass(frozen=True)
class AutomataSizes:
    """Capacities of a pool; they are shapes, so every new value is compiled."""

    vocab_size: int = 0  # V
    num_automata: int = 0  # A
    num_states: int = 0  # Q
    num_classes: int = 0  # C
    num_allowed_sets: int = 0  # K

    @classmethod
    def of(cls, automata: Sequence[TokenAutomaton | None]) -> "AutomataSizes":
        """Sizes that `automata` need, as powers of two, so that few sizes occur.

        >>> AutomataSizes(num_states=4).grown(AutomataSizes(num_classes=2))
        AutomataSizes(vocab_size=0, num_automata=0, num_states=4, num_classes=2,
                      num_allowed_sets=0)
        """
        given = [automaton for automaton in automata if automaton is not None]
        if not given:
            return cls()
        return cls(
            vocab_size=max(automaton.vocab_size for automaton in given),
            num_automata=power_of_two(len(automata)),
            num_states=power_of_two(max(a.num_states for a in given)),
            num_classes=power_of_two(max(a.num_classes for a in given)),
            num_allowed_sets=power_of_two(max(len(a.allowed_sets[1]) for a in given)),
        )

    def grown(self, other: "AutomataSizes") -> "AutomataSizes":
        """Elementwise maximum of two sizes."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return AutomataSizes(*map(max, pairs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automata:
    """Several automata as arrays, padded to `AutomataSizes`.

    No transition leads to a padding state, and no token has a padding class.
    """

    classes: jax.Array  # i16[A, V]
    transitions: jax.Array  # i16[A, Q, C]
    is_accepting: jax.Array  # bool[A, Q]
    set_of_state: jax.Array  # i16[A, Q], index of the state's allowed set
    allowed_sets: jax.Array  # u32[A, K, W], see `bit_masks`


def pool(automata: Sequence[TokenAutomaton | None], sizes: AutomataSizes) -> Automata:
    """Packs automata into numpy arrays.

    Args:
      automata: Automata for one vocabulary, each packed at its index; None leaves its
        index empty.
      sizes: Capacities, which need not be powers of two.

    Raises:
      ValueError: The automata exceed `sizes`, or their vocabularies differ.
    """
    num_automata, num_states = sizes.num_automata, sizes.num_states
    arrays: dict[str, Any] = dict(
        classes=np.zeros((num_automata, sizes.vocab_size), np.int16),
        transitions=np.full(
            (num_automata, num_states, sizes.num_classes), DEAD, np.int16
        ),
        is_accepting=np.zeros((num_automata, num_states), np.bool_),
        set_of_state=np.zeros((num_automata, num_states), np.int16),
        allowed_sets=np.zeros(
            (num_automata, sizes.num_allowed_sets, num_words(sizes.vocab_size)),
            np.uint32,
        ),
    )
    if len(automata) > num_automata:
        raise ValueError(
            f"sizes: expected num_automata of at least {len(automata)}, got "
            f"{num_automata}; grow it by AutomataSizes.of"
        )
    for a, automaton in enumerate(automata):
        if automaton is None:
            continue
        _check_capacity(automaton, sizes)
        q, c = automaton.transitions.shape
        set_of_state, sets = automaton.allowed_sets
        arrays["classes"][a] = automaton.classes
        arrays["transitions"][a, :q, :c] = automaton.transitions
        arrays["is_accepting"][a, :q] = automaton.is_accepting
        arrays["set_of_state"][a, :q] = set_of_state
        arrays["allowed_sets"][a, : len(sets)] = sets
    return Automata(**arrays)


def _check_capacity(automaton: TokenAutomaton, sizes: AutomataSizes) -> None:
    if automaton.vocab_size != sizes.vocab_size:
        raise ValueError(
            f"sizes: expected vocab_size {automaton.vocab_size} for an automaton, got "
            f"{sizes.vocab_size}"
        )
    needed = {
        "num_states": automaton.num_states,
        "num_classes": automaton.num_classes,
        "num_allowed_sets": len(automaton.allowed_sets[1]),
    }
    for name, number in needed.items():
        if number > getattr(sizes, name):
            raise ValueError(
                f"sizes: expected {name} of at least {number} for this automaton, got "
                f"{getattr(sizes, name)}; grow it by AutomataSizes.of"
            )


def allowed(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Tokens that are allowed next in each row, bool[S, V].

    Args:
      automata: A pool for a vocabulary of V tokens.
      index: i32[S], the row's automaton; UNCONSTRAINED allows every token.
      state: i32[S], the automaton's state; DEAD allows no token.
    """
    num_rows, vocab_size = len(index), automata.classes.shape[1]
    if 0 in automata.transitions.shape:
        return jnp.ones((num_rows, vocab_size), bool)
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    words_SW = automata.allowed_sets[a, automata.set_of_state[a, q]]
    words_SW = jnp.where((state == DEAD)[:, None], jnp.uint32(0), words_SW)
    is_free = (index == UNCONSTRAINED)[:, None]
    words_SW = jnp.where(is_free, ~jnp.uint32(0), words_SW)
    return unpack(words_SW, vocab_size)


def mask(
    logits: jax.Array, automata: Automata, index: jax.Array, state: jax.Array
) -> jax.Array:
    """Sets the logits of tokens that are not allowed to -inf.

    The logits of an unconstrained row do not change.

    Args:
      logits: f32[S, V].
      automata: As in `allowed`.
      index: As in `allowed`.
      state: As in `allowed`.

    Returns:
      f32[S, V].

    Raises:
      ValueError: The pool is for another vocabulary.
    """
    if 0 in automata.transitions.shape:
        return logits
    vocab_size = automata.classes.shape[1]
    if vocab_size != logits.shape[1]:
        raise ValueError(
            f"automata: expected a pool for {logits.shape[1]} tokens, as the logits "
            f"have, got one for {vocab_size}"
        )
    return jnp.where(allowed(automata, index, state), logits, -jnp.inf)


def next_states(
    automata: Automata, index: jax.Array, state: jax.Array, tokens: jax.Array
) -> jax.Array:
    """The state of each row after one more token, i32[S].

    The state is DEAD after a token that was not allowed, and stays DEAD. EOS does not
    change an accepting state. The state of an unconstrained row does not change.

    Args:
      automata: As in `allowed`.
      index: As in `allowed`.
      state: As in `allowed`.
      tokens: i32[S], the token of each row, in the vocabulary.
    """
    if 0 in automata.transitions.shape:
        return state
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    reached = automata.transitions[a, q, automata.classes[a, tokens]]
    reached = jnp.where(state == DEAD, DEAD, reached.astype(jnp.int32))
    return jnp.where(index == UNCONSTRAINED, state, reached)


def is_dead_end(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Whether no token is allowed next in a row, bool[S]; False without a constraint.

    `token_automaton` removes dead ends, so only DEAD is one. A row gets there by a
    token that was not allowed, because other rules of the request forbid the allowed
    tokens.
    """
    del automata  # every automaton has the same DEAD
    return (index != UNCONSTRAINED) & (state == DEAD)


def is_complete(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Whether a row's text is complete and only EOS may follow, bool[S]."""
    if 0 in automata.transitions.shape:
        return jnp.zeros(len(index), bool)
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    can_continue = jnp.any(automata.transitions[a, q, EOS_CLASS + 1 :] != DEAD, axis=-1)
    is_end = automata.is_accepting[a, q] & ~can_continue & (state != DEAD)
    return is_end & (index != UNCONSTRAINED)
