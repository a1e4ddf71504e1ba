"""Parity with transformers: we load its checkpoints, and it loads ours.

Needs the extra `huggingface`. decoder_test and families_test compare with stored
results and need no extra.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.decoding import beam_search
from jpaged.models import Decoder, load_model, rotary, save_model
from jpaged.models.loading.checkpoint import load_config
from tests.support.models import checkpoints, families
from tests.support.models.paged_greedy import served
from tests.support.models.reference_models import relative_error

pytestmark = [
    pytest.mark.huggingface,
    pytest.mark.usefixtures("one_torch_thread"),
]

TOLERANCE = 1e-4  # of float32 logits; wrong positions or weights cause 1e-2
NUM_GREEDY = 32
NUM_BEAM_TOKENS = 10
apply = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def make(name: str):
    """A transformers model of this case, with weights that give distinct logits."""
    import torch
    import transformers

    kind, changes = families.CASES[name]
    config = transformers.AutoConfig.for_model(kind, **families.SIZES[kind] | changes)
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config, **options(name))
    model = model.eval().float()
    is_gemma = kind.startswith("gemma")
    with torch.no_grad():
        for key, param in model.named_parameters():
            is_table = any(part in key for part in ("embed", "wte", "wpe"))
            size = 0.2 if not is_table else 0.05 if is_gemma else 0.5
            noise = torch.randn_like(param) * size
            is_norm = ("norm" in key or "ln_" in key) and key.endswith("weight")
            # Gemma multiplies by 1 + weight.
            param.copy_(noise + 1.0 if is_norm and not is_gemma else noise)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.copy_(torch.rand_like(buffer))
    return model


@functools.cache
def exact(name: str):
    """The same model in float64, the reference."""
    return copy.deepcopy(make(name)).double()


def options(name: str) -> dict[str, str]:
    """transformers' fast products of experts do not support float64."""
    has_experts = families.has_experts(families.CASES[name][0])
    return {"experts_implementation": "eager"} if has_experts else {}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Function that returns our decoder of a case, as saved by transformers."""
    root = tmp_path_factory.mktemp("theirs")

    @functools.cache
    def load_case(name: str) -> Decoder:
        make(name).save_pretrained(root / name)
        return load_model(root / name)

    return load_case


def transformers_logits(model, tokens: list[int]) -> np.ndarray:
    """Logits [T, V] of a transformers model, computed in its dtype."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return logits.to(torch.float64).numpy()


def our_logits(model: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits f32[T, V], through one compiled program for every length."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(apply(model, padded))[0, : len(tokens)]


def some_tokens(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 128, length).tolist()


def corrupt(kind: str, folder) -> None:
    """Plant a fault in a saved checkpoint."""
    tensors = checkpoints.read_tensors(folder)
    if kind == "keys for values":
        for key in [key for key in tensors if "k_proj" in key]:
            other = key.replace("k_proj", "v_proj")
            tensors[key], tensors[other] = tensors[other], tensors[key]
    else:
        key = next(key for key in tensors if "k_proj.weight" in key)
        tensors[key][0, 0] += 1.0
    checkpoints.write_tensors(folder, tensors)


@pytest.mark.parametrize("name", families.CASES)
def test_float32_logits_equal_those_of_transformers_in_float64(name, load):
    # 50 and 128 tokens are longer than every window of these models.
    for length in (1, 5, 50, 128):
        tokens = some_tokens(length)
        got, want = (
            our_logits(load(name), tokens),
            transformers_logits(exact(name), tokens),
        )
        assert relative_error(got, want) < TOLERANCE


def greedy_by_transformers(name: str, prompt: list[int]) -> list[int]:
    import torch

    found = (
        exact(name)
        .generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NUM_GREEDY,
            min_new_tokens=NUM_GREEDY,
            eos_token_id=None,
            pad_token_id=0,
        )[0]
        .tolist()
    )
    assert len(found) == len(prompt) + NUM_GREEDY
    return found[len(prompt) :]


@pytest.mark.parametrize("name", families.CASES)
def test_greedy_tokens_equal_those_of_transformers_over_32_steps(name, load):
    prompt = some_tokens(9)
    want = greedy_by_transformers(name, prompt)
    assert len(set(want)) > 1
    # The model is causal: one forward pass predicts each of the tokens.
    chosen = our_logits(load(name), prompt + want)[len(prompt) - 1 : -1].argmax(-1)
    assert chosen.tolist() == want


# families_test runs every family through the engine, with other block sizes.
@pytest.mark.parametrize(
    ("name", "block_size"), [("gemma3_linear", 1), ("gpt_oss", 16), ("gpt2", 64)]
)
def test_paged_greedy_tokens_equal_those_of_transformers(name, block_size, load):
    prompts = [some_tokens(length) for length in (1, 5, 50)]
    want = [greedy_by_transformers(name, prompt) for prompt in prompts]
    got = served(load(name), prompts, NUM_GREEDY, block_size)
    assert got == want


def beams_by_transformers(name: str, prompt: list[int], width: int) -> list[list[int]]:
    import torch

    found = exact(name).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=NUM_BEAM_TOKENS,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[:, len(prompt) :].tolist()


