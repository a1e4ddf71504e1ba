"""Texts that divide tokenizers: spaces, digits, scripts, code and special tokens."""

import random
from collections.abc import Sequence

_PIECES = (
    *("Hello", " world", "don't", "I'LL", "we've", "HTTPServer", "naïve", "Straße"),
    *(
        "def f(x):\n",
        "    return x\n",
        "\t\tif",
        "  ",
        "   ",
        "\n\n",
        "\r\n",
        " \n ",
        "\t",
    ),
    *("2024", " 1,234.56", "007", "٣٤٥", "½", "²", "1st", "x86_64", "0xFF", "3.14e-10"),
    *(
        "日本語",
        "中文测试",
        "한국어",
        "Привет",
        "שלום",
        "العربية",
        "ไทย",
        "हिन्दी",
        "ελληνικά",
    ),
    *(
        "🙂",
        "👩‍👩‍👧",
        "🇩🇪",
        "e\u0301",
        "\u200b",
        "\ufeff",
        "\u00a0",
        "ﬁ",
        "Ⅷ",
        "𝕏",
        "￥",
    ),
    *("!!!", "...", "—", "“quoted”", "#", "$", "@user", "https://a.b/c?d=e&f", "<tag>"),
    *("(", ")", "[]", "{}", "\\", "/", "|", "~", "^", "`", "'", '"', "'s", "'S", "''"),
    *("▁", " ▁", "Ġ", "Ċ", "\x00", "\x7f", "_", "__init__", "--", "==", "->", "::"),
)


def texts(count: int, specials: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Different texts, the same ones for the same arguments.

    Args:
      count: how many.
      specials: special tokens, in about a third of the texts.
      seed: of the choice.
    """
    rng = random.Random(seed)
    found = ["", " ", "\n", *_PIECES, *(f" {piece} {piece}" for piece in _PIECES)]
    while len(found) < count:
        pieces = rng.choices(_PIECES, k=rng.randint(2, 12))
        if specials and rng.random() < 0.33:
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(specials))
        # Any characters: words of one script and mixtures.
        if rng.random() < 0.3:
            first = rng.choice(
                (0x20, 0xA0, 0x370, 0x600, 0x900, 0x3040, 0xAC00, 0x1F300)
            )
            pieces += [chr(first + rng.randrange(96)) for _ in range(8)]
        found.append("".join(pieces))
    return found[:count]
