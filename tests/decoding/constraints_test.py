"""Token automata and constraints against a search of the table in plain Python.

The slow model (`Slow`) never trims, merges or packs: for each token it searches the
table for an accepting state.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from jpaged.decoding import automaton as automaton_module
from jpaged.decoding import constraints
from jpaged.decoding.automaton import DEAD, EOS_CLASS, shortest, token_automaton
from jpaged.decoding.constraints import UNCONSTRAINED, Automata, AutomataSizes, pool

EOS = 0
VOCAB = 6


@dataclasses.dataclass
class Slow:
    """A table of tokens that is searched for each question."""

    table: np.ndarray  # int[Q, V]
    accepting: set[int]
    eos: set[int]

    def next(self, state: int, token: int) -> int:
        return DEAD if token in self.eos else int(self.table[state, token])

    def distance(self, state: int) -> float:
        """Fewest tokens to an accepting state."""
        seen, frontier, steps = {state}, [state], 0
        while frontier:
            if set(frontier) & self.accepting:
                return steps
            tokens = range(self.table.shape[1])
            found = {self.next(q, t) for q in frontier for t in tokens} - {DEAD} - seen
            seen |= found
            frontier, steps = sorted(found), steps + 1
        return float("inf")

    def allows(self, state: int, token: int) -> bool:
        if token in self.eos:
            return state in self.accepting
        reached = self.next(state, token)
        return reached != DEAD and self.distance(reached) < float("inf")

    def allowed(self, state: int) -> list[bool]:
        return [self.allows(state, token) for token in range(self.table.shape[1])]


def random_table(seed: int, num_states: int | None = None) -> Slow:
    rng = np.random.default_rng(seed)
    num_states = num_states or int(rng.integers(1, 7))
    table = rng.integers(0, num_states, (num_states, VOCAB))
    table[rng.random(table.shape) < rng.choice([0.3, 0.7])] = DEAD
    accepting = set(np.flatnonzero(rng.random(num_states) < 0.3).tolist())
    return Slow(table, accepting, {EOS})


def built(slow: Slow):
    is_accepting = [q in slow.accepting for q in range(len(slow.table))]
    return token_automaton(slow.table, is_accepting, sorted(slow.eos))


def step(automaton, state: int, token: int) -> int:
    return int(automaton.transitions[state, automaton.classes[token]])


def usable(num: int, start: int = 0) -> list[Slow]:
    """Tables that allow some text, from consecutive seeds."""
    found = []
    while len(found) < num:
        slow = random_table(start)
        if slow.distance(0) < float("inf"):
            found.append(slow)
        start += 1
    return found


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.integers(0, 10**6), st.lists(st.integers(0, VOCAB - 1)))
def test_a_token_is_allowed_if_and_only_if_the_text_can_be_completed(seed, tokens):
    slow = random_table(seed)
    if slow.distance(0) == float("inf"):
        with pytest.raises(ValueError, match="cannot be met with this vocabulary"):
            built(slow)
        return
    automaton = built(slow)
    assert shortest(automaton) == slow.distance(0) + 1
    state, slow_state = 0, 0
    for token in tokens:
        now = [step(automaton, state, t) != DEAD for t in range(VOCAB)]
        assert now == slow.allowed(slow_state)
        assert bool(automaton.is_accepting[state]) == (slow_state in slow.accepting)
        if token != EOS and now[token]:
            state, slow_state = (
                step(automaton, state, token),
                slow.next(slow_state, token),
            )


def test_every_remaining_state_is_reachable_and_can_end():
    for slow in usable(40):
        automaton = built(slow)
        rest = Slow(
            automaton.transitions[:, automaton.classes],
            set(np.flatnonzero(automaton.is_accepting).tolist()),
            {EOS},
        )
        for state in range(automaton.num_states):
            assert rest.distance(state) < float("inf")
            target = dataclasses.replace(rest, accepting={state})
            assert target.distance(0) < float("inf")


def test_tokens_with_equal_columns_share_a_class_without_eos():
    #            eos  a  b  c  d
    table = [[DEAD, 1, 1, 0, DEAD], [DEAD, 1, 1, 0, DEAD]]
    automaton = token_automaton(table, [False, True], [0])
    a, b, c, d = automaton.classes[1:]
    assert automaton.classes[0] == EOS_CLASS
    assert a == b
    assert len({EOS_CLASS, a, c, d}) == automaton.num_classes == 4
    assert automaton.transitions[:, EOS_CLASS].tolist() == [DEAD, 1]
    # The same with given classes and two EOS tokens.
    columns = [[DEAD, 1, 0], [DEAD, 1, 0]]
    again = token_automaton(columns, [False, True], [0, 4], [2, 1, 1, 2, 0])
    assert again.classes[[0, 4]].tolist() == [EOS_CLASS, EOS_CLASS]
    assert again.classes[1] == again.classes[2] != again.classes[3]


def test_a_large_table_is_merged_and_trimmed_within_seconds():
    rng = np.random.default_rng(0)
    columns = rng.integers(-1, 300, (300, 50))
    classes = rng.integers(0, 50, 128_256)
    automaton = token_automaton(
        columns[:, classes], np.arange(300) == 7, [5], classes=None
    )
    assert automaton.num_classes <= 51
    assert automaton.allowed_sets[1].shape[1] == 128_256 // 32


@pytest.mark.parametrize(
    ("table", "accepting", "eos", "message"),
    [
        ([[1, 1], [1, 1]], [False, False], [0], "cannot be met with this vocabulary"),
        ([[DEAD, DEAD]], [False], [0], "cannot be met with this vocabulary"),
        # Only EOS leads to the accepting state.
        ([[1, DEAD], [DEAD] * 2], [False, True], [0], "cannot be met"),
        (
            [[DEAD, 0]],
            [True],
            [],
            r"eos_token_ids: expected at least one id, .* got \[\]",
        ),
        ([[DEAD, 0]], [True], [2], r"below the vocabulary's size 2, got \[2\]"),
        (
            [[DEAD, 1]],
            [True],
            [0],
            "transitions: expected numbers from -1 to 0, got -1",
        ),
        ([[DEAD, 0]], [True, True], [0], r"shapes \[Q, C\] and \[Q\], got \(1, 2\)"),
    ],
)
def test_an_invalid_table_or_one_that_allows_no_text_is_refused(
    table, accepting, eos, message
):
    with pytest.raises(ValueError, match=message):
        token_automaton(np.array(table), np.array(accepting), eos)


def test_more_states_than_int16_allows_are_refused():
    chain = np.arange(1, np.iinfo(np.int16).max + 3)[:, None]
    table = np.concatenate([np.full_like(chain, DEAD), chain], axis=1)
    table[-1] = DEAD
    with pytest.raises(ValueError, match="expected at most 32767 states and token cla"):
        token_automaton(table, np.arange(len(table)) == len(table) - 1, [0])


# On the device: rows of several automata in one pool.

TABLES = usable(3, start=100)
ROWS = [(a, q) for a in (0, 1, 2) for q in (-1, 0, 1, 2, 3, 4)] + [(-1, 0), (-1, -1)]


def rows_of(automata) -> tuple[jax.Array, jax.Array]:
    rows = [(a, q) for a, q in ROWS if a < 0 or q < automata[a].num_states]
    index, state = np.array(rows, np.int32).T
    return jnp.asarray(index), jnp.asarray(state)


def on_device(automata, sizes=None) -> Automata:
    packed = pool(automata, sizes or AutomataSizes.of(automata))
    return jax.tree.map(jnp.asarray, packed)


def differences() -> list[str]:
    """Differences between the functions of rows and automata read in plain Python."""
    wrong = []
    automata = [built(slow) for slow in TABLES]
    packed = on_device(automata)
    index, state = rows_of(automata)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(len(index), VOCAB)))
    logits = logits.astype(jnp.float32).at[0, 0].set(-0.0).at[-1, 0].set(-0.0)
    # New functions, so that a planted fault is compiled.
    masked = jax.jit(lambda *a: constraints.mask(*a))(logits, packed, index, state)
    complete = jax.jit(lambda *a: constraints.is_complete(*a))(packed, index, state)
    dead = jax.jit(lambda *a: constraints.is_dead_end(*a))(packed, index, state)
    reached = [
        jax.jit(lambda *a: constraints.next_states(*a))(
            packed, index, state, jnp.full_like(index, token)
        )
        for token in range(VOCAB)
    ]
    for s, (a, q) in enumerate(zip(index.tolist(), state.tolist(), strict=True)):
        if a == UNCONSTRAINED:
            expected, ends, is_dead = [q] * VOCAB, False, False
            keeps = [True] * VOCAB
        else:
            expected = [DEAD] * VOCAB
            if q != DEAD:
                expected = [step(automata[a], q, token) for token in range(VOCAB)]
            keeps = [reached != DEAD for reached in expected]
            is_dead = not any(keeps)
            ends = keeps[EOS] and sum(keeps) == 1
        got = [int(reached[token][s]) for token in range(VOCAB)]
        where = np.where(keeps, logits[s], np.float32(-np.inf))
        if masked[s].tobytes() != where.tobytes():
            wrong.append(f"row {s}: mask")
        if got != expected:
            wrong.append(f"row {s}: next states {got}, expected {expected}")
        if bool(complete[s]) != ends or bool(dead[s]) != is_dead:
            wrong.append(f"row {s}: complete {complete[s]}, dead end {dead[s]}")
    # The automata themselves, in every reachable state of the table.
    for a, slow in enumerate(TABLES):
        state_of, todo = {0: 0}, [0]
        while todo:
            slow_state = todo.pop()
            expected, own = slow.allowed(slow_state), state_of[slow_state]
            got = constraints.allowed(packed, jnp.int32([a]), jnp.int32([own]))[0]
            if got.tolist() != expected:
                wrong.append(f"automaton {a}, state {slow_state}: allowed")
            for token in np.flatnonzero(expected[1:]) + 1:
                reached = slow.next(slow_state, token)
                if reached not in state_of:
                    state_of[reached] = step(automata[a], own, token)
                    todo.append(reached)
    return wrong


def test_rows_are_masked_and_advanced_as_by_plain_python():
    assert differences() == []
    automata = [built(slow) for slow in TABLES]
    index, state = rows_of(automata)
    complete = constraints.is_complete(on_device(automata), index, state)
    assert jnp.any(complete)  # at least one of the rows is complete
    assert len(index) > 8


def test_rows_depend_neither_on_each_other_nor_on_the_pool_s_capacity():
    automata = [built(slow) for slow in TABLES]
    index, state = rows_of(automata)
    sizes = AutomataSizes.of(automata)
    more = AutomataSizes(VOCAB, 8, 64, 32, 128)
    assert sizes.grown(more) == more
    small = on_device(automata)
    # An empty index in the middle, and further automata at the end.
    large = on_device([automata[0], None, *automata[1:], automata[0]], more)
    moved = jnp.where(index > 0, index + 1, index)
    tokens = jnp.arange(len(index), dtype=jnp.int32) % VOCAB
    for name, arguments in (
        ("allowed", ()),
        ("next_states", (tokens,)),
        ("is_complete", ()),
        ("is_dead_end", ()),
    ):
        function = getattr(constraints, name)
        expected = jax.jit(function)(small, index, state, *arguments)
        assert expected.dtype == {"next_states": jnp.int32}.get(name, jnp.bool_)
        got = jax.jit(function)(large, moved, state, *arguments)
        np.testing.assert_array_equal(got, expected)

        def one(index, state, *arguments, function=function):
            rest = (argument[None] for argument in arguments)
            return function(small, index[None], state[None], *rest)[0]

        mapped = jax.vmap(one)(index, state, *arguments)
        np.testing.assert_array_equal(mapped, expected)


def test_without_automata_logits_and_states_do_not_change():
    empty = on_device([])
    logits, rows = jnp.ones((2, VOCAB)), jnp.array([-1, -1])
    assert constraints.mask(logits, empty, rows, rows) is logits
    assert constraints.next_states(empty, rows, rows, rows) is rows
    assert not constraints.is_complete(empty, rows, rows).any()
    assert not constraints.is_dead_end(empty, rows, rows).any()
    assert AutomataSizes.of([None]) == AutomataSizes()


@pytest.mark.parametrize("vocab_size", [31, 32, 33, 100])
def test_masks_are_right_for_vocabularies_that_do_not_fill_their_words(vocab_size):
    rng = np.random.default_rng(vocab_size)
    table = np.where(rng.random((1, vocab_size)) < 0.5, 0, DEAD)
    automaton = token_automaton(table, [True], [3])
    expected = (table[0] == 0) | (np.arange(vocab_size) == 3)
    got = constraints.allowed(on_device([automaton]), jnp.int32([0]), jnp.int32([0]))
    np.testing.assert_array_equal(got[0], expected)


def test_too_small_sizes_and_another_vocabulary_are_refused():
    automaton = built(TABLES[0])
    sizes = AutomataSizes.of([automaton])
    for name in ("num_states", "num_classes", "num_allowed_sets"):
        with pytest.raises(ValueError, match=f"sizes: expected {name} of at least"):
            pool([automaton], dataclasses.replace(sizes, **{name: 0}))
    with pytest.raises(ValueError, match="expected num_automata of at least 2, got 1"):
        pool([automaton, automaton], sizes)
    with pytest.raises(ValueError, match=r"sizes: expected vocab_size 6.*got 7"):
        pool([automaton], dataclasses.replace(sizes, vocab_size=7))
    rows = jnp.int32([0])
    with pytest.raises(ValueError, match=r"a pool for 9 tokens, .* got one for"):
        constraints.mask(jnp.ones((1, 9)), on_device([automaton]), rows, rows)


def eos_anywhere(build, *arguments, **settings):
    automaton = build(*arguments, **settings)
    transitions = automaton.transitions.copy()
    transitions[:, EOS_CLASS] = np.arange(len(transitions))
    return dataclasses.replace(automaton, transitions=transitions)


def other_bit_order(function, automata, index, state):
    return function(automata, index, state)[:, ::-1]


def another_automaton(function, automata, index, *arguments):
    return function(automata, jnp.maximum(index - 1, -1), *arguments)


def dead_is_the_last_state(function, automata, index, state, *arguments):
    return function(automata, index, jnp.maximum(state, 0), *arguments)


def nothing_is_dead(live, transitions, is_accepting):
    return np.ones_like(live(transitions, is_accepting))


@pytest.mark.parametrize(
    ("module", "name", "change"),
    [
        (constraints, "allowed", other_bit_order),
        (constraints, "allowed", another_automaton),
        (constraints, "allowed", dead_is_the_last_state),
        (constraints, "next_states", another_automaton),
        (constraints, "next_states", dead_is_the_last_state),
        (constraints, "is_complete", dead_is_the_last_state),
        (constraints, "is_complete", another_automaton),
        (constraints, "is_dead_end", dead_is_the_last_state),
        (automaton_module, "_live_states", nothing_is_dead),
    ],
)
def test_a_planted_fault_is_found(monkeypatch, module, name, change):
    changed = functools.partial(change, getattr(module, name))
    monkeypatch.setattr(module, name, changed)
    assert differences() != []


def test_eos_in_a_state_that_is_not_accepting_is_found(monkeypatch):
    changed = functools.partial(eos_anywhere, token_automaton)
    monkeypatch.setitem(globals(), "token_automaton", changed)
    assert differences() != []
