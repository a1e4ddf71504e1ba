"""Tokens that a folder declares outside tokenizer.json, as AutoTokenizer reads them."""

import json
import pathlib

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jpaged.text.tokenizer import Tokenizer

TEXT = "<|im_start|>user <tool> x<e><|im_end|> <pad>"


def token(content: str, **flags: bool) -> dict:
    """An entry of added_tokens_decoder."""
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True} | off | flags


START, END = token("<|im_start|>"), token("<|im_end|>")
DECODER = {"256": START, "257": END, "258": token("<tool>", special=False)}
# (files, ids of 256 and more in TEXT, TEXT decoded without special tokens), computed by
# transformers 5.24's AutoTokenizer. One difference: it does not see that
# additional_special_tokens are special where added_tokens.json gives their ids.
CASES: dict[str, tuple[dict, list[int], str]] = {
    "decoder": (
        {"tokenizer_config": {"added_tokens_decoder": DECODER}},
        [256, 258, 257],
        "user <tool> x<e> <pad>",
    ),
    "decoder_unsorted": (
        {"tokenizer_config": {"added_tokens_decoder": {"257": START, "256": END}}},
        [257, 256],
        "user <tool> x<e> <pad>",
    ),
    "added_tokens": (
        {"added_tokens": {"<|im_start|>": 256, "<|im_end|>": 257, "<tool>": 258}},
        [256, 258, 257],
        "<|im_start|>user <tool> x<e><|im_end|> <pad>",
    ),
    "map": (
        {
            "special_tokens_map": {
                "eos_token": "<|im_end|>",
                "bos_token": START,
                "additional_special_tokens": ["<e>"],
                "pad_token": "<pad>",
            }
        },
        [256, 259, 257, 258],
        "user <tool> x ",
    ),
    "names_in_config": (
        {
            "tokenizer_config": {
                "eos_token": "<|im_end|>",
                "pad_token": "<pad>",
                "additional_special_tokens": ["<|im_start|>"],
                "extra_special_tokens": ["<e>"],
            }
        },
        [258, 256, 257],
        "<|im_start|>user <tool> x ",
    ),
    "names_of_roles": (
        {
            "tokenizer_config": {
                "eos_token": "<|im_end|>",
                "extra_special_tokens": {"image_token": "<tool>"},
                "boi_token": "<e>",
            }
        },
        [258, 257, 256],
        "<|im_start|>user  x <pad>",
    ),
    "stripping": (
        {
            "tokenizer_config": {
                "added_tokens_decoder": {
                    "256": token("<tool>", lstrip=True, rstrip=True),
                    "257": token("<e>", single_word=True),
                }
            }
        },
        [256],
        "<|im_start|>userx<e><|im_end|> <pad>",
    ),
    "decoder_has_precedence": (
        {
            "tokenizer_config": {"added_tokens_decoder": {"256": END}},
            "special_tokens_map": {"additional_special_tokens": ["<e>"]},
            "added_tokens": {"<tool>": 257},
        },
        [256],
        "<|im_start|>user <tool> x<e> <pad>",
    ),
    "of_the_vocabulary": (
        {"tokenizer_config": {"added_tokens_decoder": {"3": token("$")}}},
        [],
        TEXT,
    ),
}


def write(folder: pathlib.Path, files: dict, *added: str) -> pathlib.Path:
    """Write a byte-level tokenizer of 256 tokens, more tokens, and further files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast"}
    files = {"tokenizer_config": {}} | files
    files["tokenizer_config"] = base | files["tokenizer_config"]
    for name, contents in files.items():
        (folder / f"{name}.json").write_text(json.dumps(contents), "utf-8")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_every_file_are_one_token_each(name, tmp_path):
    files, ids, text = CASES[name]
    tokenizer = Tokenizer.from_folder(write(tmp_path, files))
    assert tokenizer is not None
    got = tokenizer.encode(TEXT, add_special_tokens=False)
    assert [number for number in got if number >= 256] == ids
    assert tokenizer.decode(got) == text
    assert tokenizer.decode(got, skip_special_tokens=False).count("<") >= len(ids)


@pytest.mark.huggingface
@pytest.mark.parametrize("name", CASES)
def test_the_stored_ids_are_those_of_autotokenizer(name, tmp_path):
    import transformers

    files, ids, text = CASES[name]
    theirs = transformers.AutoTokenizer.from_pretrained(write(tmp_path, files))
    got = theirs(TEXT, add_special_tokens=False).input_ids
    assert [number for number in got if number >= 256] == ids
    assert theirs.decode(got, skip_special_tokens=True) == text


def test_special_tokens_with_ids_in_another_file_are_special(tmp_path):
    files = {
        "added_tokens": {"<|im_start|>": 256},
        "special_tokens_map": {"additional_special_tokens": ["<|im_start|>"]},
    }
    tokenizer = Tokenizer.from_folder(write(tmp_path, files))
    assert tokenizer is not None
    assert tokenizer.special_token_ids == {256}


def test_a_token_with_a_role_is_special_whatever_tokenizer_json_says(tmp_path):
    files = {"tokenizer_config": {"eos_token": "<|im_end|>"}}
    tokenizer = Tokenizer.from_folder(write(tmp_path, files, "<|im_end|>"))
    assert tokenizer is not None
    assert tokenizer.special_token_ids == {256}
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"300": START}, r"expected token id 256 for the added token '<\|im_start"),
        ({"x": START}, r"expected token ids and tokens in added_tokens_decoder"),
        ({"256": {"special": True}}, r"expected a text, or an object with content"),
        ([START], r"expected token ids and tokens in added_tokens_decoder"),
    ],
)
def test_a_declaration_that_cannot_be_kept_is_refused(decoder, message, tmp_path):
    files = {"tokenizer_config": {"added_tokens_decoder": decoder}}
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(write(tmp_path, files))


def test_bos_is_that_of_tokenizer_json_whatever_tokenizer_config_says(tmp_path):
    # transformers 5.24 ignores both flags beside a tokenizer.json, for every class.
    for flag in (True, False):
        config = {"add_bos_token": flag, "add_eos_token": flag, "bos_token": "<s>"}
        folder = tmp_path / str(flag)
        folder.mkdir()
        write(folder, {"tokenizer_config": config})
        plain = Tokenizer.from_folder(folder).encode("ab")
        assert len(plain) == 2
        file = folder / "tokenizer.json"
        backend = tokenizers.Tokenizer.from_file(str(file))
        backend.add_special_tokens(["<s>"])
        number = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", number)]
        )
        backend.save(str(file))
        assert Tokenizer.from_folder(folder).encode("ab") == [number, *plain]
