"""The Python standard library as tokens: training data of `train_tiny`.

Every machine that runs Python has this text. Only the files' names decide which files
are used, in which order, and which are held out, so that machines with the same version
of Python use the same text.

Shape symbols: B batch, T tokens of a window.
"""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jpaged.arithmetic import cdiv

BOS, EOS = "<|bos|>", "<|endoftext|>"
HELD_OUT_PER_MILLE = 50

# Tests, third-party code and generated tables are not typical Python.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages lib2to3 __pycache__ "
    "encodings pydoc_data lib-dynload msilib".split()
)
SKIPPED_PREFIXES = ("_sysconfigdata", "html/entities", "__phello__", "config-")

# A word includes the single space after it; in GPT-2 it includes the space before it.
# The prompt "def " is therefore the same token as in the training text before a name.
# Newlines and indentation are separate pieces for the same reason.
SPLIT = r"\n+|[._]*\p{L}+ ?|\p{N}{1,3} ?|[^\s\p{L}\p{N}]+ ?| +|\s"


def library_files(root: pathlib.Path | None = None) -> list[tuple[str, str]]:
    """The library's modules as (relative name, text), sorted by name.

    Files that are not UTF-8 or have fewer than 64 characters are left out.

    Args:
      root: Folder of the library; None: that of the running Python.
    """
    root = root or pathlib.Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        folders = name.split("/")[:-1]
        if SKIPPED_FOLDERS.intersection(folders) or name.startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if len(text) >= 64:
            found.append((name, text))
    return sorted(found)


def is_held_out(name: str) -> bool:
    """Whether a file is held out: about one in twenty, by a hash of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def split_files(files: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Splits files into texts for training and held-out texts."""
    held_out = [text for name, text in files if is_held_out(name)]
    return [text for name, text in files if not is_held_out(name)], held_out


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer that puts BOS before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, special_ids(tokenizer)[0])],
    )
    return tokenizer


def special_ids(tokenizer: tokenizers.Tokenizer) -> tuple[int, int]:
    """Ids of BOS and EOS."""
    bos, eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    assert bos is not None
    assert eos is not None
    return bos, eos


def token_stream(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """All texts as one i32 array, each text followed by EOS, without BOS."""
    _, eos = special_ids(tokenizer)
    batch = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, eos], np.int32) for e in batch])


def line_starts(stream: np.ndarray, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Positions in `stream` where a line or a text starts, ascending."""
    ends_line = np.array(
        [
            tokenizer.decode([i], skip_special_tokens=False).endswith(("\n", EOS))
            for i in range(tokenizer.get_vocab_size())
        ]
    )
    return np.flatnonzero(np.concatenate([[True], ends_line[stream[:-1]]]))


def training_batches(
    stream: np.ndarray,
    starts: np.ndarray,
    *,
    length: int,
    batch: int,
    bos: int,
    seed: int,
) -> Iterator[np.ndarray]:
    """Endless batches i32[B, T + 1]: BOS, then `length` tokens from a line's start.

    Each pass over the stream cuts it into windows at another offset and in another
    order. BOS precedes lines from anywhere, so that a prompt may be any line and not
    only the first line of a file.

    Args:
      stream: i32, from `token_stream`.
      starts: Positions of lines, from `line_starts`.
      length: Tokens T of a window, without BOS.
      batch: Windows B in a batch.
      bos: Id of BOS.
      seed: Seed of offsets and order.
    """
    rng = np.random.default_rng(seed)
    while True:
        begins = np.arange(rng.integers(length), len(stream) - length, length)
        begins = starts[np.searchsorted(starts, begins, side="right") - 1]
        begins = rng.permutation(begins)
        for i in range(0, len(begins) - batch + 1, batch):
            rows = begins[i : i + batch, None] + np.arange(length)[None, :]
            yield np.pad(stream[rows], ((0, 0), (1, 0)), constant_values=bos)


def scoring_windows(
    stream: np.ndarray, *, length: int, bos: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream into windows in which every token is predicted exactly once.

    Args:
      stream: i32, from `token_stream`.
      length: Tokens T of a window, without BOS.
      bos: Id of BOS, which starts every window.

    Returns:
      Windows i32[B, T + 1], and bool[B, T], False for the padding after the last token.
    """
    num_rows = cdiv(len(stream), length)
    filled = np.zeros((num_rows * length,), np.int32)
    filled[: len(stream)] = stream
    is_real = np.arange(num_rows * length) < len(stream)
    windows = np.pad(
        filled.reshape(num_rows, length), ((0, 0), (1, 0)), constant_values=bos
    )
    return windows, is_real.reshape(num_rows, length)
