"""Reinforcement learning: what a trainer in JAX needs around rollouts with an LLM.

Pipeline: llm -> [rl] -> the user's training step, and back by `LLM.update_weights`.

Pure functions of arrays, for use with optax; `jpaged.rl.tunix` plugs an LLM into
tunix. docs/rollouts.md has a whole training loop.
"""

from jpaged.models.invariant import batch_invariant as batch_invariant
from jpaged.rl.advantages import dr_grpo_advantages as dr_grpo_advantages
from jpaged.rl.advantages import grpo_advantages as grpo_advantages
from jpaged.rl.advantages import rloo_advantages as rloo_advantages
from jpaged.rl.corrections import Mismatch as Mismatch
from jpaged.rl.corrections import mismatch as mismatch
from jpaged.rl.corrections import sequence_weights as sequence_weights
from jpaged.rl.corrections import token_weights as token_weights
from jpaged.rl.estimators import entropy as entropy
from jpaged.rl.estimators import kl_estimate as kl_estimate
from jpaged.rl.lora import add_adapters as add_adapters
from jpaged.rl.lora import init_adapters as init_adapters
from jpaged.rl.losses import PolicyLoss as PolicyLoss
from jpaged.rl.losses import aggregate as aggregate
from jpaged.rl.losses import grpo_loss as grpo_loss
from jpaged.rl.losses import policy_gradient_loss as policy_gradient_loss
from jpaged.rl.losses import ppo_clip_loss as ppo_clip_loss
from jpaged.rl.packing import Rollout as Rollout
from jpaged.rl.packing import TrainingBatch as TrainingBatch
from jpaged.rl.packing import pack as pack
from jpaged.rl.packing import pad as pad
from jpaged.rl.packing import rollouts_of as rollouts_of
from jpaged.rl.scoring import token_logprobs as token_logprobs
from jpaged.rl.scoring import token_logprobs_and_entropy as token_logprobs_and_entropy
