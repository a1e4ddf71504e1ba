"""Trains and evaluates the bundled model, a small Llama for Python source code.

    python -m experiments.train_tiny --evaluate
    python -m experiments.train_tiny --out tiny-python

The first command scores the bundled weights on the held-out twentieth of the Python
standard library, in about half a minute on two CPU cores. It uses the library of the
running Python, so the last digits depend on the version. The second command trains from
random weights, by default as the bundled model was trained. docs/tiny_model.md has
times and figures of both.

The learning rate is constant after a warmup and falls to zero over the last
`--decay_steps`; the length of a run can be changed while the rate is constant, and
`--resume` continues from a checkpoint. Windows are short until the last `--long_steps`,
because attention makes long windows slower.
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import tqdm
from absl import flags

from experiments.lib import python_text as text
from experiments.lib import runner, training
from jpaged.arithmetic import cdiv
from jpaged.models import ModelConfig, init_model, load_model, save_model
from jpaged.models.loading.sources import bundled_path
from jpaged.text.tokenizer import Tokenizer

MODEL = "tiny-python"
PROMPTS = ("def ", "import ", "class ", "for i in range(")


def _setting(default: int | float, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a training run; each field is a flag.

    The bundled model was trained with the defaults.
    """

    steps: int = _setting(1000, "Steps of the optimiser.")
    decay_steps: int = _setting(400, "Last steps, in which the learning rate falls.")
    long_steps: int = _setting(150, "Last steps, in which the windows are long.")
    warmup_steps: int = _setting(60, "First steps, in which the learning rate rises.")
    learning_rate: float = _setting(3e-3, "Learning rate between warmup and decay.")
    weight_decay: float = _setting(0.1, "Weight decay of the layers' matrices.")
    batch_tokens: int = _setting(2048, "Tokens per step.")
    length: int = _setting(512, "Tokens per long window and per scored window.")
    short_length: int = _setting(256, "Tokens per short window.")
    vocab_size: int = _setting(2048, "Tokens in the vocabulary.")
    hidden_size: int = _setting(256, "Hidden size of the model, a multiple of 128.")
    num_layers: int = _setting(4, "Layers of the model.")
    seed: int = _setting(0, "Seed of the weights and of the order of windows.")
    save_every: int = _setting(50, "Steps between checkpoints.")


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_bool("evaluate", False, "Only score --model.")
    flags.DEFINE_string(
        "model", None, f"Folder to score; default: the bundled {MODEL}."
    )
    flags.DEFINE_string("out", None, "Train, and write the model to this folder.")
    flags.DEFINE_bool(
        "resume", False, "Continue from the last checkpoint next to --out."
    )
    flags.DEFINE_integer("max_files", None, "Use about this many files; default: all.")
    for field in dataclasses.fields(Settings):
        default: Any = field.default
        define = flags.DEFINE_float if field.type is float else flags.DEFINE_integer
        define(field.name, default, field.metadata["help"])


def tiny_config(settings: Settings, bos: int, eos: int) -> ModelConfig:
    """A Llama with heads of 64, two per KV head, and tied embeddings."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        num_heads=settings.hidden_size // 64,
        num_kv_heads=settings.hidden_size // 128,
        head_dim=64,
        intermediate_size=settings.hidden_size * 11 // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_ids=(eos,),
    )


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path) -> None:
    """Writes tokenizer.json and the configuration files that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos = text.special_ids(tokenizer)
    files = {
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=text.BOS,
            eos_token=text.EOS,
            model_max_length=1024,
            clean_up_tokenization_spaces=False,
        ),
        "generation_config.json": dict(bos_token_id=bos, eos_token_id=eos),
    }
    for name, contents in files.items():
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n", "utf-8")


def training_windows(
    texts: list[str], tokenizer: tokenizers.Tokenizer, settings: Settings
) -> Iterator[np.ndarray]:
    """Yields the windows i32[B, T + 1] of every step: short ones, then long ones."""
    stream = text.token_stream(texts, tokenizer)
    make = functools.partial(
        text.training_batches,
        stream,
        text.line_starts(stream, tokenizer),
        bos=text.special_ids(tokenizer)[0],
    )
    num_long = min(settings.long_steps, settings.steps)
    phases = (
        (settings.steps - num_long, settings.short_length),
        (num_long, settings.length),
    )
    for phase, (num_steps, length) in enumerate(phases):
        rows = settings.batch_tokens // length
        endless = make(length=length, batch=rows, seed=2 * settings.seed + phase)
        for _ in range(num_steps):
            yield next(endless)


