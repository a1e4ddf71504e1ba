"""Tree search as one program: simulations, and a new root after each token.

Pipeline: prompts -> [loop] -> tree, pages, values -> texts.

A simulation descends each tree (`tree.select`), computes one new node of each
(`pages.expand`), values it, and counts the visit (`tree.backup`). When the root has
enough visits, the token with the most visits is chosen and its node becomes the root.
The blocks of all nodes that are not below it are freed.

Shape symbols: B trees, N nodes of a tree, A actions of a node, T tokens of an output, L
tokens of the longest text, V vocabulary, E hidden size.

Sources: Leblond et al. 2021 and Chaffin et al. 2022 for Monte Carlo tree search with a
language model. https://arxiv.org/abs/2104.05336 https://arxiv.org/abs/2109.13582
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jpaged.attention.kv_cache import KVCache
from jpaged.compat import when
from jpaged.config import EngineConfig
from jpaged.decoding.sample import sample_rows, token_keys
from jpaged.decoding.values import Leaf, Value, evaluate
from jpaged.indexing import where_rows
from jpaged.kv import block_manager
from jpaged.models import layer_kernels
from jpaged.models.decoder import Decoder
from jpaged.search import pages as node_pages
from jpaged.search import texts as node_texts
from jpaged.search import tree as trees
from jpaged.search.pages import NodePages
from jpaged.search.texts import Texts
from jpaged.search.tree import NO_NODE, Exploration, NewNodes, Tree


class SearchSizes(NamedTuple):
    """Sizes of a search, which are compiled."""

    num_nodes: int  # N, one more than the most simulations
    num_actions: int  # A
    max_tokens: int  # T


class SearchRequests(NamedTuple):
    """The searches of a call, as data."""

    tokens: jax.Array  # i32[B, L - T], the prompts
    prompt_lens: jax.Array  # i32[B]; 0: no tree; these are last
    paths: jax.Array  # i32[B, M], cached blocks of the prompts, `prefix_cache.match`
    path_lens: jax.Array  # i32[B], tokens in them
    kept: jax.Array  # bool[num_blocks], blocks that the search must not use
    stop_ids: jax.Array  # i32[C], tokens that end a text, padded with -1
    seeds: jax.Array  # u32[B]
    num_simulations: jax.Array  # i32[]
    max_tokens: jax.Array  # i32[]
    max_len: jax.Array  # i32[], of prompt and output
    exploration: Exploration
    temperature: jax.Array  # f32[]
    reuses_tree: jax.Array  # bool[]
    parameters: dict[str, jax.Array]  # of the value function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """The actions of each root at the time when a token was chosen."""

    tokens: jax.Array  # i32[B, T, A]
    visits: jax.Array  # i32[B, T, A]
    values: jax.Array  # f32[B, T, A]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Found:
    """The state of a search, and its result."""

    tree: Tree  # after the last token
    texts: Texts  # of the nodes; that of the root is the output
    best: Texts  # [B], terminal texts with the largest values; value -inf: none
    steps: Steps
    num_tokens: jax.Array  # i32[B], tokens that were chosen
    is_over: jax.Array  # bool[B]
    num_nodes: jax.Array  # i32[B], nodes that were computed, including the root
    num_steps: jax.Array  # i32[], of the decoder, after the prompts
    used_blocks: jax.Array  # i32[B], the most at a time
    copied_blocks: jax.Array  # i32[B], blocks used at that time if none were shared
    num_copies: jax.Array  # i32[], blocks copied before a write
    is_finite: jax.Array  # bool[B], all values were numbers
    is_full: jax.Array  # bool[], the pool was too small


@functools.partial(
    jax.jit,
    static_argnames=("value", "sizes", "config"),
    donate_argnames=("cache",),
)
def search(
    model: Decoder,
    cache: KVCache,
    requests: SearchRequests,
    *,
    value: Value,
    sizes: SearchSizes,
    config: EngineConfig,
) -> tuple[KVCache, Found]:
    """Search for texts after several prompts, in one device call.

    Args:
      model: the decoder.
      cache: the pool; donated, and updated in place. Blocks in `requests.kept` do not
        change. Each tree needs the blocks of its longest text, and one per node.
      requests: the searches.
      value: the value function.
      sizes: sizes of the trees.
      config: the engine's config.

    Returns:
      The pool, and the result.
    """
    num_trees, prompt_len = requests.tokens.shape
    rows = num_trees * sizes.num_nodes
    width = -(-(prompt_len + sizes.max_tokens) // config.block_size)
    pages = node_pages.init_pages(cache, requests.kept, config, rows, width)
    is_root = jnp.arange(rows, dtype=jnp.int32) % sizes.num_nodes == 0
    index = jnp.arange(rows, dtype=jnp.int32) // sizes.num_nodes
    lens = jnp.where(is_root, requests.path_lens[index], 0)
    blocks = block_manager.adopt(pages.blocks, requests.paths[index], lens)
    pages = dataclasses.replace(pages, blocks=blocks)
    pages, hidden = node_pages.write_prompts(
        model, pages, requests.tokens, requests.prompt_lens, config
    )
    run = _Search(model, requests, value, sizes, config)
    found = run.start(hidden)

    def continues(carry: tuple[NodePages, Found]) -> jax.Array:
        _, found = carry
        return jnp.any(~found.is_over)

    carry = (pages, found)
    pages, found = lax.while_loop(continues, run.choose_token, carry)
    return pages.cache, dataclasses.replace(
        found, num_copies=pages.num_copies, is_full=pages.is_full
    )


class _Search(NamedTuple):
    """The constants of a search, and its steps."""

    model: Decoder
    requests: SearchRequests
    value: Value
    sizes: SearchSizes
    config: EngineConfig

    @property
    def tree_index(self) -> jax.Array:
        """i32[B], the index of each tree."""
        return jnp.arange(self.requests.tokens.shape[0], dtype=jnp.int32)

    def start(self, hidden: jax.Array) -> Found:
        """Return trees whose roots exist and have one visit.

        Args:
          hidden: [B, E], of the prompts' last tokens.
        """
        count, sizes = self.tree_index.size, self.sizes
        nodes = (count, sizes.num_nodes)
        texts = node_texts.no_texts(nodes, sizes.max_tokens)
        is_live = self.requests.prompt_lens > 0
        zeros = jnp.zeros((count,), jnp.int32)
        actions = (count, sizes.max_tokens, sizes.num_actions)
        found = Found(
            tree=trees.init_tree(*nodes, sizes.num_actions),
            texts=texts,
            best=dataclasses.replace(
                node_texts.no_texts((count,), sizes.max_tokens),
                values=jnp.full((count,), -jnp.inf, jnp.float32),
            ),
            steps=Steps(
                jnp.zeros(actions, jnp.int32),
                jnp.zeros(actions, jnp.int32),
                jnp.zeros(actions, jnp.float32),
            ),
            num_tokens=zeros,
            is_over=~is_live,
            num_nodes=zeros,
            num_steps=jnp.int32(0),
            used_blocks=zeros,
            copied_blocks=zeros,
            num_copies=jnp.int32(0),
            is_finite=jnp.ones((count,), jnp.bool_),
            is_full=jnp.bool_(False),
        )
        none = jnp.full_like(zeros, NO_NODE)
        return self._add(found, none, zeros, node_texts.first(texts), hidden, is_live)

    def choose_token(self, carry: tuple[NodePages, Found]) -> tuple[NodePages, Found]:
        """Simulate until all roots have their visits; then choose a token of each."""

        def is_short(found: Found) -> jax.Array:
            visits = found.tree.visits[:, 0]
            return ~found.is_over & (visits <= self.requests.num_simulations)

        def simulate(carry: tuple[NodePages, Found]) -> tuple[NodePages, Found]:
            return self._simulate(*carry, is_short(carry[1]))

        pages, found = lax.while_loop(
            lambda carry: jnp.any(is_short(carry[1])), simulate, carry
        )
        return self._choose(pages, found)

    def _simulate(
        self, pages: NodePages, found: Found, is_live: jax.Array
    ) -> tuple[NodePages, Found]:
        tree, index = found.tree, self.tree_index
        at = trees.select(tree, self.requests.exploration)
        is_new = is_live & (at.nodes == NO_NODE)
        parents = jnp.maximum(at.parents, 0)
        children = jnp.where(is_new, tree.num_nodes, jnp.maximum(at.nodes, 0))
        tokens = tree.tokens[index, parents, at.actions]
        first = index * self.sizes.num_nodes
        sizes = self.model.config
        hidden = jnp.zeros((index.size, sizes.hidden_size), sizes.dtype)

        def compute(carry: tuple[NodePages, jax.Array]) -> Any:
            pages, hidden = carry
            pages, states = node_pages.expand(
                self.model,
                pages,
                first + parents,
                first + children,
                tokens,
                is_new,
                self.config,
            )
            return pages, states.astype(hidden.dtype)

        pages, hidden = when(jnp.any(is_new), compute, (pages, hidden))
        texts = jax.tree.map(lambda x: x[index, parents], found.texts)
        logprobs = tree.priors[index, parents, at.actions]
        texts = node_texts.appended(texts, tokens, logprobs)
        found = self._add(found, parents, at.actions, texts, hidden, is_new)
        found = dataclasses.replace(
            found, num_steps=found.num_steps + jnp.any(is_new).astype(jnp.int32)
        )
        # A terminal node is visited again, with the same value.
        is_again = is_live & ~is_new
        values = found.tree.raw_values[index, children]
        tree = trees.backup(found.tree, children, values, is_again)
        return pages, dataclasses.replace(found, tree=tree)

    def _add(
        self,
        found: Found,
        parents: jax.Array,
        actions: jax.Array,
        texts: Texts,
        hidden: jax.Array,
        is_live: jax.Array,
    ) -> Found:
        """Value new nodes, add them to their trees, and count their visits."""
        requests = self.requests
        with layer_kernels.serving(self.config.attention, self.config.batch_invariant):
            logits = self.model.logits(hidden)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        last = node_texts.last_tokens(texts)
        is_stop = jnp.any(last[:, None] == requests.stop_ids[None, :], axis=1)
        length = requests.prompt_lens + texts.lens
        is_terminal = (texts.lens > 0) & is_stop
        is_terminal |= (texts.lens >= requests.max_tokens) | (
            length >= requests.max_len
        )
        leaves = self._leaves(texts, hidden, logprobs, is_terminal)
        values = evaluate(self.value, leaves, requests.parameters)
        is_finite = jnp.isfinite(values)
        values = jnp.where(is_finite, values, 0.0)
        priors, tokens = lax.top_k(logprobs, self.sizes.num_actions)
        new = NewNodes(tokens.astype(jnp.int32), priors, values, is_terminal)
        nodes = found.tree.num_nodes
        tree = trees.add_nodes(found.tree, parents, actions, new, is_live)
        tree = trees.backup(tree, nodes, values, is_live)
        texts = dataclasses.replace(texts, values=values)
        at = jnp.where(is_live, nodes, self.sizes.num_nodes)
        is_best = is_live & is_terminal & (values > found.best.values)
        return dataclasses.replace(
            found,
            tree=tree,
            texts=jax.tree.map(
                lambda x, new: x.at[self.tree_index, at].set(new, mode="drop"),
                found.texts,
                texts,
            ),
            best=where_rows(is_best, texts, found.best),
            num_nodes=found.num_nodes + is_live.astype(jnp.int32),
            is_finite=found.is_finite & (is_finite | ~is_live),
        )

    def _leaves(
        self,
        texts: Texts,
        hidden: jax.Array,
        logprobs: jax.Array,
        is_terminal: jax.Array,
    ) -> Leaf:
        """Return the value function's arguments for B texts."""
        requests, vocab_size = self.requests, logprobs.shape[1]
        size = requests.tokens.shape[1] + self.sizes.max_tokens
        column = jnp.arange(size, dtype=jnp.int32)[None, :]
        start = requests.prompt_lens[:, None]
        prompts = jnp.pad(requests.tokens, ((0, 0), (0, self.sizes.max_tokens)))
        at = jnp.clip(column - start, 0, self.sizes.max_tokens - 1)
        outputs = jnp.take_along_axis(texts.tokens, at, axis=1)
        tokens = jnp.where(column < start, prompts, outputs)
        end = start + texts.lens[:, None]
        own = jnp.arange(self.sizes.max_tokens, dtype=jnp.int32)[None, :]
        known = jnp.where(own < texts.lens[:, None], texts.logprobs, 0.0)
        return Leaf(
            tokens=jnp.where(column < end, tokens, vocab_size),
            prompt_len=requests.prompt_lens,
            num_tokens=end[:, 0],
            logprob=jnp.sum(known, axis=1),
            logprobs=logprobs,
            hidden=hidden,
            is_terminal=is_terminal,
        )

    def _choose(self, pages: NodePages, found: Found) -> tuple[NodePages, Found]:
        """Choose a token of each root that has not ended; its node is the new root."""
        tree, requests, index = found.tree, self.requests, self.tree_index
        is_live = ~found.is_over
        used, copied = node_pages.count_blocks(pages, index.size)
        is_most = used > found.used_blocks
        visits = trees.root_visits(tree)
        keys = token_keys(
            requests.seeds,
            jnp.zeros_like(index),
            requests.prompt_lens + found.num_tokens,
        )
        scores = jnp.log(visits.astype(jnp.float32))
        actions = sample_rows(keys, scores, requests.temperature)
        nodes = jnp.where(is_live, tree.children[index, 0, actions], 0)
        safe = jnp.maximum(tree.children[:, 0], 0)
        values = jnp.take_along_axis(tree.values, safe, axis=1)
        at = jnp.where(is_live, found.num_tokens, self.sizes.max_tokens)

        def note(column: jax.Array, value: jax.Array) -> jax.Array:
            return column.at[index, at].set(value, mode="drop")

        steps = Steps(
            note(found.steps.tokens, tree.tokens[:, 0]),
            note(found.steps.visits, visits),
            note(found.steps.values, jnp.where(visits > 0, values, 0.0)),
        )
        tree, order = trees.reroot(tree, nodes, requests.reuses_tree)
        old = jnp.maximum(order, 0)
        texts = jax.tree.map(lambda x: x[index[:, None], old], found.texts)
        return node_pages.move(pages, order), dataclasses.replace(
            found,
            tree=tree,
            texts=texts,
            steps=steps,
            num_tokens=found.num_tokens + is_live.astype(jnp.int32),
            is_over=found.is_over | tree.is_terminal[:, 0],
            used_blocks=jnp.where(is_most, used, found.used_blocks),
            copied_blocks=jnp.where(is_most, copied, found.copied_blocks),
        )
