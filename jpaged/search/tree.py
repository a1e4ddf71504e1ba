"""Search trees as arrays: select a node, back up its value, choose a new root.

Pipeline: log-probabilities, values -> [tree] -> node and action to expand.

A node is a text. Its actions are tokens that may follow; an action that was taken has a
child. Nodes are numbered in the order of their creation, the root is 0. Every visit of
a child is also a visit of its parent. The module depends on no model and no blocks.

Shape symbols: B trees, N nodes of a tree, A actions of a node.

Sources: Silver et al. 2017, AlphaGo Zero, for the rule of selection (PUCT);
Schrittwieser et al. 2019, MuZero, appendix B, for its constants and for values that are
normalised by those of the parent and the siblings. https://arxiv.org/abs/1911.08265
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

NO_NODE = -1
_LEAST_SPREAD = 1e-8  # values with a smaller spread count as equal


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tree:
    """B trees."""

    parents: jax.Array  # i32[B, N]; NO_NODE: the root
    actions: jax.Array  # i32[B, N], the parent's action that leads to the node
    children: jax.Array  # i32[B, N, A]; NO_NODE: not taken yet
    tokens: jax.Array  # i32[B, N, A], of the actions
    priors: jax.Array  # f32[B, N, A], their log-probabilities; -inf: no action
    visits: jax.Array  # i32[B, N]; 0: the node does not exist
    values: jax.Array  # f32[B, N], mean over the visits
    raw_values: jax.Array  # f32[B, N], of the node's own text
    is_terminal: jax.Array  # bool[B, N], texts that have ended
    num_nodes: jax.Array  # i32[B]


class NewNodes(NamedTuple):
    """One new node of each tree."""

    tokens: jax.Array  # i32[B, A]
    priors: jax.Array  # f32[B, A]
    values: jax.Array  # f32[B]
    is_terminal: jax.Array  # bool[B]


class Exploration(NamedTuple):
    """The constants of the rule of selection."""

    start: jax.Array | float = 1.25  # f32[], c1 of MuZero
    base: jax.Array | float = 19652.0  # f32[], c2: visits after which it grows


class Selected(NamedTuple):
    """Where a simulation ends."""

    parents: jax.Array  # i32[B]
    actions: jax.Array  # i32[B]
    nodes: jax.Array  # i32[B], a terminal node; NO_NODE: the action has no child yet


def init_tree(num_trees: int, num_nodes: int, num_actions: int) -> Tree:
    """Return trees without nodes.

    Args:
      num_trees: B.
      num_nodes: N.
      num_actions: A.
    """
    nodes, actions = (num_trees, num_nodes), (num_trees, num_nodes, num_actions)
    return Tree(
        parents=jnp.full(nodes, NO_NODE, jnp.int32),
        actions=jnp.zeros(nodes, jnp.int32),
        children=jnp.full(actions, NO_NODE, jnp.int32),
        tokens=jnp.zeros(actions, jnp.int32),
        priors=jnp.full(actions, -jnp.inf, jnp.float32),
        visits=jnp.zeros(nodes, jnp.int32),
        values=jnp.zeros(nodes, jnp.float32),
        raw_values=jnp.zeros(nodes, jnp.float32),
        is_terminal=jnp.zeros(nodes, jnp.bool_),
        num_nodes=jnp.zeros((num_trees,), jnp.int32),
    )


def add_nodes(
    tree: Tree,
    parents: jax.Array,
    actions: jax.Array,
    new: NewNodes,
    is_live: jax.Array,
) -> Tree:
    """Add one node to each live tree, with the number `tree.num_nodes`.

    The node has no visit yet: `backup` must follow.

    Args:
      tree: the trees.
      parents: i32[B]; NO_NODE: the node is a root.
      actions: i32[B], the parents' actions.
      new: the nodes.
      is_live: bool[B].
    """
    num_trees, num_nodes, _ = tree.children.shape
    index = jnp.arange(num_trees, dtype=jnp.int32)
    at = jnp.where(is_live, tree.num_nodes, num_nodes)
    above = jnp.where(is_live & (parents >= 0), parents, num_nodes)

    def put(column: jax.Array, value: jax.Array) -> jax.Array:
        return column.at[index, at].set(value, mode="drop")

    return dataclasses.replace(
        tree,
        parents=put(tree.parents, parents),
        actions=put(tree.actions, actions),
        children=tree.children.at[index, above, actions].set(
            tree.num_nodes, mode="drop"
        ),
        tokens=put(tree.tokens, new.tokens),
        priors=put(tree.priors, new.priors),
        raw_values=put(tree.raw_values, new.values),
        is_terminal=put(tree.is_terminal, new.is_terminal),
        num_nodes=tree.num_nodes + is_live.astype(jnp.int32),
    )


def select(tree: Tree, exploration: Exploration) -> Selected:
    """Descend each tree from its root to an action without a child, or a terminal node.

    At each node it takes the action with the highest score: the action's value,
    normalised to 0..1, plus a bonus for probable actions with few visits.
    """
    return jax.vmap(lambda one: _descend(one, exploration))(tree)


def _descend(tree: Tree, exploration: Exploration) -> Selected:
    def continues(at: Selected) -> jax.Array:
        return (at.nodes != NO_NODE) & ~tree.is_terminal[jnp.maximum(at.nodes, 0)]

    def step(at: Selected) -> Selected:
        node = at.nodes
        action = jnp.argmax(scores(tree, node, exploration)).astype(jnp.int32)
        return Selected(node, action, tree.children[node, action])

    none, root = jnp.int32(NO_NODE), jnp.int32(0)
    return lax.while_loop(continues, step, Selected(none, root, root))


def scores(tree: Tree, node: jax.Array, exploration: Exploration) -> jax.Array:
    """Return the scores f32[A] of the actions of one node.

    Args:
      tree: one tree, without the axis B.
      node: i32[], the node.
      exploration: the constants.
    """
    child, priors = tree.children[node], tree.priors[node]
    is_taken = child != NO_NODE
    safe = jnp.maximum(child, 0)
    counts = jnp.where(is_taken, tree.visits[safe], 0)
    own, visits = tree.values[node], tree.visits[node].astype(jnp.float32)
    values = jnp.where(is_taken, tree.values[safe], own)
    low, high = jnp.min(values, initial=own), jnp.max(values, initial=own)
    values = jnp.where(is_taken, values, low)
    quality = (values - low) / jnp.maximum(high - low, _LEAST_SPREAD)
    weight = exploration.start + jnp.log(
        (visits + exploration.base + 1.0) / exploration.base
    )
    bonus = jnp.sqrt(visits) * weight * jax.nn.softmax(priors)
    bonus /= (counts + 1).astype(jnp.float32)
    return jnp.where(priors > -jnp.inf, quality + bonus, -jnp.inf)


def backup(tree: Tree, nodes: jax.Array, values: jax.Array, is_live: jax.Array) -> Tree:
    """Count a visit of each node and of all its ancestors, with a value.

    Args:
      tree: the trees.
      nodes: i32[B].
      values: f32[B].
      is_live: bool[B], other trees stay unchanged.
    """

    def climb(one: Tree, node: jax.Array, value: jax.Array) -> Tree:
        def step(carry: Any) -> Any:
            node, visits, means = carry
            count = visits[node].astype(jnp.float32)
            mean = (means[node] * count + value) / (count + 1.0)
            visits, means = visits.at[node].add(1), means.at[node].set(mean)
            return one.parents[node], visits, means

        carry = (node, one.visits, one.values)
        _, visits, means = lax.while_loop(lambda carry: carry[0] >= 0, step, carry)
        return dataclasses.replace(one, visits=visits, values=means)

    return jax.vmap(climb)(tree, jnp.where(is_live, nodes, NO_NODE), values)


def root_visits(tree: Tree) -> jax.Array:
    """Return the visits i32[B, A] of the root's actions."""
    child = tree.children[:, 0]
    counts = jnp.take_along_axis(tree.visits, jnp.maximum(child, 0), axis=1)
    return jnp.where(child != NO_NODE, counts, 0)


