"""Argument names: translations of vLLM's and transformers' names, and suggestions."""

import copy
import dataclasses
import inspect
import pickle

import pytest

from jpaged import foreign_params, names, params
from jpaged.llm import LLM
from jpaged.outputs import RequestMetrics, RequestOutput
from jpaged.params import (
    BeamSearchParams,
    GuidedDecodingParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from jpaged.serving import vllm_names
from jpaged.serving.metrics import Event

ANY = {"json": {"type": "object"}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            dict(guided_decoding=GuidedDecodingParams(**ANY)),
            dict(structured_outputs=ANY),
        ),
        (dict(guided_decoding=None, n=2), dict(n=2)),
        (dict(best_of=3, n=3), dict(n=3)),
        (dict(best_of=None, use_beam_search=False), {}),
        (dict(max_new_tokens=5, num_return_sequences=2), dict(max_tokens=5, n=2)),
        (dict(stop_strings=["a"], do_sample=True), dict(stop=["a"])),
        (dict(stop=None, stop_token_ids=None, bad_words=None), {}),
        (dict(output_kind=RequestOutputKind.CUMULATIVE, skip_clone=True), {}),
    ],
)
def test_a_name_with_an_equal_meaning_is_translated(given, expected):
    assert SamplingParams(**given) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (SamplingParams, dict(best_of=4, n=2), "best_of: .*got 4; set n"),
        (SamplingParams, dict(use_beam_search=True), "BeamSearchParams"),
        (SamplingParams, dict(num_beams=4), "BeamSearchParams"),
        (SamplingParams, dict(thinking_token_budget=9), "set max_tokens"),
        (SamplingParams, dict(do_sample=False), "temperature=0"),
        (SamplingParams, dict(guided_decoding=ANY, structured_outputs=ANY), "got both"),
        (SamplingParams, dict(stop=["a"], detokenize=False), "detokenize=False"),
        (SamplingParams, dict(truncate_prompt_tokens=0), "truncate_prompt_tokens: "),
        (SamplingParams, dict(output_kind="delta"), "output_kind: .*RequestOutputKind"),
        (BeamSearchParams, dict(beam_width=2, max_tokens=3, temperature=0.5), "sample"),
        (StructuredOutputsParams, dict(grammar="root ::= x"), "grammar: .*regex"),
        (StructuredOutputsParams, dict(json_object=True, regex="a"), "exactly one"),
    ],
)
def test_a_name_without_an_equal_says_what_to_use(cls, given, message):
    with pytest.raises(ValueError, match=message):
        cls(**given)


