"""GGUF files: every architecture and quantisation, and the errors; without torch."""

import dataclasses
import json
import struct
import sys

import gguf
import jax
import numpy as np
import pytest

from jpaged import gguf_file
from jpaged.models import load_model, rotary, save_model
from jpaged.models.families.gguf_names import Change
from jpaged.models.loading import gguf_tensors, placing
from jpaged.models.loading.checkpoint import load_config
from jpaged.models.loading.gguf_tensors import GGUFTensor
from tests.support.models import gguf_files


def leaves(model) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


# Architectures.

# Entries of a ModelConfig that a file cannot hold, or holds as their result.
UNSTORED = {"rope_scaling": None, "pad_token_id": None, "initializer_range": 0.02}


@pytest.mark.parametrize("name", gguf_files.CASES)
def test_a_file_has_the_config_and_weights_of_the_folder_it_was_made_from(
    name, tmp_path
):
    # Gemma 2's scale is that of its heads, whatever config.json says.
    is_gemma = name in ("gemma2", "gemma3", "gemma3_linear")
    changes = {"query_pre_attn_scalar": 16} if is_gemma else {}
    if name == "gpt2":
        changes["n_inner"] = None
    file = gguf_files.write_case(tmp_path / "m.gguf", name, **changes)
    folder = tmp_path / "m.gguf.folder"
    got, want = load_config(file), load_config(folder)
    np.testing.assert_allclose(got.norm_eps, want.norm_eps, rtol=1e-7)
    same = dataclasses.replace(got, norm_eps=want.norm_eps, **UNSTORED)
    if name.startswith(("mistral_", "mixtral")):
        same = dataclasses.replace(same, architecture=want.architecture)
    assert same == dataclasses.replace(want, **UNSTORED)
    for is_local in (False, True):
        np.testing.assert_allclose(
            rotary.frequencies(got, is_local=is_local),
            rotary.frequencies(want, is_local=is_local),
            rtol=1e-6,
        )
    for mine, theirs in zip(
        leaves(load_model(file)), leaves(load_model(folder)), strict=True
    ):
        # 1 + w - 1 loses the last bits of Gemma's norms.
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=6e-8)


def test_planted_fault_rows_of_queries_in_another_order_are_noticed(
    tmp_path, monkeypatch
):
    file = gguf_files.write_case(tmp_path / "m.gguf", "llama")
    monkeypatch.setattr(GGUFTensor, "_stored_rows", lambda self, rows: rows)
    wrong = leaves(load_model(file))
    right = leaves(load_model(tmp_path / "m.gguf.folder"))
    differ = [not np.array_equal(a, b) for a, b in zip(wrong, right, strict=True)]
    assert sum(differ) == 2 * 2  # query and key of two layers


