"""Constraints: the logits of tokens that an automaton does not allow become -inf.

Place on the road: structured -> automaton -> [constraints] -> masked logits.

`pool` packs the automata of several requests into arrays; a row has the index of its
automaton in the pool, and the state it is in. All functions of rows are pure, without
loops, and each row's result depends on that row alone.

Shape letters: S rows, V vocabulary, A automata of a pool, Q states, C token classes,
K allowed sets (states that allow the same tokens share one), W words of a bit mask.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.automaton import (
    DEAD,
    EOS_CLASS,
    MASK_BITS,
    TokenAutomaton,
    num_words,
)

UNCONSTRAINED = -1  # the index of a row without a constraint


@dataclasses.dataclass(frozen=True)
class AutomataSizes:
    """Capacities of a pool. They are shapes, so each new value compiles anew."""

    vocab_size: int = 0  # V
    num_automata: int = 0  # A
    num_states: int = 0  # Q
    num_classes: int = 0  # C
    num_allowed_sets: int = 0  # K

    @classmethod
    def of(cls, automata: Sequence[TokenAutomaton | None]) -> "AutomataSizes":
        """Return what `automata` need, as powers of two, so that few sizes occur.

        >>> AutomataSizes(num_states=4).grown(AutomataSizes(num_classes=2))
        AutomataSizes(vocab_size=0, num_automata=0, num_states=4, num_classes=2,
                      num_allowed_sets=0)
        """
        given = [automaton for automaton in automata if automaton is not None]
        if not given:
            return cls()
        return cls(
            vocab_size=max(automaton.vocab_size for automaton in given),
            num_automata=_power_of_two(len(automata)),
            num_states=_power_of_two(max(a.num_states for a in given)),
            num_classes=_power_of_two(max(a.num_classes for a in given)),
            num_allowed_sets=_power_of_two(max(len(a.allowed_sets[1]) for a in given)),
        )

    def grown(self, other: "AutomataSizes") -> "AutomataSizes":
        """Return the least sizes that have room for both."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return AutomataSizes(*map(max, pairs))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length() if number else 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Automata:
    """Several automata as arrays, padded to `AutomataSizes`; rows point into it.

    Padding is never reached: no transition leads to it, and no token has its classes.
    """

    classes: jax.Array | np.ndarray  # i16[A, V]
    transitions: jax.Array | np.ndarray  # i16[A, Q, C]
    is_accepting: jax.Array | np.ndarray  # bool[A, Q]
    set_of_state: jax.Array | np.ndarray  # i16[A, Q], which allowed set a state has
    allowed_sets: (
        jax.Array | np.ndarray
    )  # u32[A, K, W], bit v % 32 of word v // 32: token v


def pool(automata: Sequence[TokenAutomaton | None], sizes: AutomataSizes) -> Automata:
    """Return numpy arrays with automaton a at index a; None leaves a place empty.

    Args:
        automata: as many as wanted, all for one vocabulary.
        sizes: at least `AutomataSizes.of(automata)`, apart from powers of two.

    Raises:
        ValueError: `sizes` has no room for them, or vocabularies differ.
    """
    num_automata, num_states = sizes.num_automata, sizes.num_states
    packed = Automata(
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
            f"sizes: wanted num_automata of at least {len(automata)}, got "
            f"{num_automata}; grow it by AutomataSizes.of"
        )
    for a, automaton in enumerate(automata):
        if automaton is None:
            continue
        _check_room(automaton, sizes)
        q, c = automaton.transitions.shape
        set_of_state, sets = automaton.allowed_sets
        packed.classes[a] = automaton.classes
        packed.transitions[a, :q, :c] = automaton.transitions
        packed.is_accepting[a, :q] = automaton.is_accepting
        packed.set_of_state[a, :q] = set_of_state
        packed.allowed_sets[a, : len(sets)] = sets
    return packed


def _check_room(automaton: TokenAutomaton, sizes: AutomataSizes) -> None:
    if automaton.vocab_size != sizes.vocab_size:
        raise ValueError(
            f"sizes: wanted vocab_size {automaton.vocab_size}, the automaton's, got "
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
                f"sizes: wanted {name} of at least {number} for this automaton, got "
                f"{getattr(sizes, name)}; grow it by AutomataSizes.of"
            )


def allowed(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Return bool[S, V]: the tokens that row s may take next.

    Args:
        automata: a pool for the vocabulary of V tokens.
        index: i32[S], the row's automaton; UNCONSTRAINED allows every token.
        state: i32[S], its state; DEAD allows none.
    """
    num_rows, vocab_size = len(index), automata.classes.shape[1]
    if 0 in automata.transitions.shape:
        return jnp.ones((num_rows, vocab_size), bool)
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    words_SW = automata.allowed_sets[a, automata.set_of_state[a, q]]
    words_SW = jnp.where((state == DEAD)[:, None], jnp.uint32(0), words_SW)
    is_free = (index == UNCONSTRAINED)[:, None]
    words_SW = jnp.where(is_free, ~jnp.uint32(0), words_SW)
    # A token's bit stands where it is: there is no gather over the vocabulary.
    places = jnp.arange(MASK_BITS, dtype=jnp.uint32)[None, None, :]
    bits = (words_SW[:, :, None] >> places) & jnp.uint32(1)
    return (bits != 0).reshape(num_rows, -1)[:, :vocab_size]


def mask(
    logits: jax.Array, automata: Automata, index: jax.Array, state: jax.Array
) -> jax.Array:
    """Return f32[S, V]: `logits`, with -inf for tokens that are not allowed.

    An unconstrained row keeps every bit. Arguments as in `allowed`; logits f32[S, V].

    Raises:
        ValueError: the pool is for another vocabulary.
    """
    if 0 in automata.transitions.shape:
        return logits
    vocab_size = automata.classes.shape[1]
    if vocab_size != logits.shape[1]:
        raise ValueError(
            f"automata: wanted a pool for the logits' vocabulary of {logits.shape[1]} "
            f"tokens, got one for {vocab_size}"
        )
    return jnp.where(allowed(automata, index, state), logits, -jnp.inf)


def advance(
    automata: Automata, index: jax.Array, state: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Return i32[S]: the state after row s took tokens[s].

    DEAD after a token that was not allowed, and after DEAD. EOS keeps an accepting
    state. An unconstrained row keeps its state.

    Args:
        automata, index, state: as in `allowed`.
        tokens: i32[S], each in the vocabulary.
    """
    if 0 in automata.transitions.shape:
        return state
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    reached = automata.transitions[a, q, automata.classes[a, tokens]]
    reached = jnp.where(state == DEAD, DEAD, reached.astype(jnp.int32))
    return jnp.where(index == UNCONSTRAINED, state, reached)


def is_dead_end(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Return bool[S]: no token is allowed next; never so without a constraint.

    `token_automaton` leaves no such state, so this is DEAD: the row took a token that
    was not allowed, because other rules of the request forbade those that were.
    """
    del automata  # the same for every automaton
    return (index != UNCONSTRAINED) & (state == DEAD)


def is_complete(automata: Automata, index: jax.Array, state: jax.Array) -> jax.Array:
    """Return bool[S]: the text is complete, and nothing but EOS can follow."""
    if 0 in automata.transitions.shape:
        return jnp.zeros(len(index), bool)
    a, q = jnp.maximum(index, 0), jnp.maximum(state, 0)
    goes_on = jnp.any(automata.transitions[a, q, EOS_CLASS + 1 :] != DEAD, axis=-1)
    is_end = automata.is_accepting[a, q] & ~goes_on & (state != DEAD)
    return is_end & (index != UNCONSTRAINED)
