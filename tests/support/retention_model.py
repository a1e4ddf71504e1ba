"""Retention in plain Python and dense attention: what the engine should compute.

Nothing here uses `jpaged.retention` or pages. A rule gets the positions that a sequence
has stored, block by block, and returns the blocks that stay; the model is then
evaluated at all positions at once, with a mask that shows each token what was stored
when it was computed.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.decoder import Decoder

Blocks = list[list[int]]  # positions of the tokens in each block
Rule = Callable[[Blocks], set[int]]  # numbers of the blocks that stay


def sink_and_window(num_sinks: int, window: int) -> Rule:
    """The blocks with one of the first or of the last stored tokens."""

    def rule(blocks: Blocks) -> set[int]:
        stored = [(i, p) for i, block in enumerate(blocks) for p in block]
        kept = stored[:num_sinks] + stored[max(0, len(stored) - window) :]
        return {i for i, _ in kept}

    return rule


def is_decision(computed: int, prompt_len: int, every: int, prompt_every: int) -> bool:
    """Whether blocks are dropped after so many tokens."""
    if computed < prompt_len:
        return prompt_every > 0 and computed % prompt_every == 0
    behind = computed - prompt_len
    return behind == 0 or (every > 0 and behind % every == 0)


def visible_tokens(
    num_tokens: int,
    prompt_len: int,
    block_size: int,
    rule: Rule,
    every: int = 16,
    prompt_every: int = 0,
) -> tuple[np.ndarray, list[int]]:
    """Which tokens each token sees, bool[T, T], and the positions stored at the end."""
    mask = np.zeros((num_tokens, num_tokens), np.bool_)
    blocks: Blocks = []
    for position in range(num_tokens):
        if not blocks or len(blocks[-1]) == block_size:
            blocks.append([])
        blocks[-1].append(position)
        mask[position, [p for block in blocks for p in block]] = True
        if is_decision(position + 1, prompt_len, every, prompt_every):
            kept = rule(blocks) | {len(blocks) - 1}
            blocks = [block for i, block in enumerate(blocks) if i in kept]
    return mask, [p for block in blocks for p in block]


class DenseModel:
    """Logits of a decoder with any mask, without pages."""

    def __init__(self, decoder: Decoder):
        self._decoder = decoder
        self._logits = jax.jit(self._compute)

    def _compute(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            groups = q.shape[1] // k.shape[1]
            k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
            scale = self._decoder.attention_options(layer)["scale"]
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            scores = jnp.einsum("thd,shd->hts", q, k, precision="highest") * scale
            weights = jax.nn.softmax(jnp.where(mask[None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("hts,shd->thd", weights, v, precision="highest")

        positions = jnp.arange(tokens.size, dtype=jnp.int32)
        hidden = self._decoder.trunk(tokens, positions, attend)
        return self._decoder.logits(hidden)

    def logits(self, tokens: Sequence[int], mask: np.ndarray, size: int) -> np.ndarray:
        """f32[T, V]; `size` is the padded number of tokens."""
        padded = np.zeros((size,), np.int32)
        padded[: len(tokens)] = tokens
        full = np.eye(size, dtype=np.bool_)
        full[: len(mask), : len(mask)] = mask[:size, :size]
        return np.asarray(self._logits(padded, full))[: len(tokens)]

    def greedy(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        mask: np.ndarray,
        size: int,
    ) -> list[int]:
        """The tokens that greedy decoding generates with this mask."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            seen = mask[: len(tokens), : len(tokens)]
            tokens.append(int(self.logits(tokens, seen, size)[-1].argmax()))
        return tokens[len(prompt) :]


Seen = tuple[np.ndarray, np.ndarray]  # weights [T, T], norms of keys [T]
# (blocks, statistic of each block) -> numbers of the blocks that stay
ScoredRule = Callable[[Blocks, list[float]], set[int]]


