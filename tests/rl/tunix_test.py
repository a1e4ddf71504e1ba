"""JPagedRollout in tunix itself: mapped models, and a step of its GRPO learner."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("tunix")

from tunix.models.gemma import model as gemma
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3
from tunix.rl import common, rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from jpaged.models.decoder import init_model
from jpaged.rl.tunix import JPagedRollout, TunixDecoder
from tests.support.models.tiny_llama import tiny_llama

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

VOCAB = 256
LLM_OPTIONS = dict(max_num_seqs=4, num_blocks=64, block_size=4)
SIZES = dict(
    num_layers=2,
    vocab_size=VOCAB,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=1_000_000,
    norm_eps=1e-5,
)
GEMMA = {k: v for k, v in SIZES.items() if k not in ("rope_theta", "norm_eps")}
GEMMA["num_embed"] = GEMMA.pop("vocab_size")
LOCAL, GLOBAL = gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL


@pytest.fixture(autouse=True, scope="module")
def usual_promotion():
    """tunix needs JAX's usual rules, which the tests of jpaged make stricter."""
    names = ("jax_numpy_dtype_promotion", "jax_numpy_rank_promotion")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, ("standard", "allow"), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


class Characters:
    """A tokenizer as tunix expects it: one byte per token."""

    def encode(self, text, **kwargs):
        return [min(ord(letter), VOCAB - 1) for letter in text]

    def decode(self, ids, **kwargs):
        return "".join(map(chr, ids))

    def bos_id(self):
        return 1

    def eos_id(self):
        return 2

    def pad_id(self):
        return 0


def random_weights(model, seed=0):
    """Weights large enough that a wrong mapping shows."""
    state, rng = nnx.state(model), np.random.default_rng(seed)
    nnx.update(
        model,
        jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), state
        ),
    )
    return model


def make_qwen3(**more):
    return qwen3.Qwen3(qwen3.ModelConfig(**SIZES, **more), rngs=nnx.Rngs(0))


def make_gemma2():
    config = gemma.ModelConfig(
        **GEMMA,
        final_logit_softcap=30.0,
        attn_logits_soft_cap=50.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(LOCAL, GLOBAL),
        sliding_window_size=64,
    )
    return gemma.Gemma(config, rngs=nnx.Rngs(0))


def make_gemma3():
    config = gemma3.ModelConfig(
        **GEMMA | dict(num_layers=7),
        sliding_window_size=64,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
    )
    return gemma3.Gemma3(config, rngs=nnx.Rngs(0))


MODELS = {
    "llama3": lambda: llama3.Llama3(llama3.ModelConfig(**SIZES), rngs=nnx.Rngs(0)),
    "qwen2": lambda: qwen2.Qwen2(qwen2.ModelConfig(**SIZES), rngs=nnx.Rngs(0)),
    "qwen3": make_qwen3,
    "qwen3 tied": lambda: make_qwen3(use_tied_embedding=True),
    "gemma2": make_gemma2,
    "gemma3": make_gemma3,
    "jpaged": lambda: TunixDecoder(tiny_llama()),
}


def config_of(**changes):
    defaults = dict(
        max_tokens_to_generate=8,
        max_prompt_length=16,
        temperature=1.0,
        return_logprobs=True,
        eos_tokens=[2],
    )
    return base_rollout.RolloutConfig(**defaults | changes)


def actor_logprobs(actor, prompt, tokens):
    graph, state = nnx.split(actor)
    return np.asarray(
        common.compute_per_token_logps(
            graph,
            state,
            prompt_tokens=jnp.asarray(prompt)[None],
            completion_tokens=jnp.asarray(tokens)[None],
            pad_id=0,
            eos_id=2,
        )
    )[0]


def num_scored(tokens):
    """Number of tokens before the first that tunix takes for padding."""
    return next((i for i, token in enumerate(tokens) if token == 0), len(tokens))


