"""Text of the Python standard library, as tokens: data for `train_tiny`.

Every machine that runs Python has it. Which files, in which order, and which of them
are held out depends on nothing but their names, so that two machines with the same
version of Python see the same text.

Shape letters: B batch, T tokens of a window.
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

# Tests, foreign code, and tables that programs wrote: no Python that people write.
SKIPPED_FOLDERS = frozenset(
    "test tests idle_test site-packages dist-packages lib2to3 __pycache__ "
    "encodings pydoc_data lib-dynload msilib".split()
)
SKIPPED_PREFIXES = ("_sysconfigdata", "html/entities", "__phello__", "config-")

# A word takes the single space that follows it along, not the one before it as in
# GPT-2: so the prompt "def " is the very token that stands before a name in the
# training text. Newlines and indentation are apart for the same reason.
SPLIT = r"\n+|[._]*\p{L}+ ?|\p{N}{1,3} ?|[^\s\p{L}\p{N}]+ ?| +|\s"


def library_files(root: pathlib.Path | None = None) -> list[tuple[str, str]]:
    """(relative name, text) of the library's modules, sorted by name.

    `root` replaces the running Python's own library. Files that are not UTF-8, or
    all but empty, are left out.
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
    """Whether a file is for evaluation: about one in twenty, by a hash of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def split_files(files: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Texts for training, and texts held out."""
    held_out = [text for name, text in files if is_held_out(name)]
    return [text for name, text in files if not is_held_out(name)], held_out


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-level BPE of `vocab_size` tokens that puts BOS before every text."""
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
    return tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)


def token_stream(texts: Sequence[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """All texts as one i32 array, each followed by EOS; no BOS."""
    _, eos = special_ids(tokenizer)
    batch = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, eos], np.int32) for e in batch])


def line_starts(stream: np.ndarray, tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Positions in `stream` where a line or a text begins, i32, ascending."""
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

    Each pass over the stream is cut into windows at another offset, in another order.
    Since BOS stands before lines from anywhere, a prompt may be any line, and not
    only the first line of a file.
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
    """The whole stream as windows i32[B, T + 1], each after BOS, and bool[B, T].

    The mask is False for the padding after the last token; every token of the stream
    is predicted exactly once.
    """
    num_rows = cdiv(len(stream), length)
    filled = np.zeros((num_rows * length,), np.int32)
    filled[: len(stream)] = stream
    is_real = np.arange(num_rows * length) < len(stream)
    windows = np.pad(
        filled.reshape(num_rows, length), ((0, 0), (1, 0)), constant_values=bos
    )
    return windows, is_real.reshape(num_rows, length)
