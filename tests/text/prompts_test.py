"""Prompts in all forms that users have, and values that are no prompts."""

import array
import collections

import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.text import prompts
from jpaged.text.tokenizer import Tokenizer
from tests.support.ids import stable_repr
from tests.support.tiny_llm import ascii_tokenizer

TOKENIZER = Tokenizer(ascii_tokenizer())
ABC = [TOKENIZER.backend.token_to_id(letter) for letter in "abc"]

NO_PROMPTS = [
    *(b"abc", bytearray(b"abc"), memoryview(b"abc")),
    *(5, 5.9, True, None, {5, 6}, object(), [5.9], [True], ["7"], [5, "7"], [5, None]),
    *([[5]], np.array([5.0]), np.array([True]), np.array([["a"]]), np.array(5)),
    *(jnp.array([5.5]), jnp.array([True]), {"prompt": 5}, {"prompt": b"a"}, {}),
    *({"prompt": None}, {"text": "a"}, {"prompt": {"prompt": "a"}}),
    *(
        {"prompt": "a", "multi_modal_data": {"image": 1}},
        {"prompt": "a", "cache_salt": "x"},
    ),
]


@pytest.mark.parametrize("value", NO_PROMPTS, ids=stable_repr)
def test_what_is_no_prompt_is_refused_by_name(value):
    with pytest.raises(ValueError, match=r"^prefix: expected "):
        prompts.token_ids(TOKENIZER, "prefix", value)


def test_text_is_not_taken_for_token_ids():
    with pytest.raises(
        ValueError, match=r"^p\['prompt_token_ids'\]: expected token ids"
    ):
        prompts.token_ids(TOKENIZER, "p", {"prompt_token_ids": "abc"})


@pytest.mark.parametrize(
    "value",
    [
        ABC,
        tuple(ABC),
        np.array(ABC),
        np.array(ABC, np.uint16),
        jnp.array(ABC),
        [np.int64(ABC[0]), *ABC[1:]],
        list(jnp.array(ABC)),
        array.array("i", ABC),
        range(ABC[0], ABC[0] + 3),
        collections.UserList(ABC),
        {"prompt_token_ids": ABC},
        {"prompt_token_ids": ABC, "prompt": "other"},
        {"prompt": "abc"},
        {"prompt": "abc", "multi_modal_data": None, "mm_processor_kwargs": {}},
        np.str_("abc"),
        "abc",
    ],
    ids=stable_repr,
)
def test_every_form_of_a_prompt_has_the_same_tokens(value):
    found = prompts.token_ids(TOKENIZER, "prompt", value)
    assert found == ABC
    assert all(type(token) is int for token in found)
    (one,) = prompts.prompt_list("prompts", value)
    assert prompts.token_ids(TOKENIZER, "prompt", one) == ABC


@pytest.mark.parametrize(
    "value",
    [
        ["abc", "abc"],
        ("abc", ABC),
        (text for text in ["abc", "abc"]),
        map(str, ["abc", "abc"]),
        np.array(["abc", "abc"]),
        np.array(["abc", "abc"], object),
        np.array([ABC, ABC]),
        jnp.array([ABC, ABC]),
        [{"prompt": "abc"}, {"prompt_token_ids": ABC}],
        iter([ABC, ABC]),
        collections.deque(["abc", "abc"]),
        {"a": "abc", "b": "abc"}.values(),
    ],
    ids=stable_repr,
)
def test_every_form_of_several_prompts_is_a_list(value):
    found = prompts.prompt_list("prompts", value)
    assert [prompts.token_ids(TOKENIZER, "prompt", one) for one in found] == [ABC] * 2


@pytest.mark.parametrize(
    "value",
    [b"abc", bytearray(b"abc"), 5, None, {"a"}, np.array(5), np.array([1.5]), 1.5],
    ids=stable_repr,
)
def test_what_are_no_prompts_is_refused(value):
    with pytest.raises(ValueError, match=r"^prompts(\[0\])?: expected text"):
        prompts.scoring_pairs(TOKENIZER, value, value)


def test_scores_check_prompts_and_continuations_alike():
    for value in ([b"abc"], [5.5], [[True]]):
        with pytest.raises(ValueError, match=r"^prompts\[0\]: expected text or"):
            prompts.scoring_pairs(TOKENIZER, value, ["abc"])
        with pytest.raises(ValueError, match=r"^continuations\[0\]: expected text or"):
            prompts.scoring_pairs(TOKENIZER, ["abc"], value)