@pytest.mark.parametrize("name", MODELS)
def test_models_of_tunix_are_mapped_and_updated(name):
    actor = MODELS[name]()
    if name != "jpaged":
        random_weights(actor)
    rollout = JPagedRollout(actor, Characters(), None, config_of(), **LLM_OPTIONS)
    prompts = ["hello there", "hello", "hello there"]
    for seed in (1, 2):
        output = rollout.generate(prompts, config_of(seed=jax.random.key(seed)))
        assert output.left_padded_prompt_tokens.shape == (3, 16)
        for i, tokens in enumerate(output.tokens):
            prompt = output.left_padded_prompt_tokens[i]
            end = num_scored(tokens)
            expected = actor_logprobs(actor, prompt, tokens)[:end]
            np.testing.assert_allclose(output.logprobs[i][:end], expected, atol=2e-3)
            own = rollout.get_per_token_logps(
                jnp.asarray(prompt)[None], jnp.asarray(tokens)[None]
            )
            np.testing.assert_allclose(own[0][:end], expected, atol=2e-3)
        random_weights(actor, seed)
        rollout.update_params(nnx.state(actor, nnx.Param), (nnx.Param,))
    assert rollout.llm.weights_version == 2
    rollout.llm.close()


def test_adapters_of_qwix_arrive():
    qwix = pytest.importorskip("qwix")
    base = random_weights(make_qwen3())
    provider = qwix.LoraProvider(module_path=".*q_proj|.*gate_proj", rank=2, alpha=4.0)
    tokens = jnp.ones((1, 4), jnp.int32)
    positions = jnp.arange(4)[None]
    mask = jnp.tril(jnp.ones((1, 4, 4), bool))
    actor = qwix.apply_lora_to_model(
        base, provider, tokens, positions, None, mask, rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="lora_alpha: expected"):
        JPagedRollout(actor, Characters(), None, config_of(), **LLM_OPTIONS)
    rollout = JPagedRollout(
        actor, Characters(), None, config_of(), lora_alpha=4.0, **LLM_OPTIONS
    )
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype),
        nnx.state(actor, nnx.LoRAParam),
    )
    nnx.update(actor, adapters)
    rollout.update_params(nnx.state(actor, nnx.LoRAParam), (nnx.LoRAParam,))
    output = rollout.generate(["hello"], config_of(seed=jax.random.key(1)))
    prompt, tokens = output.left_padded_prompt_tokens[0], output.tokens[0]
    end = num_scored(tokens)
    expected = actor_logprobs(actor, prompt, tokens)[:end]
    np.testing.assert_allclose(output.logprobs[0][:end], expected, atol=2e-3)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="rollout_actor: expected a Decoder"):
        JPagedRollout(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Characters())
    with pytest.raises(ValueError, match="decoder, map_params: expected both"):
        JPagedRollout(None, Characters(), decoder=init_model(tiny_llama().config))


@pytest.mark.parametrize("name", ["qwen3", "jpaged"])
def test_a_step_of_the_grpo_learner_runs(name, tmp_path):
    actor, reference = MODELS[name](), MODELS[name]()
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=kinds)
    engines = []

    class Recorded(JPagedRollout):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            engines.append(self)

    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(
            (
                rl_cluster.Role.ACTOR,
                rl_cluster.Role.REFERENCE,
                rl_cluster.Role.ROLLOUT,
            ),
            mesh,
        ),
        rollout_engine=functools.partial(Recorded, **LLM_OPTIONS),
        offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.sgd(0.5),
            eval_every_n_steps=100,
            max_steps=2,
        ),
        rollout_config=config_of(kv_cache_size=64),
    )
    cluster = rl_cluster.RLCluster(
        actor=actor,
        reference=reference,
        tokenizer=Characters(),
        cluster_config=config,
    )
    rewards = []

    def reward(prompts, completions, **kwargs):
        found = [float(sum(map(ord, each)) % 7) for each in completions]
        rewards.extend(found)
        return found

    learner = grpo_learner.GRPOLearner(
        rl_cluster=cluster,
        algo_config=grpo_learner.GRPOConfig(
            num_generations=4, num_iterations=1, beta=0.04, epsilon=0.2
        ),
        reward_fns=reward,
    )
    texts = ["hello", "there"], ["again", "hello"]
    data = [{"prompts": np.array(prompts)} for prompts in texts]
    learner.train(data)
    (engine,) = engines
    assert len(rewards) == 16
    assert engine.llm.weights_version >= 1
    assert engine.llm.stats()["prefix_hit_ratio"] > 0
    output = engine.generate(["hello"], config_of(seed=jax.random.key(3)))
    prompt, tokens = output.left_padded_prompt_tokens[0], output.tokens[0]
    end = num_scored(tokens)
    trained = cluster.actor_trainer.model
    expected = actor_logprobs(trained, prompt, tokens)[:end]
    np.testing.assert_allclose(output.logprobs[0][:end], expected, atol=2e-3)
    before = actor_logprobs(MODELS[name](), prompt, tokens)[:end]
    assert np.abs(before - expected).max() > 1e-3  # training has changed something