def reroot(
    tree: Tree, nodes: jax.Array, keeps_subtree: jax.Array
) -> tuple[Tree, jax.Array]:
    """Make a node the root; keep only it and its descendants, with new numbers.

    Args:
      tree: the trees.
      nodes: i32[B], the new roots; 0 changes nothing.
      keeps_subtree: bool[]; False: the descendants are removed too, and the root has
        one visit, with its own value.

    Returns:
      The trees, and i32[B, N], the old number of each node; NO_NODE: none.
    """
    kept = jax.vmap(_descendants)(tree.parents, tree.visits > 0, nodes)
    number = jnp.arange(kept.shape[1], dtype=jnp.int32)[None, :]
    forgets = ~keeps_subtree & (nodes > 0)[:, None]
    kept = jnp.where(forgets, number == nodes[:, None], kept)
    after = jnp.where(kept, jnp.cumsum(kept, axis=1, dtype=jnp.int32) - 1, NO_NODE)
    old = jnp.argsort(~kept, axis=1, stable=True).astype(jnp.int32)
    count = jnp.sum(kept, axis=1, dtype=jnp.int32)
    is_node = number < count[:, None]
    empty = init_tree(*tree.children.shape)

    def move(column: jax.Array, none: jax.Array) -> jax.Array:
        index = old.reshape(*old.shape, *[1] * (column.ndim - 2))
        moved = jnp.take_along_axis(column, index, axis=1)
        mask = is_node.reshape(index.shape)
        return jnp.where(mask, moved, none)

    def renamed(nodes: jax.Array) -> jax.Array:
        flat = jnp.maximum(nodes, 0).reshape(nodes.shape[0], -1)
        found = jnp.take_along_axis(after, flat, axis=1).reshape(nodes.shape)
        return jnp.where(nodes == NO_NODE, NO_NODE, found)

    names = [one.name for one in dataclasses.fields(tree) if one.name != "num_nodes"]
    moved = {name: move(getattr(tree, name), getattr(empty, name)) for name in names}
    parents = jnp.where(number == 0, NO_NODE, renamed(moved["parents"]))
    is_root = forgets & (number == 0)
    moved |= {
        "parents": parents,
        "children": jnp.where(is_root[..., None], NO_NODE, renamed(moved["children"])),
        "visits": jnp.where(is_root, 1, moved["visits"]),
        "values": jnp.where(is_root, moved["raw_values"], moved["values"]),
    }
    return Tree(**moved, num_nodes=count), jnp.where(is_node, old, NO_NODE)


def _descendants(parents: jax.Array, exists: jax.Array, root: jax.Array) -> jax.Array:
    """bool[N]: the node `root` and its descendants; parents have lower numbers."""

    def step(node: jax.Array, kept: jax.Array) -> jax.Array:
        above = parents[node]
        is_kept = (node == root) | ((above >= 0) & kept[jnp.maximum(above, 0)])
        return kept.at[node].set(is_kept & exists[node])

    return lax.fori_loop(0, parents.shape[0], step, jnp.zeros_like(exists))
