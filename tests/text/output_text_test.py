"""The text of outputs and stop strings, against searches in the whole text."""

import hypothesis
import pytest
from hypothesis import strategies as st

from jpaged.text.output_text import OutputText, StopChecker
from tests.text.tokenizer_test import BYTE_LEVEL


def first_stop(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Return the text before the first complete stop string, letter by letter."""
    for end in range(1, len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end - len(string)], string
    return text, None


letters = st.text("abc", max_size=6)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(letters, max_size=10),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_are_found_across_any_division_into_pieces(pieces, stop):
    checker = StopChecker(stop)
    shown = [checker.push(piece) for piece in pieces]
    is_stopped = checker.stop_reason is not None
    shown.append(checker.finish())
    text, reason = first_stop("".join(pieces), stop)
    assert checker.text == "".join(shown) == text
    assert checker.stop_reason == reason
    if is_stopped:
        # num_tokens ends with the token that completes the stop string.
        before = "".join(pieces[: checker.num_tokens - 1])
        assert first_stop(before, stop)[1] is None
        assert first_stop(before + pieces[checker.num_tokens - 1], stop)[1] == reason
    else:
        assert checker.num_tokens == len(pieces)


def test_the_last_characters_are_held_back_while_they_can_become_a_stop_string():
    checker = StopChecker(["END"])
    assert checker.push("text E") == "text"
    assert checker.push("N") == " "
    assert checker.push("ds here, EN") == "ENds here, "
    assert checker.push("D and more") == ""
    assert checker.finish() == ""
    assert checker.text == "text ENds here, "
    assert (checker.num_tokens, checker.stop_reason) == (4, "END")
    assert checker.push("more") == ""
    assert checker.num_tokens == 4


def test_without_stop_strings_no_text_is_held_back():
    assert StopChecker().push("abc") == "abc"


def test_stop_strings_in_the_first_min_tokens_are_ignored():
    checker = StopChecker(["b"], min_tokens=2)
    for piece in ["ab", "b", "ab"]:
        checker.push(piece)
    assert (checker.text, checker.num_tokens) == ("abba", 3)


def test_output_text_stops_within_a_token_and_counts_that_token():
    token_ids = BYTE_LEVEL.encode("日本語。hello world")[1:]
    output = OutputText(BYTE_LEVEL, stop=["o w"])
    shown = "".join(output.push(token) for token in token_ids) + output.finish()
    assert shown == output.text == "日本語。hell"
    assert output.stop_reason == "o w"
    used = BYTE_LEVEL.decode(token_ids[: output.num_tokens])
    assert "o w" in used
    assert "o w" not in BYTE_LEVEL.decode(token_ids[: output.num_tokens - 1])


def test_without_a_tokenizer_tokens_are_counted_and_stop_strings_are_refused():
    output = OutputText(None)
    assert output.push(5) == ""
    assert (output.finish(), output.text, output.num_tokens) == ("", "", 1)
    with pytest.raises(ValueError, match=r"stop: expected none, got .* stop_token_ids"):
        OutputText(None, stop=["x"])


MARKS = {"<s>": 0, "</s>": 1}


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from(["a", "b", "ab", "<s>", "</s>"]), max_size=8),
    st.lists(
        st.lists(st.sampled_from(["a", "b", "<s>", "</s>"]), min_size=1, max_size=3),
        max_size=2,
    ),
    st.booleans(),
)
def test_a_stop_string_can_contain_special_tokens_that_the_text_leaves_out(
    pieces, stop, is_included
):
    stop = ["".join(parts) for parts in stop]
    output = OutputText(BYTE_LEVEL, stop=stop, include_stop=is_included)
    shown, ids = "", []
    for piece in pieces:
        found = BYTE_LEVEL.encode(piece, add_special_tokens=False)
        ids += [MARKS[piece]] if piece in MARKS else found
    for token in ids:
        shown += output.push(token)
    shown += output.finish()
    # Special tokens are one character each, as they are indivisible.
    marks = {"<s>": "1", "</s>": "2"}

    def marked(text):
        for mark, digit in marks.items():
            text = text.replace(mark, digit)
        return text

    def unmarked(text):
        return text.replace("1", "").replace("2", "")

    # Letter by letter: a stop string without special tokens is searched in the text
    # without them.
    text = "".join(marked(piece) for piece in pieces)
    for end in range(1, len(text) + 1):
        found = {
            s: len(unmarked(text[: end - len(marked(s))]))
            for s in stop
            if text[:end].endswith(marked(s)) and marked(s) != s
        } | {
            s: len(unmarked(text[:end])) - len(s)
            for s in stop
            if unmarked(text[:end]).endswith(s)
            and marked(s) == s
            and text[end - 1] not in "12"
        }
        if found:
            start = min(found.values())
            assert found[output.stop_reason] == start
            included = output.stop_reason if is_included else ""
            assert output.text == unmarked(text)[:start] + included
            break
    else:
        assert output.stop_reason is None
        assert output.text == unmarked(text)
    assert shown == output.text


def test_special_tokens_are_part_of_the_text_if_they_are_not_skipped():
    ids = [0, *BYTE_LEVEL.encode("hello", add_special_tokens=False), 1, 1]
    output = OutputText(BYTE_LEVEL, stop=["</s></s>"], skip_special_tokens=False)
    shown = "".join(output.push(token) for token in ids) + output.finish()
    assert (shown, output.stop_reason) == ("<s>hello", "</s></s>")
    output = OutputText(BYTE_LEVEL, skip_special_tokens=False)
    shown = "".join(output.push(token) for token in ids) + output.finish()
    assert shown == "<s>hello</s></s>"
