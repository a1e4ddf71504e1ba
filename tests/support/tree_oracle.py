"""Monte Carlo tree search with objects, recursion and float64, to compare with."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Facts(NamedTuple):
    """What a search learns of a text."""

    tokens: list[int]  # of the actions
    priors: np.ndarray  # f64[A], log-probabilities
    value: float
    is_terminal: bool


Look = Callable[[tuple[int, ...]], Facts]  # text after the prompt -> facts


@dataclasses.dataclass
class Node:
    """A text, and the visits below it."""

    text: tuple[int, ...]
    facts: Facts
    visits: int = 0
    total: float = 0.0
    children: dict[int, "Node"] = dataclasses.field(default_factory=dict)

    @property
    def mean(self) -> float:
        return self.total / self.visits

    def action(self, start: float, base: float) -> int:
        """The action that a simulation takes."""
        values = [child.mean for child in self.children.values()]
        low, high = min([self.mean, *values]), max([self.mean, *values])
        weight = start + math.log((self.visits + base + 1) / base)
        odds = np.exp(self.facts.priors - self.facts.priors.max())
        found = []
        for action, share in enumerate(odds / odds.sum()):
            child = self.children.get(action)
            visits = 0 if child is None else child.visits
            quality = 0.0
            if child is not None and high > low:
                quality = (child.mean - low) / (high - low)
            bonus = math.sqrt(self.visits) * weight * share / (visits + 1)
            found.append(quality + bonus)
        return int(np.argmax(found))

    def visit(self, look: Look, start: float, base: float) -> float:
        """One simulation below this node, which is not terminal; returns its value."""
        action = self.action(start, base)
        child = self.children.get(action)
        if child is None:
            text = (*self.text, self.facts.tokens[action])
            child = self.children[action] = Node(text, look(text))
            value = child.add(child.facts.value)
        elif child.facts.is_terminal:
            value = child.add(child.facts.value)
        else:
            value = child.visit(look, start, base)
        return self.add(value)

    def add(self, value: float) -> float:
        self.visits += 1
        self.total += value
        return value

    def nodes(self) -> list["Node"]:
        """This node and its descendants."""
        below = (node for child in self.children.values() for node in child.nodes())
        return [self, *below]


def simulate(
    root: Node, look: Look, visits: int, start: float = 1.25, base: float = 19652.0
) -> None:
    """Simulate until the root has one visit more than `visits`."""
    while root.visits <= visits:
        root.visit(look, start, base)


def root_of(look: Look, text: tuple[int, ...] = ()) -> Node:
    """A root that was visited once, for its own value."""
    node = Node(text, look(text))
    node.add(node.facts.value)
    return node


def counts(root: Node) -> list[int]:
    """Visits of the root's actions."""
    return [
        root.children[a].visits if a in root.children else 0
        for a in range(len(root.facts.tokens))
    ]