class ObservedModel(DenseModel):
    """A dense model that shows its attention weights and keys."""

    def __init__(self, decoder: Decoder):
        super().__init__(decoder)
        self._observe = jax.jit(self._compute_observed)

    def _compute_observed(self, tokens: jax.Array, mask: jax.Array) -> tuple:
        found: list[tuple[jax.Array, jax.Array]] = []

        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            groups = q.shape[1] // k.shape[1]
            norms = jnp.sqrt((k**2).sum(-1)).mean(1)
            k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
            scores = jnp.einsum("thd,shd->hts", q, k, precision="highest")
            scores = jnp.where(mask[None], scores * q.shape[-1] ** -0.5, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1)
            found.append((weights.mean(0), norms))
            return jnp.einsum("hts,shd->thd", weights, v, precision="highest")

        positions = jnp.arange(tokens.size, dtype=jnp.int32)
        hidden = self._decoder.trunk(tokens, positions, attend)
        weights, norms = (jnp.stack(one).mean(0) for one in zip(*found, strict=True))
        return self._decoder.logits(hidden), weights, norms

    def generate(
        self,
        prompt: Sequence[int],
        num_tokens: int,
        size: int,
        *,
        block_size: int,
        rule: ScoredRule,
        statistic: str,
        queries: int = 1,
        every: int = 16,
        prompt_every: int = 0,
    ) -> list[int]:
        """Greedy tokens; all statistics are recomputed at each decision."""
        tokens, blocks, last = list(prompt), [], 0
        mask = np.eye(size, dtype=np.bool_)
        for position in range(len(prompt) + num_tokens - 1):
            if not blocks or len(blocks[-1]) == block_size:
                blocks.append([])
            blocks[-1].append(position)
            mask[position, [p for block in blocks for p in block]] = True
            computed = position + 1
            decides = is_decision(computed, len(prompt), every, prompt_every)
            if not decides and computed < len(tokens):
                continue
            padded = np.zeros((size,), np.int32)
            padded[: len(tokens)] = tokens
            logits, weights, norms = map(np.asarray, self._observe(padded, mask))
            if computed == len(tokens):
                tokens.append(int(logits[position].argmax()))
            if not decides:
                continue
            first = max(computed - queries, last) if statistic == "recent" else 0
            got = weights[first:computed].sum(0)
            values = norms if statistic == "key_norm" else got
            total = np.mean if statistic == "key_norm" else np.sum
            scores = [float(total(values[block])) for block in blocks]
            kept, last = rule(blocks, scores) | {len(blocks) - 1}, computed
            blocks = [block for i, block in enumerate(blocks) if i in kept]
        return tokens[len(prompt) :]


def highest(blocks: Blocks, scores: list[float], max_tokens: int) -> set[int]:
    """The blocks with the highest scores; the last one comes first."""
    most = max(max_tokens // max(map(len, blocks)), 1)
    last = len(blocks) - 1
    order = sorted(
        range(len(blocks)), key=lambda i: (i == last, scores[i], i), reverse=True
    )
    return set(order[:most])


def recent_blocks(blocks: Blocks, recent: int) -> set[int]:
    """The blocks with one of the last stored tokens."""
    stored = [i for i, block in enumerate(blocks) for _ in block]
    return set(stored[len(stored) - recent :]) if recent else set()


class ReadingModel:
    """Greedy decoding in which generated tokens read the blocks of highest bounds."""

    def __init__(self, decoder: Decoder, block_size: int, max_tokens: int):
        self._decoder, self._block_size = decoder, block_size
        self._most = max(max_tokens // block_size, 1)
        self._logits = jax.jit(self._compute)

    def _mask(self, q: jax.Array, k: jax.Array, prompt_len: jax.Array) -> jax.Array:
        """bool[T, T] of a layer, from queries [T, H, D] and keys [T, H, D]."""
        size, number = len(q), len(q) // self._block_size
        blocks = k.reshape(number, self._block_size, *k.shape[1:])
        low, high = blocks.min(1), blocks.max(1)
        bound = jnp.maximum(q[:, None] * low[None], q[:, None] * high[None])
        bound = bound.sum((-1, -2))  # [T, blocks]
        position, block = jnp.arange(size)[:, None], jnp.arange(number)[None, :]
        own = position // self._block_size
        bound = jnp.where(block == own, jnp.inf, bound)
        bound = jnp.where(block > own, -jnp.inf, bound)
        rank = (bound[:, None, :] > bound[:, :, None]).sum(-1)
        is_read = (rank < self._most) | (position < prompt_len)
        return jnp.repeat(is_read, self._block_size, axis=1)

    def _compute(self, tokens: jax.Array, prompt_len: jax.Array) -> jax.Array:
        def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            groups = q.shape[1] // k.shape[1]
            k, v = jnp.repeat(k, groups, axis=1), jnp.repeat(v, groups, axis=1)
            mask = jnp.tril(self._mask(q, k, prompt_len))
            scores = jnp.einsum("thd,shd->hts", q, k, precision="highest")
            scores = jnp.where(mask[None], scores * q.shape[-1] ** -0.5, -jnp.inf)
            weights = jax.nn.softmax(scores, axis=-1)
            return jnp.einsum("hts,shd->thd", weights, v, precision="highest")

        positions = jnp.arange(tokens.size, dtype=jnp.int32)
        return self._decoder.logits(self._decoder.trunk(tokens, positions, attend))

    def greedy(self, prompt: Sequence[int], num_tokens: int, size: int) -> list[int]:
        """The tokens that greedy decoding generates."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            padded = np.zeros((size,), np.int32)
            padded[: len(tokens)] = tokens
            logits = self._logits(padded, np.int32(len(prompt)))
            tokens.append(int(np.asarray(logits)[len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]
