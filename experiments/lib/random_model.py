"""A Llama with random weights, whose sizes are flags of the runners that time it."""

from __future__ import annotations

from absl import flags

from jpaged.models import Decoder, ModelConfig, init_model

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags belong to the runner that asks for them

# 110M parameters with the output tied to the embedding.
DEFAULT_SIZES = dict(
    hidden_size=768,
    layers=12,
    heads=12,
    kv_heads=4,
    intermediate_size=2048,
    vocab_size=32000,
)
_HELP = dict(
    hidden_size="Hidden size of the model.",
    layers="Layers of the model.",
    heads="Query heads of the model.",
    kv_heads="Key and value heads of the model.",
    intermediate_size="Inner size of the model's MLP.",
    vocab_size="Tokens in the model's vocabulary.",
)


def define_flags(**sizes: int) -> None:
    """Defines a flag for each size; `sizes` replace `DEFAULT_SIZES`."""
    for name, default in (DEFAULT_SIZES | sizes).items():
        flags.DEFINE_integer(name, default, _HELP[name], lower_bound=1)


def make_random_model(
    max_len: int, seed: int, *, initializer_range: float = 0.02, norm_eps: float = 1e-6
) -> Decoder:
    """Initialises a decoder with the sizes of the flags.

    Args:
      max_len: Tokens of the longest sequence.
      seed: Seed of the weights.
      initializer_range: Standard deviation of the weights.
      norm_eps: Epsilon of the RMS norms.
    """
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=FLAGS.vocab_size,
        hidden_size=FLAGS.hidden_size,
        num_layers=FLAGS.layers,
        num_heads=FLAGS.heads,
        num_kv_heads=FLAGS.kv_heads,
        head_dim=FLAGS.hidden_size // FLAGS.heads,
        intermediate_size=FLAGS.intermediate_size,
        max_position_embeddings=max_len,
        norm_eps=norm_eps,
        initializer_range=initializer_range,
        tie_word_embeddings=True,
    )
    return init_model(config, seed)
