"""An LLM whose engine is compiled for all features at once, and a reference for it.

All test modules that use it share one compiled program. The reference recomputes every
token with the plain forward pass in a loop, and applies the logits rules in numpy.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.decoding.sample import SamplingRows, sample
from jpaged.llm import LLM
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
    StructuredOutputsParams,
)
from tests.engine.algorithms_test import race
from tests.support.tiny_llm import EOS, VOCAB_SIZE, write_folder

MAX_LEN = 64
SIZES = dict(
    max_num_seqs=8,
    max_num_batched_tokens=16,  # most prompts need several steps
    block_size=4,
    num_blocks=48,
    max_model_len=MAX_LEN,
    max_num_requests=40,
    max_logprobs=VOCAB_SIZE,
    max_num_prefixes=2,
)
# Without the letter n: its token is an EOS token of these checkpoints.
SCHEMA = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "a": {"enum": ["ab", "xyz", 7]},
        "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["ok", "a", "b"],
    "additionalProperties": False,
}
REGEX = r"(ab|ba){1,3}[0-9]{2}(x|yz)?"
CHOICES = ("yes", "oh", "yesterday", "ever")
CONSTRAINTS = {
    "json": StructuredOutputsParams(json=SCHEMA),
    "regex": StructuredOutputsParams(regex=REGEX),
    "choice": StructuredOutputsParams(choice=CHOICES),
    "one letter": StructuredOutputsParams(choice=["a"]),
}
Mask = Callable[[list[int]], np.ndarray]  # output so far -> bool[V], allowed tokens


def make_folder(root: pathlib.Path) -> pathlib.Path:
    return write_folder(root / "tiny")


def grow(llm: LLM) -> None:
    """Use all features, and compile all sizes: later calls compile nothing."""
    rules = SamplingParams(
        max_tokens=2,
        logit_bias=dict.fromkeys(range(4), 1.0),
        allowed_token_ids=range(VOCAB_SIZE),
        bad_words=[[9, 8, 7, 6]] * 8,
        logprobs=-1,
        prompt_logprobs=-1,
        top_p=0.9,
    )
    params = [
        rules,
        BeamSearchParams(8, 2),
        AlgorithmParams(race, 4, max_tokens=2),
        *(
            SamplingParams(max_tokens=50, structured_outputs=constraint, seed=0)
            for constraint in CONSTRAINTS.values()
        ),
    ]
    llm.generate([[5, 6]] * len(params), params)
    llm.warm_up(params)


def is_idle(llm: LLM) -> bool:
    """Whether the engine has no sequences but pinned prefixes."""
    host = llm._host
    assert host is not None
    table_size = llm.config.max_num_requests - len(host.pinned)
    return host.num_empty == table_size and llm._batcher.num_open == 0


@functools.cache
def _forward() -> Callable:
    return jax.jit(lambda model, tokens: model(tokens))


class Oracle:
    """The expected output of a request, token by token."""

    def __init__(self, llm: LLM):
        self.model, self.tokenizer = llm.model, llm.tokenizer
        assert self.tokenizer is not None
        self.pieces = [self.tokenizer.decode([t]) for t in range(VOCAB_SIZE)]

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """f32[T, V] of the plain forward pass."""
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(token_ids)] = token_ids
        found = _forward()(self.model, jnp.asarray(padded))
        return np.asarray(found)[0, : len(token_ids)]

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """f64[T, V], log-softmax."""
        logits = self.logits(token_ids).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    def tokens(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        number: int = 0,
        mask: Mask | None = None,
    ) -> tuple[list[int], str]:
        """Tokens of a request's sample `number`, and the reason of its end; no stop
        strings."""
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(EOS))
        output: list[int] = []
        while True:
            logits = self.logits([*prompt, *output])[-1].copy()
            change(logits, params, prompt, output, stops)
            if mask is not None:
                logits[~mask(output)] = -np.inf
            if np.all(logits == -np.inf):
                return output, "dead_end"
            output.append(draw(logits, params, number, len(prompt) + len(output)))
            if output[-1] in stops:
                return output, "stop"
            full = len(prompt) + len(output) == MAX_LEN
            if len(output) == params.max_tokens or full:
                return output, "length"

    def choice_mask(self, choices: Sequence[str]) -> Mask:
        """Allow the tokens after which one of the choices is still possible."""

        def mask(output: list[int]) -> np.ndarray:
            text = "".join(self.pieces[token] for token in output)
            allowed = np.zeros(VOCAB_SIZE, bool)
            for token, piece in enumerate(self.pieces):
                if token in EOS:
                    allowed[token] = text in choices
                elif piece:
                    allowed[token] = any(c.startswith(text + piece) for c in choices)
            return allowed

        return mask


def change(logits, params: SamplingParams, prompt, output, stops) -> None:
    """Apply the logits rules of a request in place, in vLLM's order."""
    if params.allowed_token_ids is not None:
        for token in range(len(logits)):
            if token not in params.allowed_token_ids:
                logits[token] = -np.inf
    for word in params.bad_words:
        *before, last = word
        if not before or list(output[-len(before) :]) == before:
            logits[last] = -np.inf
    if len(output) < params.min_tokens:
        logits[list(stops)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += np.float32(bias)
    for token in {*prompt, *output}:
        penalty = np.float32(params.repetition_penalty)
        logits[token] *= penalty if logits[token] < 0 else 1 / penalty
    for token in set(output):
        logits[token] -= np.float32(params.frequency_penalty) * output.count(token)
        logits[token] -= np.float32(params.presence_penalty)


def draw(logits, params: SamplingParams, number: int, position: int) -> int:
    if params.temperature == 0:
        return int(logits.argmax())

    def column(value, kind):
        return jnp.asarray([value], kind)

    rows = SamplingRows(
        temperature=column(params.temperature, jnp.float32),
        top_k=column(params.top_k, jnp.int32),
        top_p=column(params.top_p, jnp.float32),
        min_p=column(params.min_p, jnp.float32),
        seed=column(params.seed, jnp.uint32),
        sample=column(number, jnp.int32),
    )
    tokens, _ = _sample()(jnp.asarray(logits)[None], rows, column(position, jnp.int32))
    return int(tokens[0])


@functools.cache
def _sample() -> Callable:
    return jax.jit(sample)
