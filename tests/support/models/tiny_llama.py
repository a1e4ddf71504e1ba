"""A small Llama with random weights, for tests of benchmarks."""

from jpaged.models import Decoder, ModelConfig, init_model


def tiny_llama() -> Decoder:
    """A Llama of 2 layers, hidden size 64 and 256 tokens, in float32."""
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # Larger than usual, so that tokens depend on the tokens before them.
        initializer_range=0.3,
    )
    return init_model(config, seed=3)
