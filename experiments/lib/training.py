"""Training and scoring of a decoder on windows of tokens: what `train_tiny` is made of.

The model that is trained is the one that the engine serves: `model(tokens)`.

Shape letters: B batch, T tokens of a window.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy

from jpaged.arithmetic import cdiv
from jpaged.models import Decoder
from jpaged.text.tokenizer import Tokenizer

ROWS = 8  # windows scored at once
ROOM = 64  # lengths are rounded up to multiples of it, to compile few programs


def token_losses(model: Decoder, windows: jax.Array) -> jax.Array:
    """-log p of each token but the first, f32[B, T] of windows i32[B, T + 1]."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


@functools.cache  # the same object for the same numbers: train_step compiles once
def make_optimizer(
    steps: int, warmup: int, decay: int, rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """AdamW, gradients clipped to norm 1; the rate rises, is level, and falls to zero.

    The level part makes the length of a run a late decision: a run of more steps has
    the same beginning.
    """
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, rate, warmup),
            optax.constant_schedule(rate),
            optax.linear_schedule(rate, 0.0, decay),
        ],
        [warmup, max(warmup, steps - decay)],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    optimizer: optax.GradientTransformation,
    model: Decoder,
    state: optax.OptState,
    windows: jax.Array,
) -> tuple[Decoder, optax.OptState, jax.Array]:
    """One step on windows i32[B, T + 1]: model, state and the loss before it.

    Donates `model` and `state`.
    """
    loss, grads = jax.value_and_grad(lambda m: token_losses(m, windows).mean())(model)
    # optax mixes dtypes on purpose, as in beta ** count.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state, model)
    return optax.apply_updates(model, updates), state, loss


_token_losses = jax.jit(token_losses)
_forward = jax.jit(lambda model, tokens: model(tokens))


def score(model: Decoder, windows: np.ndarray, is_real: np.ndarray) -> float:
    """Sum of -log p in nats over the tokens that are real.

    Args:
      model: the decoder.
      windows: i32[B, T + 1]; each token but the first of a window is predicted.
      is_real: bool[B, T], which of the predicted tokens count.
    """
    total = 0.0
    for i in range(0, len(windows), ROWS):
        some = windows[i : i + ROWS]
        rows = np.zeros((ROWS, windows.shape[1]), np.int32)
        rows[: len(some)] = some
        losses = np.asarray(_token_losses(model, jnp.asarray(rows)), np.float64)
        total += losses[: len(some)][is_real[i : i + ROWS]].sum()
    return float(total)


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """`prompt` and up to `num_tokens` tokens after it.

    By a whole forward pass per token: slow, and shares nothing with the engine.
    """
    ids = tokenizer.encode(prompt)
    rng = np.random.default_rng(seed)
    for _ in range(num_tokens):
        tokens = np.zeros((1, cdiv(len(ids), ROOM) * ROOM), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(_forward(model, jnp.asarray(tokens))[0, len(ids) - 1])
        if temperature > 0:
            # Gumbel's trick: the largest of these is a sample from the softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        ids.append(int(logits.argmax()))
        if ids[-1] in model.config.eos_token_ids:
            break
    return tokenizer.decode(ids)


def save_state(file: pathlib.Path, tree: Any, step: int) -> None:
    """Writes all arrays of a pytree, and the step, to go on from."""
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    partial = file.with_suffix(".partial")
    safetensors.numpy.save_file(leaves, partial, metadata={"step": str(step)})
    partial.replace(file)


def restore_state(file: pathlib.Path, like: Any) -> tuple[Any, int]:
    """What `save_state` wrote, in the form of `like`, and the step.

    Raises:
      ValueError: the file holds the state of a model of another shape.
    """
    leaves, treedef = jax.tree.flatten(like)
    with safetensors.safe_open(file, framework="numpy") as stored:
        names = stored.keys()
        if len(names) != len(leaves):
            raise ValueError(f"{file}: expected {len(leaves)} arrays, got {len(names)}")
        read = [jnp.array(stored.get_tensor(str(i))) for i in range(len(leaves))]
        step = int(stored.metadata()["step"])
    for old, new in zip(leaves, read, strict=True):
        if old.shape != new.shape:
            raise ValueError(f"{file}: expected shape {old.shape}, got {new.shape}")
    return jax.tree.unflatten(treedef, read), step