def test_a_saved_gguf_model_is_loaded_as_the_same_model(tmp_path):
    model = load_model(gguf_files.write_case(tmp_path / "m.gguf", "llama_llama3"))
    save_model(model, tmp_path / "saved")
    assert load_config(tmp_path / "saved") == model.config
    for got, want in zip(
        leaves(load_model(tmp_path / "saved")), leaves(model), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_tokens_that_end_a_turn_are_eos_beside_those_of_the_metadata(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "<|eot_id|>", "word", "<x>"]
    kinds = [2, 3, 3, 3, 1, 1, 3]
    file = with_metadata(
        tmp_path,
        {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.eos_token_id": 6,
            "tokenizer.ggml.eot_token_id": 3,
        },
    )
    # "<|eot_id|>" is a normal token here.
    assert load_config(file).eos_token_ids == (6, 3, 2)


def test_the_dtype_of_a_file_is_that_of_its_matrices(tmp_path):
    for kind, dtype in (
        ("F32", "float32"),
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("Q8_0", "bfloat16"),
    ):
        file = gguf_files.write_case(tmp_path / f"{kind}.gguf", "qwen2", kind=kind)
        assert load_config(file).dtype == dtype


# Quantisations. Each block is converted value by value, as ggml describes it.


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def low_and_high(values: bytes) -> list[int]:
    return [v & 15 for v in values] + [v >> 4 for v in values]


def fifth_bits(block: bytes, at: int) -> list[int]:
    (bits,) = struct.unpack_from("<I", block, at)
    return [(bits >> j & 1) << 4 for j in range(32)]


def by_q4_0(block: bytes) -> list[float]:
    return [half(block, 0) * (q - 8) for q in low_and_high(block[2:])]


def by_q4_1(block: bytes) -> list[float]:
    return [half(block, 0) * q + half(block, 2) for q in low_and_high(block[4:])]


def by_q5_0(block: bytes) -> list[float]:
    pairs = zip(low_and_high(block[6:]), fifth_bits(block, 2), strict=True)
    return [half(block, 0) * ((q | bit) - 16) for q, bit in pairs]


def by_q5_1(block: bytes) -> list[float]:
    pairs = zip(low_and_high(block[8:]), fifth_bits(block, 4), strict=True)
    return [half(block, 0) * (q | bit) + half(block, 2) for q, bit in pairs]


def by_q8_0(block: bytes) -> list[float]:
    return [half(block, 0) * q for q in struct.unpack("<32b", block[2:])]


def by_q4_k(block: bytes) -> list[float]:
    packed, values = block[4:16], block[16:]
    found: list[float] = []
    for part in range(8):
        if part < 4:
            scale, least = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            least = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        both = values[part // 2 * 32 : part // 2 * 32 + 32]
        numbers = [v >> 4 if part % 2 else v & 15 for v in both]
        d, m = half(block, 0) * scale, half(block, 2) * least
        found += [d * q - m for q in numbers]
    return found


def by_q6_k(block: bytes) -> list[float]:
    low, high = block[:128], block[128:192]
    scales = struct.unpack("<16b", block[192:208])
    found = []
    for i in range(256):
        part, place = divmod(i, 128)
        quarter, column = divmod(place, 32)
        byte = low[64 * part + 32 * (quarter % 2) + column]
        bits = byte >> 4 if quarter > 1 else byte & 15
        top = high[32 * part + column] >> (2 * quarter) & 3
        scale = scales[8 * part + 2 * quarter + column // 16]
        found.append(half(block, 208) * scale * ((bits | top << 4) - 32))
    return found


BLOCKS = {
    "Q4_0": by_q4_0,
    "Q4_1": by_q4_1,
    "Q5_0": by_q5_0,
    "Q5_1": by_q5_1,
    "Q8_0": by_q8_0,
    "Q4_K": by_q4_k,
    "Q6_K": by_q6_k,
    "F16": lambda block: [half(block, 0)],
    "BF16": lambda block: [struct.unpack("<f", b"\0\0" + block)[0]],
    "F32": lambda block: [struct.unpack("<f", block)[0]],
}


def random_blocks(kind: str, rows: int, blocks: int) -> np.ndarray:
    """Random bytes u8[rows, n], whose exponents are small and finite."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(len(kind))
    raw = rng.integers(0, 256, (rows, blocks * 256 // values, size), np.uint8)
    scales = {"Q4_1": [1, 3], "Q5_1": [1, 3], "Q4_K": [1, 3], "Q6_K": [209]}
    for at in scales.get(kind, [size - 1] if size <= 4 else [1]):
        raw[:, :, at] &= 0xBB  # below 1: not all bits of the exponent are set
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_part_of_a_tensor_is_converted_as_ggml_describes(kind, tmp_path):
    raw = random_blocks(kind, 8, 2)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    number = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("before", np.ones(3, np.float32))
    writer.add_tensor("x", raw, raw_dtype=number)
    gguf_files.finish(writer)
    entry = gguf_file.load(tmp_path / "m.gguf").tensors["x"]
    assert entry.shape == (8, 512)
    size = gguf.GGML_QUANT_SIZES[number][1]
    want = np.array(
        [
            [
                value
                for at in range(0, len(row), size)
                for value in BLOCKS[kind](row[at : at + size].tobytes())
            ]
            for row in raw
        ],
        np.float32,
    )
    assert np.isfinite(want).all()
    parts = [
        (slice(0, 8), slice(0, 512)),
        (slice(3, 5), slice(7, 300)),
        (slice(7, 8), slice(511, 512)),
        (slice(1, 7), slice(64, 96)),
    ]
    for part in parts:
        got = GGUFTensor(entry, Change()).view(part)
        np.testing.assert_allclose(got, want[part], rtol=1e-6, atol=1e-7)
        swapped = GGUFTensor(entry, Change(transposed=True)).view(part[::-1])
        np.testing.assert_array_equal(swapped, got.T)
        moved = GGUFTensor(entry, Change(offset=-1.0)).view(part)
        np.testing.assert_array_equal(moved, got - np.float32(1))


def test_whatever_the_library_converts_is_loaded(tmp_path):
    kinds = [
        "Q2_K",
        "Q3_K",
        "Q5_K",
        *("IQ4_NL", "IQ4_XS", "IQ3_S", "IQ2_XXS", "TQ1_0", "TQ2_0", "MXFP4"),
    ]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    raw = {kind: random_blocks(kind, 4, 2) for kind in kinds}
    for kind, array in raw.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, array, raw_dtype=number)
    gguf_files.finish(writer)
    for kind, entry in gguf_file.load(tmp_path / "m.gguf").tensors.items():
        tensor = GGUFTensor(entry, Change())
        assert tensor.problem is None
        want = gguf.dequantize(raw[kind], gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(tensor.view((slice(1, 3),)), want[1:3])


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_quantised_weights_are_those_of_the_converted_folder(quantization, tmp_path):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2", kind="Q4_0")
    tensors = gguf_files.checkpoints.read_tensors(tmp_path / "m.gguf.folder")
    number = gguf.GGMLQuantizationType.Q4_0
    rounded = {
        name: gguf.dequantize(gguf.quantize(array, number), number)
        if array.ndim > 1
        else array
        for name, array in tensors.items()
    }
    gguf_files.checkpoints.write_tensors(tmp_path / "m.gguf.folder", rounded)
    for dtype in ("float32", "bfloat16"):
        pair = [
            leaves(load_model(path, dtype, quantization=quantization))
            for path in (file, tmp_path / "m.gguf.folder")
        ]
        for got, want in zip(*pair, strict=True):
            np.testing.assert_array_equal(got, want)


def test_loading_converts_a_piece_at_a_time(tmp_path, monkeypatch):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2", kind="Q8_0")
    want = leaves(load_model(file))
    sizes = []
    convert = GGUFTensor._dequantized

    def measured(self, rows, columns, width):
        values = convert(self, rows, columns, width)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(GGUFTensor, "_dequantized", measured)
    monkeypatch.setattr(placing, "PIECE", 256)
    for got, expected in zip(leaves(load_model(file)), want, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert max(sizes) <= 256


# Split files.


def split(folder, name: str, count: int):
    """Write a case as `count` files; returns their paths."""
    source = gguf_files.write_case(folder / "m.gguf", name)
    reader = gguf.GGUFReader(source)
    config = json.loads((folder / "m.gguf.folder" / "config.json").read_text())
    paths = []
    for part in range(count):
        path = folder / "split" / f"m-{part + 1:05d}-of-{count:05d}.gguf"
        path.parent.mkdir(exist_ok=True)
        writer = gguf.GGUFWriter(path, "qwen2")
        if not part:
            gguf_files.write_metadata(writer, gguf_files.metadata(config, "qwen2"))
            gguf_files.write_tokens(writer, config)
        writer.add_uint16("split.no", part)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[part::count]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        gguf_files.finish(writer)
        paths.append(path)
    return paths


def test_a_split_file_is_loaded_from_any_part_or_its_folder(tmp_path):
    paths = split(tmp_path, "qwen2", 3)
    want = leaves(load_model(tmp_path / "m.gguf"))
    for path in (paths[0], paths[2], paths[0].parent):
        for got, expected in zip(leaves(load_model(path)), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    paths[1].rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003.gguf: no such fi"):
        load_model(paths[0])


# Invalid files.


def with_metadata(folder, entries, name="qwen2", without=()):
    """A case with changed keys, as a file without its folder's name."""
    case = gguf_files.write_case(folder / "from.gguf", name)
    read = gguf_file.load(case)
    path = folder / "changed.gguf"
    kept = {k: v for k, v in {**read.metadata, **entries}.items() if k not in without}
    writer = gguf.GGUFWriter(path, kept.pop("general.architecture"))
    gguf_files.write_metadata(writer, kept)
    for tensor in gguf.GGUFReader(case).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    gguf_files.finish(writer)
    return path


@pytest.mark.parametrize(
    ("entries", "without", "message"),
    [
        (
            {"general.architecture": "mamba"},
            (),
            r"general.architecture: expected one of \[.*'gemma', .*, got 'mamba'",
        ),
        ({"general.architecture": "clip"}, (), "got a vision or audio tower"),
        ({}, ("qwen2.block_count",), "qwen2.block_count: expected a value in the met"),
        ({"qwen2.block_count": "2"}, (), "qwen2.block_count: expected int.*got '2'"),
        ({"qwen2.block_count": [2, 3]}, (), "same number for all layers, got .2, 3"),
        ({"qwen2.attention.value_length": 8}, (), "value_length: expected the size of"),
        ({"qwen2.attention.sliding_window": 8}, (), "sliding_window: expected none"),
        ({"qwen2.logit_scale": 0.5}, (), "qwen2.logit_scale: expected 0.0 or none"),
        ({"qwen2.attention.causal": False}, (), "attention.causal: expected True"),
        ({"qwen2.rope.scaling.type": "su"}, (), "rope.scaling.type: expected 'none'"),
        ({"tokenizer.ggml.eos_token_id": 128}, (), "eos_token_id: expected an id bel"),
        ({"split.count": 2}, (), "split.count: expected 1.*got 2; name the parts"),
        ({"qwen2.rope.dimension_count": 8}, (), "partial_rotary_factor: expected 1"),
    ],
)
def test_metadata_that_is_missing_or_not_supported_is_refused_by_key(
    entries, without, message, tmp_path
):
    file = with_metadata(tmp_path, entries, without=without)
    with pytest.raises(ValueError, match=message):
        load_model(file)


def test_tensors_that_are_missing_unknown_or_misshapen_are_listed_by_name(tmp_path):
    case = gguf_files.write_case(tmp_path / "from.gguf", "llama")
    writer = gguf.GGUFWriter(tmp_path / "changed.gguf", "llama")
    metadata = dict(gguf_file.load(case).metadata)
    del metadata["general.architecture"]
    gguf_files.write_metadata(writer, metadata)
    for tensor in gguf.GGUFReader(case).tensors:
        name, data = tensor.name, np.array(tensor.data)
        if name == "blk.1.attn_q.weight":
            name = "blk.1.attn_new.weight"
        if name == "blk.0.ffn_up.weight":
            data = data[:-1]
        writer.add_tensor(name, data)
    gguf_files.finish(writer)
    with pytest.raises(ValueError, match=r"do not fit the metadata of .*changed.gguf"):
        load_model(tmp_path / "changed.gguf")
    with pytest.raises(
        ValueError,
        match=r"missing blk.1.attn_q.weight; unknown blk.1."
        r"attn_new.weight|unknown blk.1.attn_new.weight",
    ):
        load_model(tmp_path / "changed.gguf")
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight: expected shape \(64"):
        load_model(tmp_path / "changed.gguf")


def test_quantisations_that_nothing_can_convert_are_refused_by_tensor(tmp_path):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2", kind="Q8_0")
    contents = file.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = contents.index(name) + len(name) + 4 + 2 * 8  # rank and two sizes
    assert contents[at : at + 4] == struct.pack("<I", 8)
    for number, what in ((99, "quantisation number 99"), (24, "I8")):
        changed = contents[:at] + struct.pack("<I", number) + contents[at + 4 :]
        file.write_bytes(changed)
        with pytest.raises(
            ValueError, match=rf"blk.0.ffn_up.weight: .*got {what}; pip"
        ):
            load_model(file)


def test_files_cut_off_anywhere_are_refused_by_what_is_missing(tmp_path):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2")
    contents = file.read_bytes()
    for size in [0, 3, 4, 8, 23, 24, 40, 100, 500, 2000, len(contents) - 33]:
        file.write_bytes(contents[:size])
        with pytest.raises(
            ValueError, match=r"m.gguf: .*(truncated|expected a GGUF f)"
        ):
            load_model(file)
    file.write_bytes(contents[:-40])
    with pytest.raises(ValueError, match=r"m.gguf: \w.*: truncated: expected \d+ byte"):
        load_model(file)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"version https://git-lfs", "pointer of Git LFS: git lfs pull"),
        (b"GGJT" + bytes(40), "expected a GGUF file, got one that starts with b'GGJT'"),
        (b"GGUF\0\0\0\3" + bytes(40), "got a big-endian file"),
        (b"GGUF\1\0\0\0" + bytes(40), "expected GGUF version 2 or 3, got 1"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "truncated"),
        (
            struct.pack("<4sIQQQsI", b"GGUF", 3, 0, 1, 1, b"a", 9)
            + struct.pack("<IQ", 9, 1) * 5000,
            "a: expected a known type of value",
        ),
    ],
)
def test_other_files_are_refused_with_what_they_are(start, message, tmp_path):
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "m.gguf")


def test_random_damage_to_a_header_never_escapes_as_another_error(tmp_path):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2")
    contents = bytearray(file.read_bytes())
    rng = np.random.default_rng(0)
    header = contents.index(b"blk.1.ffn_up.weight")
    messages = []
    for _ in range(300):
        damaged = contents.copy()
        at = int(rng.integers(8, header))
        damaged[at] = int(rng.integers(256))
        file.write_bytes(damaged)
        try:
            config = load_config(file)
            gguf_tensors.read_tensors(
                gguf_file.load(file),
                gguf_tensors.read_names(gguf_file.load(file), config),
            )
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert all("expected" in message for message in messages)


def test_without_the_package_gguf_the_error_names_the_extra(tmp_path, monkeypatch):
    file = gguf_files.write_case(tmp_path / "m.gguf", "qwen2")
    gguf_file.block_size.cache_clear()
    gguf_file._load.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'jpaged\[gguf\]'"):
        load_model(file)
