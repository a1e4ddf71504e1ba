"""Loading and saving of configs and weights in Hugging Face layout, and the errors."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import ModelConfig, RopeScaling, load_model, save_model
from jpaged.models.loading import placing
from jpaged.models.loading.checkpoint import load_config
from tests.support.models import checkpoints


def edit_json(file, **changes) -> None:
    contents = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(contents), "utf-8")


def llama(**changes) -> ModelConfig:
    """ModelConfig of the tiny Llama with changed entries in config.json; None removes
    an entry."""
    changed = checkpoints.LLAMA | changes
    return ModelConfig.from_hf({k: v for k, v in changed.items() if v is not None})


def opt(**changes) -> ModelConfig:
    return ModelConfig.from_hf(checkpoints.OPT | changes)


def leaves(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


# config.json.


def test_both_styles_of_rope_and_dtype_give_the_same_config():
    scaling = checkpoints.LLAMA3_SCALING
    before = llama(rope_theta=5e5, rope_scaling=scaling, torch_dtype="bfloat16")
    since = llama(
        rope_theta=None,
        rope_scaling=None,
        rope_parameters=scaling | {"rope_theta": 5e5},
        dtype="bfloat16",
    )
    assert before == since
    assert before.rope_theta == 5e5
    assert before.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert before.dtype == "bfloat16"


def test_the_default_rope_type_means_no_scaling_in_both_styles():
    plain = llama()
    assert plain.rope_scaling is None
    assert llama(rope_scaling={"type": "default"}) == plain
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    assert llama(rope_theta=None, rope_parameters=parameters) == plain


def test_the_older_name_of_a_rope_type_is_read():
    got = llama(rope_scaling={"type": "linear", "factor": 4.0}).rope_scaling
    assert got == RopeScaling("linear", 4.0)


def test_missing_entries_have_the_defaults_of_transformers():
    config = llama(num_key_value_heads=None, head_dim=None, rms_norm_eps=None)
    assert config.num_kv_heads == config.num_heads == 4
    assert config.head_dim == 16
    assert config.norm_eps == 1e-6
    assert config.dtype == "float32"
    silent = llama(eos_token_id=None, bos_token_id=None)
    assert (silent.bos_token_id, silent.eos_token_ids) == (1, (2,))
    by_type = llama(architectures=None)
    assert by_type.architecture == "LlamaForCausalLM"


def test_opt_configs_have_learned_positions_and_support_the_350m_variant():
    plain = opt()
    assert (plain.positions, plain.position_offset) == ("learned", 2)
    assert (plain.norm, plain.activation, plain.gated_mlp) == ("layer", "relu", False)
    assert (plain.qkv_bias, plain.out_bias, plain.mlp_bias) == (True, True, True)
    assert (plain.tie_word_embeddings, plain.final_norm) == (True, True)
    assert plain.input_size == plain.hidden_size == 64
    shape = opt(do_layer_norm_before=False, word_embed_proj_dim=32)
    assert (shape.norm_first, shape.final_norm) == (False, False)
    assert (shape.input_size, shape.hidden_size) == (32, 64)
    assert not opt(_remove_final_layer_norm=True).final_norm


@pytest.mark.parametrize("eos", [7, [7, 9]])
def test_eos_of_generation_config_overrides_that_of_config(eos, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    assert load_config(folder).eos_token_ids == (2,)
    generation = {"eos_token_id": eos}
    (folder / "generation_config.json").write_text(json.dumps(generation), "utf-8")
    assert load_config(folder).eos_token_ids == ((7,) if eos == 7 else (7, 9))
    edit_json(folder / "generation_config.json", eos_token_id=None)
    assert load_config(folder).eos_token_ids == (2,)


def test_eos_ids_are_checked_and_those_outside_of_the_vocabulary_end_nothing():
    assert llama(eos_token_id=[7, 2, 7]).eos_token_ids == (7, 2)
    assert llama(eos_token_id=[]).eos_token_ids == ()
    for bad in ("2", True, 2.0, [2, "3"], {"id": 2}):
        with pytest.raises(ValueError, match="eos_token_id: expected a token id or"):
            llama(eos_token_id=bad)
    for outside in (128, -1):
        with pytest.warns(UserWarning, match=r"expected ids below vocab_size \(128"):
            assert llama(eos_token_id=[2, outside]).eos_token_ids == (2,)
    # The default of the class, not an entry of this model.
    assert llama(eos_token_id=None, vocab_size=2).eos_token_ids == ()


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_to_hf_is_read_back_as_the_same_config(name, tmp_path):
    config = load_config(checkpoints.write_case(tmp_path, name))
    config = dataclasses.replace(config, eos_token_ids=(2, 5), dtype="bfloat16")
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    without = dataclasses.replace(config, eos_token_ids=())
    assert ModelConfig.from_hf(without.to_hf()) == without


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["BertModel"]},
            r"architectures: expected one of \[.*'GPT2LMHeadModel', "
            r".*'LlamaForCausalLM'"
            r", .*, got \['BertModel'\]",
        ),
        (
            {"architectures": None, "model_type": "bert"},
            "expected one of .*, got 'bert'",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config: expected none, got 'gptq'",
        ),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
            "rope type: expected 'default' or one of .*, got 'proportional'",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
            r"rope type 'llama3': expected values for \['low_freq_factor', "
            r"'high_freq_factor', 'original_max_position_embeddings'\]",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
            "rope factor: expected more than 0, got 0.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor: expected 1, got 0.5",
        ),
        ({"hidden_act": "mish"}, r"activation: expected one of .*, got 'mish'"),
        ({"hidden_size": None}, "hidden_size: expected a value in config.json"),
        (
            {"head_dim": None, "num_attention_heads": 6, "num_key_value_heads": 6},
            r"hidden_size: expected a multiple of num_attention_heads \(6\), got 64",
        ),
        (
            {"hidden_size": "64", "head_dim": None},
            "hidden_size: expected an integer above 0, got '64'",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object, got 'linear'"),
        ({"vocab_size": -5}, "vocab_size: expected an integer above 0, got -5"),
        ({"vocab_size": "8"}, "vocab_size: expected an integer above 0, got '8'"),
        (
            {"num_key_value_heads": 3},
            r"num_kv_heads: expected a divisor of num_heads \(4\), got 3",
        ),
        ({"head_dim": 15}, "head_dim: expected an even number for rotary .*, got 15"),
        ({"torch_dtype": "int8"}, "dtype: expected one of .*, got 'int8'"),
    ],
)
def test_an_unsupported_config_is_refused_with_the_name_of_the_entry(changes, message):
    with pytest.raises(ValueError, match=message):
        llama(**changes)


def test_opt_with_weightless_norms_is_refused():
    with pytest.raises(ValueError, match="layer_norm_elementwise_affine: expected"):
        opt(layer_norm_elementwise_affine=False)


# Loading weights.


def test_every_tensor_is_loaded_into_its_parameter(tmp_path):
    # Orientation of square matrices is checked by the logits in decoder_test.
    folder = checkpoints.write_tiny_llama(tmp_path, attention_bias=True)
    model, stored = load_model(folder), checkpoints.read_tensors(folder)
    layer, name = model.layers[1], "model.layers.1."
    for got, key in (
        (model.embedding[...], "model.embed_tokens.weight"),
        (model.output.weight[...].T, "lm_head.weight"),
        (model.final_norm.weight[...], "model.norm.weight"),
        (layer.attention_norm.weight[...], name + "input_layernorm.weight"),
        (layer.attention.query.weight[...].T, name + "self_attn.q_proj.weight"),
        (layer.attention.key.bias[...], name + "self_attn.k_proj.bias"),
        (layer.mlp.down.weight[...].T, name + "mlp.down_proj.weight"),
    ):
        np.testing.assert_array_equal(got, stored[key], err_msg=key)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast_from_the_stored_dtype_to_the_requested_one(
    stored, dtype, tmp_path
):
    folder = checkpoints.write_tiny_llama(tmp_path, dtype=stored)
    model = load_model(folder, dtype=dtype)
    assert model.config.dtype == dtype
    kept = checkpoints.read_tensors(folder)["model.embed_tokens.weight"]
    want = kept.astype(jnp.dtype(dtype))
    assert model.embedding[...].dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(model.embedding[...]), want)


def test_dtype_auto_is_float32_on_a_cpu_and_that_of_the_checkpoint_elsewhere(
    tmp_path, monkeypatch
):
    folder = checkpoints.write_tiny_llama(tmp_path, dtype="bfloat16")
    assert load_model(folder).config.dtype == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    model = load_model(folder)
    assert model.config.dtype == "bfloat16"
    assert model.output.weight[...].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["llama", "opt_350m_shape"])
def test_sharded_weights_are_loaded_like_one_file(name, tmp_path):
    folder = checkpoints.write_case(tmp_path, name)
    want = leaves(load_model(folder))
    checkpoints.shard(folder, 3)
    assert len(list(folder.glob("*.safetensors"))) == 3
    for got, expected in zip(leaves(load_model(folder)), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_tensor_names_of_the_bare_opt_model_are_accepted(tmp_path):
    folder = checkpoints.write_tiny_opt(tmp_path)
    want, tensors = leaves(load_model(folder)), checkpoints.read_tensors(folder)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    checkpoints.write_tensors(folder, bare)
    for got, expected in zip(leaves(load_model(folder)), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_tensors_that_repeat_the_config_are_ignored(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path, tie_word_embeddings=True)
    tensors = checkpoints.read_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    frequencies = np.ones(8, np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = frequencies
    want = leaves(load_model(folder))
    checkpoints.write_tensors(folder, tensors)
    for got, expected in zip(leaves(load_model(folder)), want, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_output_than_the_tied_one_is_loaded_with_a_warning(dtype, tmp_path):
    # transformers 5.24: "both are present in the checkpoints with different values, so
    # we will NOT tie them".
    folder = checkpoints.write_tiny_llama(
        tmp_path, tie_word_embeddings=True, dtype=dtype
    )
    tensors = checkpoints.read_tensors(folder)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.copy()
    tensors["lm_head.weight"][-1, -1] += 1
    checkpoints.write_tensors(folder, tensors)
    with pytest.warns(UserWarning, match=r"lm_head.weight differs from the embedding"):
        model = load_model(folder, dtype=dtype)
    assert not model.config.tie_word_embeddings
    np.testing.assert_array_equal(model.embedding[...], embedding)
    np.testing.assert_array_equal(model.output.weight[...].T, tensors["lm_head.weight"])


def test_tied_weights_may_be_stored_as_the_output_only(tmp_path):
    # safetensors' save_model keeps the first of two equal names.
    folder = checkpoints.write_tiny_llama(tmp_path, tie_word_embeddings=True)
    want, tensors = leaves(load_model(folder)), checkpoints.read_tensors(folder)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    checkpoints.write_tensors(folder, tensors)
    for got, expected in zip(leaves(load_model(folder)), want, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_misshapen_tied_output_and_other_families_buffers_are_refused(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path, tie_word_embeddings=True)
    tensors = checkpoints.read_tensors(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][1:]
    tensors["model.layers.0.attn.bias"] = np.ones(4, np.float32)  # ignored for GPT-2
    checkpoints.write_tensors(folder, tensors)
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(ValueError, match=r"unknown model.layers.0.attn.bias") as raised,
    ):
        load_model(folder)
    assert "lm_head.weight: expected shape (128, 64)" in str(raised.value)


def test_the_index_decides_which_of_two_shards_holds_a_tensor(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    want, name = checkpoints.read_tensors(folder)["model.norm.weight"], "model.norm.w"
    checkpoints.shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    files = sorted(set(weight_map.values()))
    right = weight_map["model.norm.weight"]
    (other,) = set(files) - {right}
    tensors = safetensors.numpy.load_file(folder / other)
    tensors["model.norm.weight"] = want + 1
    safetensors.numpy.save_file(tensors, folder / other)
    model = load_model(folder)
    np.testing.assert_array_equal(model.final_norm.weight[...], want)
    missing = {k: v for k, v in weight_map.items() if k != "model.norm.weight"}
    edit_json(index, weight_map=missing)
    with pytest.raises(ValueError, match=f"the file of {name}.* both store it"):
        load_model(folder)
    third = "model.layers.0.mlp.up_proj.weight"
    (wrong,) = set(files) - {weight_map[third]}
    edit_json(index, weight_map=weight_map | {third: wrong})
    with pytest.raises(ValueError, match=rf"expected {third} in {wrong}, got a file"):
        load_model(folder)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": 8 * [1.5],
    "long_factor": 8 * [3.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("scaling", "length", "default"),
    [
        # The form of Qwen2.5's README; vLLM 0.11 derives 4 * 64.
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            *2 * [256],
        ),
        ({"rope_type": "yarn", "factor": 4.0}, 256, 256),
        # Qwen3's README: 40960 positions of which 32768 were trained.
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
            *2 * [192],
        ),
        ({"type": "linear", "factor": 4.0}, 256, 256),
        ({"type": "linear", "factor": 1.5}, 96, 96),
        # vLLM derives 4 * 64, too, but rotates every sequence like one of 256 tokens.
        ({"type": "dynamic", "factor": 4.0}, 256, 64),
        # vLLM's default is the trained length, and its maximum is the whole one.
        (LONGROPE, 64, 16),
        (LONGROPE | {"long_factor": 8 * [1.5]}, 64, 64),
        (checkpoints.LLAMA3_SCALING, 64, 64),
        (None, 64, 64),
    ],
)
def test_the_maximum_length_follows_from_the_rope_scaling(scaling, length, default):
    config = llama(rope_scaling=scaling, max_position_embeddings=64)
    assert (config.max_length, config.default_length) == (length, default)
    assert config.max_position_embeddings == 64
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_loading_holds_no_second_copy_of_the_model_in_python_memory(tmp_path):
    folder = checkpoints.write_tiny_llama(
        tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=6
    )
    load_model(folder)  # exclude imports and caches from the measurement
    sizes = [array.nbytes for array in checkpoints.read_tensors(folder).values()]
    tracemalloc.start()
    model = load_model(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in leaves(model)) == sum(sizes)
    # Python's memory, without JAX's arrays: the piece that is being read, its copy, the
    # previous copy that JAX has not yet released, and 500 KB of names and shapes.
    assert max(sizes) < 4 * placing.PIECE
    assert peak < 3 * max(sizes) + 500_000 < sum(sizes) / 2


# Invalid checkpoints.


def test_a_missing_folder_that_looks_like_a_hub_id_explains_the_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"meta-llama/L: no such .*hf downl"):
        load_model("meta-llama/L")
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(file)


def test_a_folder_without_config_or_weights_is_refused_with_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json; a checkpoint is"):
        load_model(tmp_path)
    folder = checkpoints.write_tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors and no"):
        load_model(folder)


def test_pickled_weights_are_refused_with_instructions_for_conversion(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = (
        r"pytorch_model.bin is pickle, which is not supported: convert .*save_pretr"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load_model(folder)


@pytest.mark.parametrize("contents", ["{", "[1, 2]", "\x00\x01"])
def test_a_config_that_is_not_a_json_object_is_refused(contents, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    (folder / "config.json").write_text(contents, "utf-8")
    with pytest.raises(ValueError, match=r"config.json: expected (a )?JSON"):
        load_model(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -10])
def test_truncated_weights_are_refused(kept, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match="truncated or corrupt safetensors"):
        load_model(folder)


def test_garbage_in_the_header_is_refused(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    with pytest.raises(ValueError, match="truncated or corrupt safetensors"):
        load_model(folder)


def test_missing_unknown_and_misshapen_tensors_are_all_listed(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    tensors = checkpoints.read_tensors(folder)
    tensors["model.layers.7.unknown"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = np.zeros((127, 64), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 96), np.float32)
    checkpoints.write_tensors(folder, tensors)
    with pytest.raises(ValueError, match=r"do not fit config.json") as raised:
        load_model(folder)
    for part in (
        "missing model.norm.weight",
        "unknown model.layers.7.unknown",
        "lm_head.weight: expected shape (128, 64), got (127, 64)",
        "model.layers.0.mlp.up_proj.weight: expected shape (96, 64), got (64, 96)",
    ):
        assert part in str(raised.value)


def test_a_long_list_of_problems_is_shortened_and_counted(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    edit_json(folder / "config.json", num_hidden_layers=4)
    # 9 tensors are missing for each of 2 layers; 8 are listed.
    with pytest.raises(ValueError, match=r"missing model.layers.2.*; and 10 more$"):
        load_model(folder)


def test_a_bias_that_contradicts_the_config_is_refused(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path, attention_bias=True)
    edit_json(folder / "config.json", attention_bias=False)
    with pytest.raises(ValueError, match=r"unknown model.*0.self_attn.k_proj.bias"):
        load_model(folder)


def test_integer_weights_are_refused(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    tensors = checkpoints.read_tensors(folder)
    tensors["lm_head.weight"] = np.zeros((128, 64), np.int8)
    checkpoints.write_tensors(folder, tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight: expected one of .*got I8"):
        load_model(folder)


def test_an_index_with_a_missing_shard_or_a_path_outside_is_refused(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path / "model")
    checkpoints.shard(folder, 2)
    index = folder / "model.safetensors.index.json"
    (folder / "model-00002-of-00002.safetensors").rename(tmp_path / "outside")
    with pytest.raises(
        FileNotFoundError, match=r"model-00002.*no such file, but model"
    ):
        load_model(folder)
    edit_json(index, weight_map={"lm_head.weight": "../outside"})
    with pytest.raises(
        ValueError, match=r"expected plain file names, got '../outside'"
    ):
        load_model(folder)
    edit_json(index, weight_map={})
    with pytest.raises(ValueError, match="expected a 'weight_map'"):
        load_model(folder)


def test_an_unknown_dtype_is_refused_before_any_file_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"dtype: expected 'auto' or one .*'int4'"):
        load_model(tmp_path, dtype="int4")


# Saving weights.


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_a_saved_model_has_the_tensors_of_the_original_checkpoint(name, tmp_path):
    folder = checkpoints.write_case(tmp_path / "first", name)
    model = load_model(folder)
    save_model(model, tmp_path / "second" / "deeper")
    want = checkpoints.read_tensors(folder)
    got = checkpoints.read_tensors(tmp_path / "second" / "deeper")
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_array_equal(got[key], array, err_msg=key)
    assert load_config(tmp_path / "second" / "deeper") == model.config


def test_a_model_can_be_saved_in_bfloat16(tmp_path):
    model = load_model(checkpoints.write_tiny_llama(tmp_path / "wide"))
    save_model(model, tmp_path / "narrow", dtype="bfloat16")
    stored = checkpoints.read_tensors(tmp_path / "narrow")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert load_config(tmp_path / "narrow").dtype == "bfloat16"
    assert model.config.dtype == "float32"
    with pytest.raises(ValueError, match=r"dtype: expected one of .*, got 'int4'"):
        save_model(model, tmp_path / "narrow", dtype="int4")


def test_saving_replaces_an_older_checkpoint_and_leaves_no_partial_file(tmp_path):
    first = load_model(checkpoints.write_tiny_llama(tmp_path / "a", seed=1))
    folder = checkpoints.write_tiny_llama(tmp_path / "b", seed=2)
    save_model(first, folder)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    for got, want in zip(leaves(load_model(folder)), leaves(first), strict=True):
        np.testing.assert_array_equal(got, want)
