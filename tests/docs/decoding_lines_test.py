"""The promised lengths: three algorithms in 25 lines, a logits processor in 8."""

import re

from tests.support.paths import ROOT

BLOCK = re.compile(r"<!-- at most (\d+) lines -->\n```python\n(.*?)```", re.DOTALL)


def test_examples_have_at_most_the_promised_lines():
    blocks = BLOCK.findall((ROOT / "docs" / "decoding.md").read_text())
    lengths = [
        (int(most), sum(bool(line.strip()) for line in text.splitlines()))
        for most, text in blocks
    ]
    assert sorted(most for most, _ in lengths) == [8, 25, 25, 25]
    for most, length in lengths:
        assert 3 < length <= most
    assert sum("DecodingAlgorithm(" in text for _, text in blocks) == 3
    assert sum("logits_processors=[" in text for _, text in blocks) == 1