def train(
    texts: list[str],
    held_out: list[str],
    out: pathlib.Path,
    settings: Settings,
    *,
    resume: bool = False,
) -> list[tuple[int, float, float]]:
    """Trains from random weights or the last checkpoint, and writes the folder `out`.

    The state to resume from is written next to `out`.

    Args:
      texts: Training texts.
      held_out: Held-out texts.
      out: Folder for the model.
      settings: Settings of the run.
      resume: Whether to continue from the last checkpoint.

    Returns:
      For each checkpoint its step, the mean training loss since the previous one, and
      the loss on some of the held-out windows, in nats per token.
    """
    tokenizer = text.train_tokenizer(texts, settings.vocab_size)
    save_tokenizer(tokenizer, out)
    bos, eos = text.special_ids(tokenizer)
    model = init_model(tiny_config(settings, bos, eos), settings.seed)
    optimizer = training.make_optimizer(
        settings.steps,
        settings.warmup_steps,
        settings.decay_steps,
        settings.learning_rate,
        settings.weight_decay,
    )
    params: Any = model  # optax's types do not know nnx modules
    state, done = optimizer.init(params), 0
    state_file = out.with_name(out.name + ".state.safetensors")
    if resume:
        (model, state), done = training.restore_state(state_file, (model, state))
    windows, is_real = text.scoring_windows(
        text.token_stream(held_out, tokenizer), length=settings.length, bos=bos
    )
    few = slice(None, None, max(1, len(windows) // 32))
    curve, losses = [], []
    bar = tqdm.tqdm(training_windows(texts, tokenizer, settings), total=settings.steps)
    for step, rows in enumerate(bar, start=1):
        if step <= done:
            continue
        model, state, loss = training.train_step(
            optimizer, model, state, jnp.asarray(rows)
        )
        losses.append(loss)
        if step % settings.save_every == 0 or step == settings.steps:
            save_model(model, out, dtype="bfloat16")
            training.save_state(state_file, (model, state), step)
            nats = training.total_nats(model, windows[few], is_real[few])
            mean, nats = float(np.mean(losses)), nats / is_real[few].sum()
            losses = []
            curve.append((step, mean, nats))
            line = f"step {step:5d}  training {mean:.3f}  held out {nats:.3f}"
            bar.write(line, sys.stdout)
    return curve


def evaluate(
    folder: pathlib.Path, held_out: list[str], length: int
) -> dict[str, int | float]:
    """Computes the held-out loss of a saved model, in nats per token and bits per byte.

    Every token and every text's end is predicted once, from the tokens before it in its
    window.

    Args:
      folder: The model.
      held_out: Held-out texts.
      length: Tokens of a window.
    """
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load_model(folder, dtype="float32")
    stream = text.token_stream(held_out, backend)
    windows, is_real = text.scoring_windows(
        stream, length=length, bos=text.special_ids(backend)[0]
    )
    nats = training.total_nats(model, windows, is_real)
    num_bytes = sum(len(document.encode()) for document in held_out)
    return dict(
        nats_per_token=nats / len(stream),
        bits_per_byte=nats / float(np.log(2)) / num_bytes,
        num_tokens=len(stream),
        num_bytes=num_bytes,
        num_files=len(held_out),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(model)),
        size_bytes=sum(file.stat().st_size for file in folder.iterdir()),
    )


def show_completions(folder: pathlib.Path) -> None:
    """Prints the model's greedy continuation of each of PROMPTS."""
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    model = load_model(folder, dtype="float32")
    for prompt in PROMPTS:
        print(f"----\n{training.complete(model, tokenizer, prompt, 48)}")
    print("----")


def main(argv: list[str]) -> None:
    """Trains unless `--evaluate` is set, scores, and prints completions."""
    del argv
    with runner.user_errors("train_tiny"):
        if bool(FLAGS.out) == FLAGS.evaluate:
            got = "both" if FLAGS.evaluate else "neither"
            raise ValueError(
                f"--evaluate: expected either it, or --out to train, got {got}"
            )
    begin = time.perf_counter()
    files = text.library_files()
    files = files[:: cdiv(len(files), FLAGS.max_files or len(files))]
    texts, held_out = text.split_files(files)
    print(f"Python {sys.version}")
    print(f"{len(texts)} files to train on, {len(held_out)} held out", flush=True)
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(FLAGS, name) for name in names})
    if FLAGS.out:
        folder = pathlib.Path(FLAGS.out)
        train(texts, held_out, folder, settings, resume=FLAGS.resume)
    else:
        folder = pathlib.Path(FLAGS.model or bundled_path(MODEL))
    result: dict[str, Any] = evaluate(folder, held_out, settings.length)
    show_completions(folder)
    print(
        f"held out: {result['nats_per_token']:.4f} nats per token, "
        f"{result['bits_per_byte']:.4f} bits per byte, {result['num_tokens']} tokens"
    )
    result |= dict(
        seconds=time.perf_counter() - begin, flags=runner.flag_values(__name__)
    )
    runner.print_json(result)


if __name__ == "__main__":
    runner.start(main, define_flags)