@pytest.mark.parametrize(
    ("cls", "wrong", "right"),
    [
        (SamplingParams, "max_token", "max_tokens"),
        (SamplingParams, "temprature", "temperature"),
        (SamplingParams, "topp", "top_p"),
        (BeamSearchParams, "beam_widht", "beam_width"),
        (BeamSearchParams, "length_penalti", "length_penalty"),
        (StructuredOutputsParams, "regexp", "regex"),
        (LLM, "max_model_length", "max_model_len"),
        (LLM, "gpu_memory_utilisation", "gpu_memory_utilization"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(cls, wrong, right):
    arguments = {wrong: 1} | ({"model": "tiny-python"} if cls is LLM else {})
    for error in (TypeError, ValueError):
        with pytest.raises(error, match=f"{wrong}.*did you mean '{right}'"):
            cls(**arguments)


def test_attributes_can_be_set_and_are_checked_when_they_are_used():
    first = SamplingParams(temperature=0.5)
    other = first.clone()
    other.max_tokens, other.min_tokens = 40, 20
    assert (first.max_tokens, names.rechecked(first)) == (16, first)
    assert names.rechecked(other) == SamplingParams(
        temperature=0.5, max_tokens=40, min_tokens=20
    )
    other.stop = "END"
    assert names.rechecked(other).stop == ("END",)
    other.top_p = 7
    with pytest.raises(ValueError, match="top_p: expected"):
        names.rechecked(other)
    with pytest.raises(AttributeError, match="did you mean 'max_tokens'"):
        other.max_token = 3
    assert SamplingParams.from_optional(n=None, top_k=3) == SamplingParams(top_k=3)
    assert copy.deepcopy(first) == pickle.loads(pickle.dumps(first)) == first


def test_a_class_of_pydantic_is_a_schema():
    class Model:
        @staticmethod
        def model_json_schema():
            return {"type": "integer"}

    assert StructuredOutputsParams(json=Model).json == '{"type": "integer"}'
    assert StructuredOutputsParams(json_object=True).json == '{"type": "object"}'


@pytest.mark.parametrize(
    ("foreign", "own"),
    [
        (foreign_params.SAMPLING, params.SamplingParams),
        (foreign_params.BEAM_SEARCH, params.BeamSearchParams),
        (foreign_params.STRUCTURED, params.StructuredOutputsParams),
        (vllm_names.LLM_ARGUMENTS, LLM),
    ],
)
def test_a_foreign_name_leads_to_an_own_one_or_to_advice(foreign, own):
    known = set(inspect.signature(own).parameters)
    for name, argument in foreign.items():
        assert argument.ours in known or argument.instead or len(argument.equal) > 1, (
            name
        )


def test_the_methods_of_vllm_that_do_not_exist_say_so_by_name():
    methods = {name for name in dir(LLM) if not name.startswith("_")}
    assert not methods & set(vllm_names.LLM_METHODS)
    llm = object.__new__(LLM)
    for name, advice in vllm_names.LLM_METHODS.items():
        assert not hasattr(llm, name)
        with pytest.raises(AttributeError) as found:
            getattr(llm, name)
        assert advice in str(found.value)
    with pytest.raises(AttributeError, match="did you mean 'generate'"):
        getattr(llm, "generated")  # noqa: B009


def test_metrics_have_vllm_s_names_beside_ours():
    events = [Event("queued", 5.0, 0), Event("scheduled", 5.5, 0)]
    events += [Event("first_token", 6.0, 1), Event("finished", 8.0, 4)]
    measured = dict(queue_s=0.5, first_token_s=1.0, num_generated_tokens=4)
    output = RequestOutput(
        0, "a", [1], [], metrics=measured | {"num_cached_tokens": 7}, events=events
    )
    found = output.metrics
    assert isinstance(found, RequestMetrics)
    assert found["queue_s"] == found.queue_s == found.time_in_queue == 0.5
    assert found.first_token_latency == 1.0
    assert found.num_generation_tokens == 4
    assert output.num_cached_tokens == 7
    stamps = found.queued_ts, found.scheduled_ts, found.first_token_ts
    assert (*stamps, found.last_token_ts) == (5.0, 5.5, 6.0, 8.0)
    assert found.finished_time - found.arrival_time == pytest.approx(3.0)
    assert found.first_token_time - found.first_scheduled_time == pytest.approx(0.5)
    with pytest.raises(AttributeError, match=r"arrival_time.*got 'arrival'"):
        found.arrival  # noqa: B018
    assert pickle.loads(pickle.dumps(output)) == output
    assert dataclasses.replace(output, error="x").metrics.queued_ts == 5.0


def test_sizes_of_parallelism_become_a_mesh(monkeypatch):
    monkeypatch.setattr(vllm_names, "make_mesh", lambda **sizes: sizes)
    given = dict(tensor_parallel_size=2, data_parallel_size=3, block_size=None, seed=1)
    mesh = dict(tensor=2, data=3)
    assert vllm_names.llm_arguments(given) == dict(seed=1, mesh=mesh)
    assert vllm_names.llm_arguments(dict(tensor_parallel_size=1)) == {}
    with pytest.raises(ValueError, match="expected one of both, got a mesh too"):
        vllm_names.llm_arguments(given | dict(mesh=mesh))
    with pytest.raises(ValueError, match="tensor_parallel_size: expected an integer"):
        vllm_names.llm_arguments(dict(tensor_parallel_size=0))