def beams_by_us(model: Decoder, prompt: list[int], width: int) -> list[list[int]]:
    """Beam search over the plain forward; each step recomputes whole sequences."""
    search = beam_search(max_tokens=NUM_BEAM_TOKENS)
    state, step = search.init(width), jax.jit(search.step)
    rows = [prompt] * (2 * width)  # running beams, then finished hypotheses
    for _ in range(NUM_BEAM_TOKENS):
        logits = jnp.stack([our_logits(model, tokens)[-1] for tokens in rows[:width]])
        state, decision = step(None, jax.nn.log_softmax(logits), state)
        pairs = zip(decision.parents.tolist(), decision.tokens.tolist(), strict=True)
        rows = [
            rows[parent] + ([token] if parent < width else [])
            for parent, token in pairs
        ]
    return [tokens[len(prompt) :] for tokens in rows[width:]]


@pytest.mark.parametrize("name", families.CASES)
def test_beams_equal_those_of_transformers(name, load):
    prompt = some_tokens(9)
    want = beams_by_transformers(name, prompt, 3)
    assert beams_by_us(load(name), prompt, 3) == want
    assert len(set(map(tuple, want))) == 3


@pytest.mark.parametrize("name", ["llama", "opt_350m_shape"])
def test_a_sharded_checkpoint_of_transformers_is_loaded(name, tmp_path):
    model, tokens = make(name), some_tokens(20)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    got = our_logits(load_model(tmp_path), tokens)
    assert relative_error(got, transformers_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("name", ["llama_biases", "llama_tied", "opt"])
def test_a_bfloat16_checkpoint_of_transformers_is_loaded_in_both_dtypes(name, tmp_path):
    import torch
    import transformers

    make(name).save_pretrained(tmp_path)
    narrow = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16
    )
    narrow.save_pretrained(tmp_path / "narrow")
    tokens = some_tokens(30)
    assert load_config(tmp_path / "narrow").dtype == "bfloat16"
    exact = transformers_logits(narrow.float(), tokens)
    got = our_logits(load_model(tmp_path / "narrow", dtype="float32"), tokens)
    assert relative_error(got, exact) < TOLERANCE
    got = our_logits(load_model(tmp_path / "narrow", dtype="bfloat16"), tokens)
    # 8 bits of mantissa, two layers; the error of transformers in bfloat16 is as large.
    assert relative_error(got, exact) < 5e-2


@pytest.mark.parametrize("name", families.CASES)
def test_transformers_loads_what_we_save(name, load, tmp_path):
    import transformers

    model, tokens = make(name), some_tokens(20)
    save_model(load(name), tmp_path)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, **options(name)
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    got, want = transformers_logits(back, tokens), transformers_logits(model, tokens)
    # Bitwise equal, except GPT-2: its gelu has two names with different rounding.
    assert relative_error(got, want) < (1e-6 if name == "gpt2" else 1e-30)
    assert load_config(tmp_path) == load(name).config


def test_special_token_ids_are_those_of_the_config_or_its_class(tmp_path):
    for name in ("llama", "opt"):
        model = make(name)
        model.save_pretrained(tmp_path / name)
        config = load_config(tmp_path / name)
        assert config.eos_token_ids == (model.config.eos_token_id,) == (2,)
        assert config.bos_token_id == model.config.bos_token_id
        assert config.pad_token_id == model.config.pad_token_id


@pytest.mark.parametrize(
    "name", ["llama", "llama_linear", "llama_llama3", "llama_yarn", "phi3_longrope"]
)
def test_rotary_frequencies_equal_those_of_transformers_up_to_two_ulps(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    want = model.model.rotary_emb.inv_freq.numpy()
    got = rotary.frequencies(load_config(tmp_path))
    # Two units in the last place: torch and numpy round powers differently.
    np.testing.assert_allclose(got, want, rtol=2.5e-7)


@pytest.mark.parametrize(
    ("name", "trained"), [("llama_dynamic", 256), ("phi3_longrope", 128)]
)
def test_sequences_beyond_the_trained_length_are_rotated_as_in_transformers(
    name, trained, load
):
    assert load(name).config.default_length == trained
    tokens = some_tokens(trained + 40)
    want = transformers_logits(exact(name), tokens)
    errors = [
        relative_error(load(name)(jnp.array([tokens]), length=length)[0], want)
        for length in (None, trained + 40, trained)
    ]
    assert max(errors[:2]) < TOLERANCE
    assert errors[2] > 10 * TOLERANCE  # planted fault: the short rotation


@pytest.mark.parametrize("kind", ["keys for values", "one weight"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_planted_fault_in_the_weights_exceeds_the_tolerance(name, kind, tmp_path):
    model, tokens = make(name), some_tokens(50)
    model.save_pretrained(tmp_path)
    corrupt(kind, tmp_path)
    got = our_logits(load_model(tmp_path), tokens)
    assert relative_error(got, transformers_logits(model, tokens)) > 10 * TOLERANCE


def test_planted_fault_queries_rotated_by_one_position_exceed_the_tolerance(
    tmp_path, monkeypatch
):
    model, tokens = make("llama"), some_tokens(50)
    model.save_pretrained(tmp_path)
    loaded, rotate, calls = load_model(tmp_path), rotary.rotate, []

    def rotate_queries_further(x, cos, sin):
        calls.append(x.shape)
        if len(calls) % 2 == 0:
            return rotate(x, cos, sin)
        one = rotary.tables(jnp.ones(len(x), jnp.int32), loaded.config)
        return rotate(rotate(x, cos, sin), *one)

    monkeypatch.setattr(rotary, "rotate", rotate_queries_further)
    got = jax.jit(lambda model, tokens: model(tokens))(loaded, jnp.array([tokens]))[0]
    assert len(calls) == 2 * 2
    assert relative_error(got, transformers_logits(model, tokens)) > 100 * TOLERANCE
