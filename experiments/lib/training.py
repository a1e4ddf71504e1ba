"""Training and scoring of a decoder on windows of tokens, for `train_tiny`.

The trained model is the decoder that the engine serves, called as `model(tokens)`.

Shape symbols: B batch, T tokens of a window.
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
from optax import contrib

from jpaged.arithmetic import cdiv
from jpaged.models import Decoder
from jpaged.text.tokenizer import Tokenizer

SCORED_ROWS = 8  # windows scored in one call
LENGTH_STEP = 64  # lengths are rounded up to multiples, so that few programs compile


def token_losses(model: Decoder, windows: jax.Array) -> jax.Array:
    """-log p of every token after the first: f32[B, T] for windows i32[B, T + 1]."""
    logits = model(windows[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])


@functools.cache  # equal arguments return one object, so train_step compiles once
def make_optimizer(
    steps: int, warmup: int, decay: int, rate: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon with gradients clipped to norm 1 and a trapezoidal learning rate.

    Adam updates what Muon does not: embeddings and norms.

    The rate rises linearly, stays constant, and falls linearly to zero. While it is
    constant, the number of steps may still change: longer runs start identically.

    Args:
      steps: Total steps.
      warmup: Steps in which the rate rises.
      decay: Last steps, in which it falls.
      rate: The constant learning rate.
      weight_decay: For matrices inside of layers, which Muon updates.
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
        contrib.muon(
            schedule,
            weight_decay=weight_decay,
            adam_b2=0.95,
            consistent_rms=0.2,  # the size of Adam's updates, so one rate serves both
            muon_weight_dimension_numbers=_muon_dimensions,
        ),
    )


def _muon_dimensions(params: Any) -> Any:
    """Says which leaves Muon updates: matrices inside of layers."""

    def dimensions(path: Any, leaf: jax.Array) -> contrib.MuonDimensionNumbers | None:
        is_inner = "layers" in jax.tree_util.keystr(path) and leaf.ndim == 2
        return contrib.MuonDimensionNumbers() if is_inner else None

    return jax.tree.map_with_path(dimensions, params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def train_step(
    optimizer: optax.GradientTransformation,
    model: Decoder,
    state: optax.OptState,
    windows: jax.Array,
) -> tuple[Decoder, optax.OptState, jax.Array]:
    """Trains on windows i32[B, T + 1]; donates `model` and `state`.

    Returns:
      The model and the optimiser's state after the step, and the loss before it.
    """
    loss, grads = jax.value_and_grad(lambda m: token_losses(m, windows).mean())(model)
    # optax's types do not know nnx modules, which are pytrees too.
    params: Any = model
    # optax mixes dtypes, for example in beta ** count.
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(grads, state, params)
    trained: Any = optax.apply_updates(params, updates)
    return trained, state, loss


_token_losses = jax.jit(token_losses)
_forward = jax.jit(lambda model, tokens: model(tokens))


def total_nats(model: Decoder, windows: np.ndarray, is_real: np.ndarray) -> float:
    """Sums -log p over the real tokens, in nats.

    Args:
      model: The decoder.
      windows: i32[B, T + 1]; every token after the first of a window is predicted.
      is_real: bool[B, T], which of the predicted tokens count.
    """
    total = 0.0
    for i in range(0, len(windows), SCORED_ROWS):
        some = windows[i : i + SCORED_ROWS]
        rows = np.zeros((SCORED_ROWS, windows.shape[1]), np.int32)
        rows[: len(some)] = some
        losses = np.asarray(_token_losses(model, jnp.asarray(rows)), np.float64)
        total += losses[: len(some)][is_real[i : i + SCORED_ROWS]].sum()
    return float(total)


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    num_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Continues a prompt by up to `num_tokens` tokens; returns prompt and output.

    Each token is a full forward pass: slow, and independent of the engine.
    """
    ids = tokenizer.encode(prompt)
    rng = np.random.default_rng(seed)
    for _ in range(num_tokens):
        tokens = np.zeros((1, cdiv(len(ids), LENGTH_STEP) * LENGTH_STEP), np.int32)
        tokens[0, : len(ids)] = ids
        logits = np.asarray(_forward(model, jnp.asarray(tokens))[0, len(ids) - 1])
        if temperature > 0:
            # Gumbel-max: the argmax is a sample from the softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        ids.append(int(logits.argmax()))
        if ids[-1] in model.config.eos_token_ids:
            break
    return tokenizer.decode(ids)


def save_state(file: pathlib.Path, tree: Any, step: int) -> None:
    """Writes all arrays of a pytree and the step, for `restore_state`."""
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(tree))}
    partial = file.with_suffix(".partial")
    safetensors.numpy.save_file(leaves, partial, metadata={"step": str(step)})
    partial.replace(file)


def restore_state(file: pathlib.Path, like: Any) -> tuple[Any, int]:
    """Reads what `save_state` wrote.

    Args:
      file: The file.
      like: A pytree of the same structure and shapes.

    Returns:
      The pytree and the step.

    Raises:
      ValueError: The file has the state of a model with other shapes.
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
