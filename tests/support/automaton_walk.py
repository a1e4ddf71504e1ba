"""Random walks through the automaton of a constraint, by default with the tokenizer of
the bundled model."""

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
    """Tokens sampled uniformly from the allowed ones, up to EOS, which is not included.

    After `most` tokens, the walk follows the shortest way to an accepting state.
    """
    distance = distances(automaton)
    tokens, state = [], 0
    while True:
        reached = automaton.transitions[state][automaton.classes]
        allowed = np.flatnonzero(reached != DEAD)
        assert len(allowed)
        if len(tokens) >= most:
            if automaton.is_accepting[state]:
                return tokens
            allowed = allowed[distance[reached[allowed]] < distance[state]]
        token = int(rng.choice(allowed))
        if automaton.classes[token] == EOS_CLASS:
            return tokens
        tokens.append(token)
        state = int(reached[token])


def distances(automaton) -> np.ndarray:
    """Number of tokens on the shortest way from each state to an accepting one."""
    distance = np.where(automaton.is_accepting, 0, 10**6)
    for _ in range(automaton.num_states):
        reached = automaton.transitions[:, EOS_CLASS + 1 :]
        best = np.where(reached == DEAD, 10**6, distance[reached] + 1).min(axis=1)
        shorter = np.minimum(distance, best)
        if np.array_equal(shorter, distance):
            break
        distance = shorter
    return distance
