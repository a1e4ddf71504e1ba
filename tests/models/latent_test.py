"""Multi-head latent attention: the plain forward, checkpoints, configs and sizes.

The reference computes keys and values of every head. families_test compares with
transformers, forward pass and engine.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import load_model, save_model
from jpaged.attention import kv_cache
from jpaged.models import rotary
from jpaged.models.config import ModelConfig
from jpaged.models.loading.checkpoint import load_config
from jpaged.models.shapes import SHAPES, random_config
from jpaged.rl import batch_invariant
from jpaged.serving import memory
from jpaged.simulator.costs.chips import find_chip
from jpaged.simulator.plan import plan_mesh
from tests.models.families_test import write_case
from tests.support.models import checkpoints
from tests.support.models.latent_reference import reference_logits
from tests.support.models.reference_models import relative_error

TOKENS = np.random.default_rng(0).integers(3, 120, 40).tolist()
TOLERANCE = 1e-5
forward = jax.jit(lambda model, tokens, segments: model(tokens, segments))


@pytest.fixture(scope="module", params=["deepseek_v2", "deepseek_v3"])
def folder(request, tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("latent") / "model", request.param)


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def test_logits_equal_naive_attention_in_numpy_also_in_packed_sequences(folder, model):
    # Two sequences of 25 and 15 tokens in one row.
    parts = TOKENS[:25], TOKENS[25:]
    segments = jnp.array([[0] * 25 + [1] * 15])
    got = np.asarray(forward(model, jnp.array([TOKENS]), segments))[0]
    want = np.concatenate([reference_logits(folder, part) for part in parts])
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("fault", ["halves", "no factor of scores", "no correction"])
def test_planted_faults_exceed_the_tolerance(folder, model, fault, monkeypatch):
    config = model.config
    if fault == "halves":
        rotate = rotary.rotate
        monkeypatch.setattr(
            rotary, "rotate", lambda x, cos, sin, is_interleaved: rotate(x, cos, sin)
        )
    changed = load_model(folder)
    if fault == "no factor of scores":
        scale = (config.latent.nope_dim + config.latent.rope_dim) ** -0.5
        changed.config = dataclasses.replace(config, attention_scale=scale)
    if fault == "no correction":
        if not config.routing.has_correction:
            pytest.skip("V2 has no correction")
        for layer in changed.layers[1:]:
            layer.experts.correction[...] *= 0
    got = jax.jit(lambda model, tokens: model(tokens))(changed, jnp.array([TOKENS]))[0]
    assert relative_error(got, reference_logits(folder, TOKENS)) > 100 * TOLERANCE


def test_gradients_flow_to_every_parameter(model):
    def loss(model):
        return jnp.mean(model(jnp.array([TOKENS[:12]])) ** 2)

    gradients = jax.jit(jax.grad(loss))(model)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        # The correction decides which experts are used, not how much.
        assert leaf.any() != ("correction" in name), name


def test_a_saved_model_is_the_same_model_in_bfloat16_too(folder, model, tmp_path):
    save_model(model, tmp_path / "copy")
    assert load_config(tmp_path / "copy") == model.config
    ours, theirs = (
        checkpoints.read_tensors(each) for each in (tmp_path / "copy", folder)
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    # Routers compute in float32, so their parameters stay as wide as they are stored.
    narrow = load_model(folder, dtype="bfloat16")
    save_model(narrow, tmp_path / "narrow")
    stored = checkpoints.read_tensors(tmp_path / "narrow")
    for name, array in stored.items():
        is_router = "mlp.gate." in name
        assert array.dtype == (np.float32 if is_router else jnp.bfloat16), name
        if is_router:
            np.testing.assert_array_equal(array, theirs[name])
    again = load_model(tmp_path / "narrow", dtype="bfloat16")
    for mine, other in zip(
        jax.tree.leaves(narrow), jax.tree.leaves(again), strict=True
    ):
        np.testing.assert_array_equal(mine, other)


def test_weights_in_8_bits_have_nearly_the_same_logits(folder):
    small = load_model(folder, quantization="int8")
    assert small.layers[1].attention.latent.weight.dtype == jnp.int8
    assert small.layers[1].experts.shared.up.weight.dtype == jnp.int8
    assert small.layers[0].attention.key_up.dtype == jnp.float32
    got = forward(small, jnp.array([TOKENS]), None)[0]
    want = reference_logits(folder, TOKENS)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.2


def test_layers_that_predict_further_tokens_are_not_loaded(tmp_path):
    write_case(tmp_path, "deepseek_v3")
    tensors = checkpoints.read_tensors(tmp_path)
    extra = {
        name.replace("layers.2", "layers.3"): array
        for name, array in tensors.items()
        if "layers.2." in name
    }
    checkpoints.write_tensors(tmp_path, tensors | extra)
    # A config with too few layers is an error.
    with pytest.raises(ValueError, match=r"unknown model\.layers\.3\."):
        load_model(tmp_path)
    extra["model.layers.3.eh_proj.weight"] = np.zeros((4, 8), np.float32)
    extra["model.layers.3.shared_head.norm.weight"] = np.zeros(4, np.float32)
    checkpoints.write_tensors(tmp_path, tensors | extra)
    got = forward(load_model(tmp_path), jnp.array([TOKENS]), None)[0]
    assert relative_error(got, reference_logits(tmp_path, TOKENS)) < TOLERANCE


def test_a_token_takes_576_numbers_per_layer_as_in_the_paper():
    for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3"):
        config = random_config(name)
        block = memory.block_bytes(config, 16, "bfloat16", "xla")
        assert block == 16 * config.num_layers * 576 * 2
        # Replicated over `tensor`: each device has the whole latent.
        assert memory.block_bytes(config, 16, "bfloat16", "xla", 8) == block
        narrow = memory.block_bytes(config, 16, "fp8", "xla")
        assert narrow == 16 * config.num_layers * (576 + 4)
        # 4.5 times a head's 128 numbers; grouped-query attention has 2 * 128 a head.
        assert config.head_dim == 4.5 * config.latent.nope_dim


def test_plans_and_pools_count_latents():
    config = dataclasses.replace(random_config("deepseek-v2-lite"), num_layers=3)
    chip = find_chip("h100")
    plan = plan_mesh(config, chip, block_size=16)
    assert plan.page_bytes == plan.kv_tokens * 3 * 576 * 2
    assert plan.kv_tokens > 10**6
    # The heads are divided over two chips, the pages are not.
    two = plan_mesh(config, chip, tensor=2, block_size=16)
    assert two.page_bytes == two.kv_tokens * 3 * 576 * 2
    assert two.weight_bytes < 0.51 * plan.weight_bytes


def test_the_pool_has_as_many_blocks_as_the_budget_holds(model, monkeypatch):
    config = model.config
    size = memory.block_bytes(config, 4, "float32", "xla")
    assert size == 4 * 3 * (16 + 4) * 4
    monkeypatch.setattr(memory, "pool_budget", lambda model, fraction: 10 * size + 1)
    options = dict(block_size=4, kv_dtype="float32", memory_fraction=0.9)
    sizes = memory.choose_sizes(
        model, **options, num_blocks=None, max_num_seqs=8, max_model_len=None
    )
    assert sizes == (10, 40)
    cache = kv_cache.init_kv_cache(
        num_layers=3,
        num_blocks=10,
        num_kv_heads=1,
        block_size=4,
        head_dim=20,
        dtype="float32",
        is_latent=True,
    )
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 10 * size


V2, V3 = SHAPES["deepseek-v2"], SHAPES["deepseek-v3"]


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (V2, {"norm_topk_prob": True}, "norm_topk_prob: expected False, got True"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method: expected 'greedy' or"),
        (V2, {"n_group": 7}, "n_group: expected a divisor of the 160 experts"),
        (V2, {"n_group": None}, "n_group: expected a value in config.json, got none"),
        (V2, {"topk_group": 9}, r"topk_group: expected at most n_group \(8\), got 9"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq: expected 1, got 2"),
        (V2, {"kv_lora_rank": None}, "kv_lora_rank: expected a value"),
        (V2, {"q_lora_rank": 0}, "q_lora_rank: expected an integer above 0, got 0"),
        (V3, {"scoring_func": "softmax"}, "scoring_func: expected 'sigmoid'"),
        (V3, {"n_group": 256}, "groups of at least 2, got 256"),
        (V3, {"topk_group": 1, "n_group": 64}, "at most the 4 experts of 1 groups"),
        (V3, {"qk_rope_head_dim": 63}, "rotary_dim: expected an even number"),
        (
            V3,
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config: .* got 'fp8' with weight_block_size None",
        ),
    ],
)
def test_configs_that_cannot_be_served_are_refused(shape, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf({**shape, **changes})


def test_configs_are_written_as_they_are_read(tmp_path):
    for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3"):
        config = random_config(name)
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    dense = ModelConfig.from_hf({**V3, "n_routed_experts": None})
    assert dense.num_experts == 0
    assert ModelConfig.from_hf(dense.to_hf()) == dense
    # The published number, from scores of 192 ** -0.5 and 0.1 * 0.707 * ln 40 + 1.
    assert random_config("deepseek-v2").attention_scale == pytest.approx(0.114721, 1e-4)


def test_batch_invariant_numerics_are_refused(model):
    with batch_invariant(), pytest.raises(ValueError, match="latent attention"):
        model(jnp.array([TOKENS]))
