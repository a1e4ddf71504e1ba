"""A tiny checkpoint with a tokenizer, the canonical sizes of its LLM, and fixtures.

Tests of the LLM use few configurations, because each compiles the engine: the plain
one here (SIZES), the plain one after a beam search of width 2, and that of
`tests.support.engine.full_llm`, which has all features.
"""

import itertools
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jpaged.llm import LLM
from jpaged.models.decoder import Decoder
from jpaged.models.loading.checkpoint import load_model
from jpaged.outputs import RequestOutput
from jpaged.params import SamplingParams
from jpaged.serving.stepping import Stepper
from tests.support.models.checkpoints import write_tiny_llama

VOCAB_SIZE = 300
MAX_LEN = 64
EOS = (1, 40, 80, 120, 160, 200)  # several, so that some greedy outputs reach one
SIZES = dict(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    block_size=4,
    num_blocks=32,
    max_model_len=MAX_LEN,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def ascii_tokenizer() -> tokenizers.Tokenizer:
    """A tokenizer with one or two ASCII characters per token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    singles = [chr(code) for code in range(32, 127)]
    pairs = map("".join, itertools.product(letters, letters))
    words = ["<s>", "</s>", *singles, *pairs][:VOCAB_SIZE]
    vocab = {word: token for token, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer: characters can extend over several tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["日本語の文章 naïve café 😀😀"], trainer)
    return backend


def write_folder(path: pathlib.Path) -> pathlib.Path:
    """Write the checkpoint with the ASCII tokenizer."""
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, eos_token_id=list(EOS))
    ascii_tokenizer().save(str(path / "tokenizer.json"))
    return path


def random_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    """Prompts of random tokens and of random lengths below `longest`."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, size=count)
    return [rng.integers(2, VOCAB_SIZE, size=size).tolist() for size in sizes]


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[Sequence[int]]]:
    """The token ids of all outputs of all requests."""
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def is_idle(llm: LLM) -> bool:
    """Whether no request and no block is left in the engine."""
    host = llm._host
    assert host is not None
    assert llm.stats()["num_free_blocks"] == llm.config.num_blocks
    return host.num_empty == llm.config.max_num_requests and llm._batcher.num_open == 0


def lose_state(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt a call after the old state is deleted and before there is a new one."""
    run = Stepper.run

    def interrupted(self, state, used, **limits):
        run(self, state, used, **limits)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([9], GREEDY)


class NaiveLoop:
    """Greedy decoding that recomputes all tokens for each new one."""

    def __init__(self, decoder: Decoder):
        self._forward = jax.jit(lambda tokens: decoder(tokens))
        self._known: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def logits_of(self, token_ids: Sequence[int]) -> np.ndarray:
        """f64[MAX_LEN, V]; rows after `token_ids` are padding."""
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(token_ids)] = token_ids
        return np.asarray(self._forward(jnp.asarray(padded)), np.float64)[0]

    def __call__(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The generated tokens."""
        key = (tuple(prompt), num_tokens)
        if key not in self._known:
            token_ids = list(prompt)
            for _ in range(num_tokens):
                token_ids.append(
                    int(self.logits_of(token_ids)[len(token_ids) - 1].argmax())
                )
            self._known[key] = token_ids[len(prompt) :]
        return self._known[key]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def decoder(folder: pathlib.Path) -> Decoder:
    """Its model in float32."""
    return load_model(folder, "float32")


@pytest.fixture(scope="session")
def naive(decoder: Decoder) -> NaiveLoop:
    """What greedy decoding should generate."""
    return NaiveLoop(decoder)


@pytest.fixture(scope="session")
def plain_llm(folder: pathlib.Path) -> LLM:
    """An LLM of SIZES; tests may only use features that compile nothing new."""
    return LLM(folder, **SIZES)
