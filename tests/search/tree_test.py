"""Search trees against a search with objects and mctx, on tables.

The table model: the log-probabilities of the next token depend on the last token and
the length, values on the whole text. Comparing with mctx needs the extra `mctx`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.search import tree as trees
from jpaged.search.tree import NO_NODE, Exploration, NewNodes
from tests.support import tree_oracle as oracle

TREES, V, DEPTH = 3, 4, 4
RNG = np.random.default_rng(0)
PRIORS = RNG.normal(0, 1.5, (TREES, DEPTH + 1, V, V)).astype(np.float32)
# A value for each text, as a number in base V + 1 with digits 1..V.
VALUES = RNG.normal(0, 2, (TREES, (V + 1) ** DEPTH)).astype(np.float32)
END = 3  # the token that ends a text


def code_of(text):
    code = 0
    for token in text:
        code = code * (V + 1) + token + 1
    return code


def look_at(tree, can_end, text):
    last = text[-1] if text else 0
    is_terminal = len(text) == DEPTH or (can_end and bool(text) and text[-1] == END)
    return oracle.Facts(
        list(range(V)),
        PRIORS[tree, len(text), last].astype(np.float64),
        float(VALUES[tree, code_of(text)]),
        is_terminal,
    )


def new_nodes(codes, lens, last, can_end):
    index = jnp.arange(TREES)
    tokens = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (TREES, V))
    is_terminal = (lens == DEPTH) | (can_end & (lens > 0) & (last == END))
    priors = jnp.asarray(PRIORS)[index, lens, last]
    values = jnp.asarray(VALUES)[index, codes]
    return NewNodes(tokens, priors, values, is_terminal)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def run(number, exploration, can_end, fault=None):
    """The trees after `number` simulations of each, and codes and lengths of nodes."""
    index = jnp.arange(TREES, dtype=jnp.int32)
    zeros = jnp.zeros_like(index)
    live = jnp.ones(TREES, bool)
    tree = trees.init_tree(TREES, number + 1, V)
    new = new_nodes(zeros, zeros, zeros, can_end)
    tree = trees.add_nodes(tree, zeros + NO_NODE, zeros, new, live)
    tree = trees.backup(tree, zeros, new.values, live)
    texts = jnp.zeros((2, TREES, number + 1), jnp.int32)

    def simulate(_, carry):
        tree, (codes, lens) = carry
        at = trees.select(tree, exploration)
        is_new = at.nodes == NO_NODE
        node = jnp.where(is_new, tree.num_nodes, at.nodes)
        code = codes[index, at.parents] * (V + 1) + at.actions + 1
        length = lens[index, at.parents] + 1
        to = jnp.where(is_new, node, number + 1)
        codes = codes.at[index, to].set(code, mode="drop")
        lens = lens.at[index, to].set(length, mode="drop")
        new = new_nodes(code, length, at.actions, can_end)
        tree = trees.add_nodes(tree, at.parents, at.actions, new, is_new)
        values = jnp.where(is_new, new.values, tree.raw_values[index, node])
        if fault == "the parent's value":
            values = tree.raw_values[index, at.parents]
        return trees.backup(tree, node, values, live), jnp.stack([codes, lens])

    return jax.lax.fori_loop(0, number, simulate, (tree, texts))


def visits_of(tree):
    return np.asarray(trees.root_visits(tree)).tolist()


@pytest.mark.parametrize("can_end", [False, True])
@pytest.mark.parametrize("start", [0.3, 1.25, 4.0])
@pytest.mark.parametrize("number", [1, 7, 60])
def test_visits_and_values_are_those_of_a_search_with_objects(number, start, can_end):
    tree, (codes, _) = run(number, Exploration(start, 50.0), can_end)
    for i in range(TREES):
        look = functools.partial(look_at, i, can_end)
        root = oracle.root_of(look)
        oracle.simulate(root, look, number, start, 50.0)
        assert visits_of(tree)[i] == oracle.counts(root)
        expected = {
            code_of(node.text): (node.visits, round(node.mean, 3))
            for node in root.nodes()
        }
        count = int(tree.num_nodes[i])
        means = np.asarray(tree.values[i, :count]).tolist()
        found = {
            int(codes[i, n]): (int(tree.visits[i, n]), round(means[n], 3))
            for n in range(count)
        }
        assert found.keys() == expected.keys()
        for code, (visits, mean) in expected.items():
            assert found[code][0] == visits
            assert abs(found[code][1] - mean) < 2e-3


def test_a_planted_fault_changes_the_visits():
    exploration = Exploration(1.25, 50.0)
    good, _ = run(60, exploration, True)
    wrong, _ = run(60, exploration, True, "the parent's value")
    assert visits_of(good) != visits_of(wrong)


@pytest.mark.parametrize("can_end", [False, True])
def test_visits_are_those_of_mctx(can_end):
    mctx = pytest.importorskip("mctx")
    number, index = 40, jnp.arange(TREES)
    zeros = jnp.zeros(TREES, jnp.int32)

    def recurrent(params, rng, action, text):
        del params, rng
        codes, lens, is_over = text
        codes = codes * (V + 1) + action + 1
        codes, lens = jnp.minimum(codes, VALUES.shape[1] - 1), lens + 1
        new = new_nodes(codes, jnp.minimum(lens, DEPTH), action, can_end)
        # A text that has ended has no other text behind it: its value is a reward.
        ends = new.is_terminal & ~is_over
        step = mctx.RecurrentFnOutput(
            reward=jnp.where(ends, new.values, 0.0),
            discount=jnp.where(new.is_terminal | is_over, 0.0, 1.0),
            prior_logits=new.priors,
            value=jnp.where(new.is_terminal | is_over, 0.0, new.values),
        )
        return step, (codes, lens, is_over | new.is_terminal)

    new = new_nodes(zeros, zeros, zeros, can_end)
    root = mctx.RootFnOutput(
        prior_logits=new.priors,
        value=new.values,
        embedding=(zeros, zeros, zeros > 0),
    )
    policy = jax.jit(
        functools.partial(
            mctx.muzero_policy,
            recurrent_fn=recurrent,
            num_simulations=number,
            dirichlet_fraction=0.0,
        )
    )
    with jax.numpy_dtype_promotion("standard"):  # mctx mixes dtypes
        found = policy((), jax.random.key(0), root)
    tree, _ = run(number, Exploration(), can_end)
    counts = found.search_tree.summary().visit_counts
    assert visits_of(tree) == np.asarray(counts).astype(int).tolist()
    np.testing.assert_allclose(
        tree.values[index, 0], found.search_tree.summary().value, atol=1e-5
    )


def as_nested(tree, i, node=0):
    """A tree without numbers of nodes."""
    below = []
    for action, child in enumerate(np.asarray(tree.children[i, node]).tolist()):
        if child != NO_NODE:
            assert int(tree.parents[i, child]) == node
            assert int(tree.actions[i, child]) == action
            below.append((action, as_nested(tree, i, child)))
    facts = (
        int(tree.visits[i, node]),
        float(tree.values[i, node]),
        bool(tree.is_terminal[i, node]),
        np.asarray(tree.priors[i, node]).tolist(),
    )
    return facts, below


def test_a_new_root_keeps_its_subtree_and_nothing_else():
    tree, _ = run(60, Exploration(1.25, 50.0), True)
    actions = np.asarray(trees.root_visits(tree)).argmax(axis=1)
    nodes = np.asarray(tree.children)[np.arange(TREES), 0, actions].astype(np.int32)
    nodes[1] = 0  # this tree stays as it is
    kept, order = jax.jit(trees.reroot)(tree, jnp.asarray(nodes), jnp.bool_(True))
    for i in range(TREES):
        expected = as_nested(tree, i, int(nodes[i]))
        assert as_nested(kept, i) == expected
        count = int(kept.num_nodes[i])
        assert count == int(np.sum(np.asarray(order[i]) >= 0))
        assert int(kept.parents[i, 0]) == NO_NODE
        visits = np.asarray(tree.visits[i])
        np.testing.assert_array_equal(
            kept.visits[i, :count], visits[np.asarray(order[i, :count])]
        )
        assert not np.asarray(kept.visits[i, count:]).any()
    assert 1 < kept.num_nodes.max() < tree.num_nodes.max() + 1
    fresh, order = jax.jit(trees.reroot)(tree, jnp.asarray(nodes), jnp.bool_(False))
    for i in (0, 2):
        assert fresh.num_nodes[i] == fresh.visits[i, 0] == 1
        assert fresh.values[i, 0] == tree.raw_values[i, nodes[i]]
        assert (np.asarray(fresh.children[i]) == NO_NODE).all()
        assert np.asarray(order[i]).tolist() == [nodes[i]] + [NO_NODE] * 60
    assert as_nested(fresh, 1) == as_nested(tree, 1)
