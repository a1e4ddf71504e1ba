"""Roofline: the duration of a step from the sizes of a model and the peaks of a chip.

Pipeline: served model, chip -> [roofline] -> cost model.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jpaged.simulator.costs.base import CostEntry, Machine
from jpaged.simulator.costs.chips import Chip
from jpaged.simulator.costs.features import features
from jpaged.simulator.costs.load import Number, StepLoad
from jpaged.simulator.costs.served_models import ServedModel, kv_bytes_on_chip
from jpaged.simulator.costs.transfers import Transfers
from jpaged.simulator.options import Option

# Host time of a step of the paper's vLLM (Python, sampling, launches). An empty
# decoding step of OPT-13B on one A100-80GB takes 23.5 ms by DistServe's fit of its
# measurements, of which this model explains 18.3 ms as time of the device.
VLLM_2023_STEP_S = 5.2e-3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Roofline:
    """A cost model of bytes and FLOPs; every field is a leaf, so each can be swept.

    The duration of a step is the sum of:
      matrix products of the layers: the longer of reading weights and computing;
      attention: for each row, the longer of reading its keys and values and computing;
      logits: the longer of reading weights and computing;
      the operations between the matrix products, by their bytes;
      two all-reduces per layer if there are several chips;
      copies and swapping;
      `layers_s` if any token is computed, and `step_s` if there is any work.
    Sizes and FLOPs are those of one chip.
    """

    weight_bytes: Number  # weights of the layers, without experts
    expert_bytes: Number  # of all experts of all layers
    unread_share: Number  # share of the experts that one token does not use
    token_flops: Number  # of one token in the layers
    head_bytes: Number  # weights of the product that computes logits
    head_flops: Number  # of one row of logits
    kv_bytes: Number  # of one token, all layers
    pair_flops: Number  # of one query and one key, all layers
    sliding_share: Number  # share of layers with a sliding window
    window: Number  # tokens of the sliding window
    activation_bytes: Number  # of one token, between the matrix products
    reduce_bytes: Number  # of one token, sent over the link; 0 on one chip
    memory_bytes_per_s: Number
    flops_per_s: Number
    link_bytes_per_s: Number  # of the whole all-reduce
    read_share: Number  # of memory_bytes_per_s, for weights and activations
    matmul_share: Number  # of flops_per_s
    attention_read_share: Number
    attention_matmul_share: Number
    layers_s: Number  # fixed time of all layers: launches and all-reduces
    step_s: Number  # host time of a step
    transfers: Transfers

    def __call__(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds."""
        work = features(load)
        reads = self.memory_bytes_per_s * self.read_share
        flops = self.flops_per_s * self.matmul_share
        tokens = work.num_tokens
        is_computing = (tokens > 0).astype(jnp.float32)
        read_experts = 1 - jnp.power(self.unread_share, tokens)
        weights = self.weight_bytes * is_computing + self.expert_bytes * read_experts
        layers = jnp.maximum(weights / reads, tokens * self.token_flops / flops)
        has_logits = (work.logits > 0).astype(jnp.float32)
        logits = jnp.maximum(
            has_logits * self.head_bytes / reads, work.logits * self.head_flops / flops
        )
        between = tokens * self.activation_bytes / reads
        reduced = tokens * self.reduce_bytes / self.link_bytes_per_s
        fixed = is_computing * self.layers_s + work.steps * self.step_s
        device = layers + self._attention(load) + logits + between + reduced
        return device + fixed + self.transfers(work)

    def _attention(self, load: StepLoad) -> jax.Array:
        """Return f32[], seconds of all rows."""
        chunks = load.query_lens.astype(jnp.float32)
        contexts = jnp.where(chunks > 0, load.context_lens.astype(jnp.float32), 0.0)
        full = self._rows(chunks, contexts, jnp.inf)
        slid = self._rows(chunks, contexts, self.window)
        share = self.sliding_share
        return jnp.sum(full * (1 - share) + slid * share)

    def _rows(
        self, chunks: jax.Array, contexts: jax.Array, window: Number
    ) -> jax.Array:
        """Return f32[S], seconds, if each query attends to its last `window` keys."""
        # The last `cut` queries attend to a window. Those before them attend to all
        # keys: the first to contexts - chunks + 1, the last to contexts - cut.
        cut = jnp.clip(contexts - window, 0.0, chunks)
        pairs = (chunks - cut) * (2 * contexts - chunks - cut + 1) / 2
        pairs += cut * jnp.minimum(window, contexts)
        read = jnp.minimum(contexts, window + chunks - 1)
        return jnp.maximum(
            read
            * self.kv_bytes
            / (self.memory_bytes_per_s * self.attention_read_share),
            pairs * self.pair_flops / (self.flops_per_s * self.attention_matmul_share),
        )

    @classmethod
    def of(
        cls,
        model: ServedModel,
        chip: Chip,
        num_chips: int = 1,
        *,
        step_s: float = 0.0,
        transfers: Transfers | None = None,
    ) -> Roofline:
        """Build the cost model of a model on chips with tensor parallelism.

        Args:
          model: as from `served_models.served_model`.
          chip: as from `chips.find_chip`, with its measured efficiency.
          num_chips: chips over which heads, weights and logits are divided evenly.
          step_s: host time of a step, a property of the engine and not of the chip: 0
            if the host prepares the next step in the meantime, `VLLM_2023_STEP_S` for
            the paper's engine.
          transfers: None: `Transfers.of` the same model and chips.

        Raises:
          ValueError: num_chips does not divide the heads, or step_s is below 0.
        """
        if num_chips < 1 or model.num_heads % num_chips:
            raise ValueError(
                f"num_chips: expected a divisor of {model.name}'s {model.num_heads} "
                f"heads, got {num_chips}"
            )
        if not step_s >= 0:
            raise ValueError(f"step_s: expected at least 0, got {step_s}")
        efficiency, layers = chip.efficiency, model.num_layers
        size = model.matrix_param_bytes
        # A ring sends each byte (n - 1) / n times in each of its two rounds.
        rounds = 2 * (num_chips - 1) / num_chips
        reduce_bytes = 2 * layers * rounds * model.hidden_size * model.dtype_bytes
        reduce_s = 2 * layers * efficiency.all_reduce_s if num_chips > 1 else 0.0
        unread = 1 - model.num_experts_per_token / max(model.num_experts, 1)
        return cls(
            weight_bytes=model.layer_params * size / num_chips,
            expert_bytes=model.expert_params * size / num_chips,
            unread_share=unread,
            token_flops=model.flops_per_token / num_chips,
            head_bytes=model.head_params * model.matrix_param_bytes / num_chips,
            head_flops=2 * model.head_params / num_chips,
            kv_bytes=kv_bytes_on_chip(model, num_chips),
            pair_flops=model.flops_per_pair / num_chips,
            sliding_share=model.num_sliding_layers / layers,
            window=float(model.sliding_window or 2**30),
            activation_bytes=model.activation_bytes_per_token / num_chips,
            reduce_bytes=reduce_bytes,
            memory_bytes_per_s=chip.memory_bytes_per_s,
            flops_per_s=chip.flops_per_s,
            link_bytes_per_s=chip.link_bytes_per_s * efficiency.link_share,
            read_share=efficiency.read_share,
            matmul_share=efficiency.matmul_share,
            attention_read_share=efficiency.attention_read_share,
            attention_matmul_share=efficiency.attention_matmul_share,
            layers_s=layers * efficiency.layer_s + reduce_s,
            step_s=step_s,
            transfers=transfers or Transfers.of(model, chip, num_chips),
        )


def _build(machine: Machine, *, step_s: float = VLLM_2023_STEP_S) -> Roofline:
    return Roofline.of(machine.model, machine.chip, machine.num_chips, step_s=step_s)


ENTRY = CostEntry(
    "roofline",
    _build,
    (
        Option(
            "step_s",
            "float",
            "Host seconds of a step; default: the paper's engine for a roofline, 0 for "
            "a profile.",
            minimum=0,
        ),
    ),
)
