"""Random texts of a constraint: walks through its automaton, with the bundled model's
tokenizer unless told otherwise."""

import numpy as np

from jpaged.decoding.automaton import DEAD, EOS_CLASS
from jpaged.models.loading import sources
from jpaged.structured import compile_constraint
from jpaged.text.tokenizer import Tokenizer

TINY = Tokenizer.from_folder(sources.bundled_path("tiny-python"))
TINY_EOS = 1


def automaton_of(params, tokenizer=TINY, eos=(TINY_EOS,), **settings):
    return compile_constraint(params, tokenizer, tokenizer.vocab_size, eos, **settings)


def step(automaton, state: int, token: int) -> int:
    return int(automaton.transitions[state, automaton.classes[token]])


def walk(automaton, rng, most: int = 60) -> list[int]:
    """Tokens taken at random among the allowed ones, up to EOS, which is left out.

    After `most` tokens the walk prefers tokens that lead nearer to the end.
    """
    distance = distances(automaton)
    tokens, state = [], 0
    while True:
        reached = automaton.transitions[state][automaton.classes]
        can = np.flatnonzero(reached != DEAD)
        assert len(can)
        if len(tokens) >= most:
            if automaton.is_accepting[state]:
                return tokens
            can = can[distance[reached[can]] < distance[state]]
        token = int(rng.choice(can))
        if automaton.classes[token] == EOS_CLASS:
            return tokens
        tokens.append(token)
        state = int(reached[token])


def distances(automaton) -> np.ndarray:
    """Fewest tokens from each state to an accepting one, by relaxation."""
    distance = np.where(automaton.is_accepting, 0, 10**6)
    for _ in range(automaton.num_states):
        reached = automaton.transitions[:, EOS_CLASS + 1 :]
        best = np.where(reached == DEAD, 10**6, distance[reached] + 1).min(axis=1)
        nearer = np.minimum(distance, best)
        if np.array_equal(nearer, distance):
            break
        distance = nearer
    return distance
