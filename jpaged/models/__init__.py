"""Models: one Flax NNX decoder for all families, its config, and its checkpoints.

Pipeline: StepInputs -> [models] -> attention -> logits.
"""

from jpaged.models.config import LatentSizes, ModelConfig, RopeScaling, Routing
from jpaged.models.decoder import Decoder, init_model
from jpaged.models.loading.checkpoint import load_model, save_model

__all__ = [
    "Decoder",
    "LatentSizes",
    "ModelConfig",
    "RopeScaling",
    "Routing",
    "init_model",
    "load_model",
    "save_model",
]
