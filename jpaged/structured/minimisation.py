"""Minimisation: the equivalent states of a finite automaton.

Pipeline: byte automaton -> [structured.minimisation] -> smaller byte automaton.

The idea of Hopcroft 1971: when a group of states is split, one part keeps the number of
the group, and only the predecessors of the other parts are looked at again.

Shape symbols: Q states, B classes of bytes.
"""

import numpy as np

DEAD = -1  # no state: no text of the language has this prefix


def equivalent_states(transitions: np.ndarray, is_accepting: np.ndarray) -> np.ndarray:
    """Return the group of equivalent states that each state belongs to, i64[Q].

    States from which no accepting state can be reached get DEAD. The time is
    proportional to Q B log Q in array operations, plus a number of small operations
    that is the longest chain of splits.

    Args:
        transitions: i32[Q, B], the next state or DEAD.
        is_accepting: bool[Q].
    """
    num_states, num_classes = transitions.shape
    source, column = np.nonzero(transitions != DEAD)
    target = transitions[source, column]
    is_live, longest = _longest_texts(num_states, source, target, is_accepting)
    is_kept = is_live[source] & is_live[target]
    source, column, target = source[is_kept], column[is_kept], target[is_kept]
    # Equivalent states have equally long longest texts. This separates most states of
    # bounded repetitions at once, which would otherwise take a round each.
    keys = longest * 2 + is_accepting
    keys[~is_live] = -1
    seed = 0
    while True:
        groups = _refined(
            keys, source, column, target, num_classes, np.random.default_rng(seed)
        )
        groups[~is_live] = DEAD
        if _is_stable(groups, keys, transitions):
            return groups
        seed += 1  # two signatures had the same hash


def _is_stable(groups: np.ndarray, keys: np.ndarray, transitions: np.ndarray) -> bool:
    """Return whether all states of each group have equal keys and successors."""
    _, first, index = np.unique(groups, return_index=True, return_inverse=True)
    example = first[index]
    is_live = groups != DEAD
    reached = np.append(groups, DEAD)[transitions]
    is_equal = (reached == reached[example]).all(axis=1) & (keys == keys[example])
    return bool(is_equal[is_live].all())


def _longest_texts(
    num_states: int, source: np.ndarray, target: np.ndarray, is_accepting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return which states are live, and the length of the longest text from each.

    The length is -1 for states from which texts have no longest length.
    """
    pairs = np.unique(source * np.int64(num_states) + target)
    order = np.argsort(pairs % num_states, kind="stable")
    before = (pairs[order] // num_states).tolist()
    bounds = np.searchsorted(pairs[order] % num_states, np.arange(num_states + 1))
    bounds = bounds.tolist()
    is_live = [False] * num_states
    todo = np.flatnonzero(is_accepting).tolist()
    for state in todo:
        is_live[state] = True
    while todo:
        state = todo.pop()
        for previous in before[bounds[state] : bounds[state + 1]]:
            if not is_live[previous]:
                is_live[previous] = True
                todo.append(previous)
    live = np.array(is_live, np.bool_)
    num_open = np.bincount(
        pairs[live[pairs % num_states]] // num_states, minlength=num_states
    ).tolist()
    height, longest = [0] * num_states, [-1] * num_states
    todo = [state for state in np.flatnonzero(live).tolist() if not num_open[state]]
    while todo:
        state = todo.pop()
        longest[state] = length = height[state]
        for previous in before[bounds[state] : bounds[state + 1]]:
            num_open[previous] -= 1
            height[previous] = max(height[previous], length + 1)
            if not num_open[previous]:
                todo.append(previous)
    return live, np.array(longest, np.int64)


def _refined(
    keys: np.ndarray,
    source: np.ndarray,
    column: np.ndarray,
    target: np.ndarray,
    num_classes: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Split the groups of equal keys until equal groups have equal successors.

    Each state has a hash of the groups of its successors, which is updated for the
    predecessors of states that get another group.
    """
    num_states = len(keys)
    _, groups = np.unique(keys, return_inverse=True)
    groups = groups.reshape(-1)
    factors = rng.integers(1, 2**63, num_classes, dtype=np.uint64) * 2 + 1
    values = rng.integers(1, 2**63, num_states, dtype=np.uint64) * 2 + 1
    hashes = np.zeros(num_states, np.uint64)
    np.add.at(hashes, source, factors[column] * values[groups[target]])
    order = np.argsort(target, kind="stable")
    before, weights = source[order], factors[column[order]]
    bounds = np.searchsorted(target[order], np.arange(num_states + 1))
    sizes = np.bincount(groups, minlength=num_states)
    num_groups = int(groups.max()) + 1
    touched = np.arange(num_states)
    while len(touched):
        # The parts of touched states, by group and hash.
        states = touched[np.lexsort((hashes[touched], groups[touched]))]
        group, value = groups[states], hashes[states]
        is_first = np.append(
            True, (group[1:] != group[:-1]) | (value[1:] != value[:-1])
        )
        starts = np.flatnonzero(is_first)
        lengths, part_group = np.diff(np.append(starts, len(states))), group[starts]
        # Untouched states of a group keep its number; without any, the largest part.
        by_size = np.lexsort((lengths, part_group))
        is_last = np.append(part_group[by_size][1:] != part_group[by_size][:-1], True)
        ends = np.flatnonzero(is_last)
        num_touched = np.add.reduceat(lengths[by_size], np.append(0, ends[:-1] + 1))
        has_rest = sizes[part_group[by_size[ends]]] > num_touched
        is_new = np.ones(len(starts), np.bool_)
        is_new[by_size[ends[~has_rest]]] = False
        numbers = np.where(is_new, num_groups + np.cumsum(is_new) - 1, DEAD)
        number = numbers[np.cumsum(is_first) - 1]
        moved, moved_to = states[number != DEAD], number[number != DEAD]
        num_groups += int(is_new.sum())
        old = groups[moved]
        np.subtract.at(sizes, old, 1)
        np.add.at(sizes, moved_to, 1)
        groups[moved] = moved_to
        counts = bounds[moved + 1] - bounds[moved]
        edges = np.repeat(bounds[moved] - np.cumsum(counts) + counts, counts)
        edges += np.arange(len(edges))
        change = np.repeat(values[moved_to] - values[old], counts)
        np.add.at(hashes, before[edges], weights[edges] * change)
        touched = np.unique(before[edges])
    return groups
