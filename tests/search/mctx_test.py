"""mctx's policies as the driver of a search over pages: one pool for all nodes.

`mctx` calls the model with the embedding of a parent and stores one embedding per node.
Here an embedding is the number of a row of block tables. The pool is no embedding: a
`loop_fn` carries it beside mctx's own loop state. Needs the extra `mctx`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jpaged import TreeSearchParams, engine
from jpaged.config import EngineConfig
from jpaged.kv import block_manager, block_state
from jpaged.llm import LLM
from jpaged.search import pages as node_pages
from tests.support.tiny_llm import SIZES, random_prompts
from tests.support.tiny_llm import decoder as decoder

mctx = pytest.importorskip("mctx")
pytestmark = pytest.mark.long

A, SIMULATIONS, NODES = 4, 12, 16
CONFIG = EngineConfig(
    num_blocks=64,
    block_size=4,
    max_num_seqs=4,
    max_model_len=64,
    max_num_batched_tokens=16,
)
# Different lengths; both end within a block, so that each first child copies one.
PROMPTS = [random_prompts(1, seed=3)[0][:6], [5, 9, 200]]


class Shared:
    """The pages of a search, which the steps of a loop read and replace."""

    pages: Any
    number: Any  # i32[], of the simulation

    def loop(self, low, high, body, start):
        """mctx's `loop_fn`: carries the pages beside mctx's state."""

        def step(i, carry):
            self.pages, inner = carry
            self.number = i
            inner = body(i, inner)  # calls the recurrent function, and with it `expand`
            return self.pages, inner

        self.pages, found = lax.fori_loop(low, high, step, (self.pages, start))
        return found


def facts(model, hidden, logprob, count):
    """Priors, tokens, and the default value of `TreeSearchParams`, for B texts."""
    logprobs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    priors, tokens = lax.top_k(logprobs, A)
    expected = jnp.sum(jnp.exp(logprobs) * logprobs, axis=1)
    return priors, tokens, (logprob + expected) / (count + 1.0)


@functools.partial(jax.jit, static_argnames=("policy", "is_shared"))
def run(model, cache, tokens, lens, policy, is_shared=True):
    """The policy's output, and the pages after the search."""
    count = len(lens)
    first = jnp.arange(count, dtype=jnp.int32) * NODES
    kept = jnp.zeros(CONFIG.num_blocks, bool)
    pages = node_pages.init_pages(cache, kept, CONFIG, count * NODES, 8)
    pages, hidden = node_pages.write_prompts(model, pages, tokens, lens, CONFIG)
    zeros = jnp.zeros(count)
    priors, actions, values = facts(model, hidden, zeros, zeros)
    embedding = (first, actions, priors, zeros, zeros)
    root = mctx.RootFnOutput(prior_logits=priors, value=values, embedding=embedding)
    shared = Shared()
    shared.pages = pages

    def recurrent(params, key, action, embedding):
        del params, key
        rows, actions, priors, logprob, length = embedding
        index = jnp.arange(count)
        children = first + shared.number.astype(jnp.int32) + 1
        live = jnp.ones(count, bool)
        before = shared.pages if is_shared else pages
        shared.pages, hidden = node_pages.expand(
            model, before, rows, children, actions[index, action], live, CONFIG
        )
        logprob, length = logprob + priors[index, action], length + 1.0
        priors, actions, values = facts(model, hidden, logprob, length)
        step = mctx.RecurrentFnOutput(
            reward=zeros, discount=jnp.ones(count), prior_logits=priors, value=values
        )
        return step, (children, actions, priors, logprob, length)

    found = policy((), jax.random.key(1), root, recurrent, loop_fn=shared.loop)
    return found, shared.pages


def searched(decoder, policy, **settings):
    tokens = np.zeros((len(PROMPTS), 8), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    lens = jnp.array([len(prompt) for prompt in PROMPTS], jnp.int32)
    cache = engine.init(decoder, CONFIG).cache
    with jax.numpy_dtype_promotion("standard"):  # mctx mixes dtypes
        return run(decoder, cache, jnp.asarray(tokens), lens, policy, **settings)


MUZERO = functools.partial(
    mctx.muzero_policy, num_simulations=SIMULATIONS, dirichlet_fraction=0.0
)
GUMBEL = functools.partial(mctx.gumbel_muzero_policy, num_simulations=SIMULATIONS)


def check_nodes(decoder, tree, pages):
    """Priors of all nodes are those of a forward pass over the node's whole text."""
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(decoder(tokens)))
    for i, prompt in enumerate(PROMPTS):
        texts = {0: prompt}
        for node in range(1, SIMULATIONS + 1):
            parent = int(tree.parents[i, node])
            action = int(tree.action_from_parent[i, node])
            tokens = tree.embeddings[1]
            texts[node] = [*texts[parent], int(tokens[i, parent, action])]
        assert len(set(map(tuple, texts.values()))) == SIMULATIONS + 1
        for node, text in texts.items():
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(text)] = text
            expected = np.sort(np.asarray(forward(padded)[0, len(text) - 1]))[::-1][:A]
            found = np.asarray(tree.embeddings[2][i, node])
            np.testing.assert_allclose(found, expected, atol=1e-4)
    assert not bool(pages.is_full)
    assert block_manager.violations(pages.blocks) == []


def test_the_visits_of_its_muzero_policy_are_those_of_tree_search(folder, decoder):
    found, pages = searched(decoder, MUZERO)
    check_nodes(decoder, found.search_tree, pages)
    llm = LLM(folder, **(SIZES | dict(num_blocks=64)))
    params = TreeSearchParams(
        num_simulations=SIMULATIONS,
        num_actions=A,
        max_tokens=SIMULATIONS + 2,  # no text of the first token's tree ends
        ignore_eos=True,
    )
    outputs = llm.tree_search(PROMPTS, params)
    counts = np.asarray(found.search_tree.summary().visit_counts).astype(int)
    assert [o.steps[0].visits.tolist() for o in outputs] == counts.tolist()
    assert [o.outputs[0].token_ids[0] for o in outputs] == [
        int(found.search_tree.embeddings[1][i, 0, counts[i].argmax()]) for i in range(2)
    ]


def test_its_gumbel_policy_drives_the_same_pages(decoder):
    found, pages = searched(decoder, GUMBEL)
    check_nodes(decoder, found.search_tree, pages)
    blocks = block_state.num_free_blocks(pages.blocks)
    # Nodes share the blocks of their parents: at most one new block each.
    used = CONFIG.num_blocks - int(blocks)
    texts = sum(-(-len(prompt) // CONFIG.block_size) for prompt in PROMPTS)
    assert used <= texts + 2 * SIMULATIONS


def test_pages_that_the_loop_does_not_carry_are_found(decoder):
    found, pages = searched(decoder, MUZERO, is_shared=False)
    with pytest.raises(AssertionError):
        check_nodes(decoder, found.search_tree, pages)
