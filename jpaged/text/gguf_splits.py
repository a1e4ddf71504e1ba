"""GGUF pre-tokenizers: how a byte-level tokenizer divides a text before it merges.

Pipeline: tokenizer.ggml.pre -> [text.gguf_splits] -> text.gguf_tokenizer.

Each pattern divides the parts that the patterns before it left. llama.cpp defines the
names; the patterns are those of the original tokenizers.

Source: https://github.com/ggml-org/llama.cpp, src/llama-vocab.cpp.
"""

from typing import NamedTuple


class Split(NamedTuple):
    """A kind of pre-tokenizer.

    Attributes:
      patterns: regular expressions, in the order of their use.
      ignores_merges: a part that is a token is not divided, whatever the merges.
      adds_bos: whether texts start with BOS if the file does not say it.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    adds_bos: bool = False


_SHORT = "'s|'t|'re|'ve|'m|'ll|'d"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = rf"{_SHORT}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"


def _words(numbers: str, letters: str = r"\p{L}", after: str = r"[\r\n]*") -> str:
    """GPT-4's pattern.

    Args:
      numbers: pattern of a number.
      letters: characters of a word.
      after: what belongs to the punctuation before it.
    """
    others = rf" ?[^\s{letters}\p{{N}}]+{after}"
    word = rf"[^\r\n\p{{L}}\p{{N}}]?[{letters}]+"
    return rf"(?i:{_SHORT})|{word}|{numbers}|{others}|{_END}"


def _cased_words(numbers: str, short: str = "") -> str:
    """GPT-4o's pattern: a capital letter within a word starts a new part."""
    start = r"[^\r\n\p{L}\p{N}]?"
    upper, lower = (
        rf"[\p{{{kind}}}\p{{Lm}}\p{{Lo}}\p{{M}}]" for kind in ("Lu}\\p{Lt", "Ll")
    )
    words = f"{start}{upper}*{lower}+{short}|{start}{upper}+{lower}*{short}"
    others = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
    return f"{words}|{numbers}|{others}|{_END}"


_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    rf"|{_END}"
)
_ONE, _THREE = r"\p{N}", r"\p{N}{1,3}"
_KINDS = {
    Split((_GPT2,)): "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 "
    "gigachat a.x-4.0 mellum modern-bert default",
    Split((_ONE, _GPT2)): "smollm starcoder refact command-r codeshell exaone "
    "minerva-7b mellum2",
    Split((_words(_THREE),), True, True): "llama-bpe llama3 llama-v3 falcon3 falcon-h1 "
    "pixtral midm-2.0 lfm2",
    Split((_words(_THREE),)): "dbrx smaug-bpe glm4 chatglm-bpe",
    Split((_words(_ONE),)): "qwen2 deepseek-r1-qwen kormo megrez stablelm2 hunyuan "
    "solar-open grok-2",
    Split((_words(_ONE, r"\p{L}\p{M}"),)): "qwen35",
    Split((_words(r"\p{N}{1}", after=""),)): "seed-coder",
    Split((_cased_words(_ONE),), True, True): "tekken",
    Split(
        (_cased_words(_THREE, f"(?i:{_SHORT})?"),)
    ): "gpt-4o llama4 kanana2 minimax-m2",
    Split((_THREE, _CJK, _DEEPSEEK3)): "deepseek-v3 hunyuan-dense joyai-llm",
    Split(
        (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", _ONE)
    ): "deepseek-coder",
    Split(
        (
            r"[\p{P}\$\+<=>\^~\|`]+",
            _GPT2,
            "[0-9][0-9][0-9]",
        )
    ): "falcon",
    Split((" ?[^(\\s|.,!?…。，、।۔،)]+",)): "poro-chat bloom gpt3-finnish",
    Split((" ?[^(\\s|.,!?…。，、।۔،)]+", _ONE)): "viking",
}
SPLITS = {name: split for split, names in _KINDS.items() for name in names.split()}
