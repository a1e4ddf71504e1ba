"""LLM: generated tokens against a naive loop, ends of outputs, statistics."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from jpaged.attention import backends
from jpaged.llm import LLM
from jpaged.params import SamplingParams
from jpaged.serving import engine_host, runner
from tests.support.tiny_llm import (
    EOS,
    GREEDY,
    MAX_LEN,
    SIZES,
    is_idle,
    random_prompts,
    tokens_of,
)

pytestmark = pytest.mark.long


@pytest.fixture
def llm(plain_llm):
    return plain_llm


# Generated tokens


def test_greedy_tokens_are_those_of_the_naive_loop_for_more_requests_than_entries(
    llm, naive
):
    prompts = random_prompts(50)
    assert len(prompts) > llm.config.max_num_requests
    params = [
        dataclasses.replace(GREEDY, max_tokens=4 + i % 9) for i in range(len(prompts))
    ]
    outputs = llm.generate(prompts, params, progress=False)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        (sample,) = output.outputs
        assert output.prompt_token_ids == prompt
        assert sample.token_ids == naive(prompt, param.max_tokens)
        assert sample.finish_reason == "length"
        assert sample.logprobs is None
    assert is_idle(llm)


def test_a_seeded_request_has_the_same_tokens_alone_in_a_batch_and_shuffled(llm):
    prompts = random_prompts(32, seed=1, longest=12)
    params = [
        SamplingParams(
            n=1 + i % 3, seed=i, temperature=0.8, top_p=0.9, max_tokens=5 + i % 4
        )
        for i in range(len(prompts))
    ]
    assert sum(param.n for param in params) >= 63
    together = tokens_of(llm.generate(prompts, params))
    order = np.random.default_rng(2).permutation(len(prompts))
    shuffled = tokens_of(
        llm.generate([prompts[i] for i in order], [params[i] for i in order])
    )
    assert shuffled == [together[i] for i in order]
    for i in (0, 7, 31):
        assert tokens_of(llm.generate(prompts[i], params[i])) == [together[i]]


def test_samples_of_a_request_are_in_order_and_differ(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
    (three,) = llm.generate([5, 6, 7], params)
    assert [sample.index for sample in three.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in three.outputs}) == 3
    (two,) = llm.generate([5, 6, 7], dataclasses.replace(params, n=2))
    assert tokens_of([two])[0] == tokens_of([three])[0][:2]


def test_samples_share_the_blocks_of_their_prompt(decoder):
    llm = LLM(decoder, **SIZES)
    prompt = random_prompts(1, longest=31)[0] * 3
    params = SamplingParams(n=4, max_tokens=6, ignore_eos=True)
    llm.generate(prompt[:30], params)
    assert llm.stats()["blocks_saved_by_sharing"] > 0.3
    assert llm.stats()["num_block_copies"] >= 3


def test_requests_without_a_seed_use_the_seed_of_the_llm_and_their_number(decoder):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = []
    for seed in (3, 3, 4):
        llm = LLM(decoder, seed=seed, **SIZES)
        # Two calls here, one call below: only the number of the request matters.
        pair = [llm.generate([9, 8], params)[0], llm.generate([9, 8], params)[0]]
        runs.append(tokens_of(pair))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]
    together = LLM(decoder, seed=3, **SIZES).generate([[9, 8]] * 2, params)
    assert tokens_of(together) == runs[0]


def test_text_is_the_text_of_the_tokens_and_prompts_are_text_or_token_ids(llm):
    (by_text, by_ids) = llm.generate(["hello", llm.tokenizer.encode("hello")], GREEDY)
    assert by_text.prompt == "hello"
    assert by_ids.prompt is None
    assert tokens_of([by_text]) == tokens_of([by_ids])
    (sample,) = by_text.outputs
    assert sample.text == llm.tokenizer.decode(sample.token_ids)
    assert len(sample.text) >= 12


def test_a_model_without_a_tokenizer_accepts_token_ids_and_returns_no_text(
    decoder, naive
):
    llm = LLM(decoder, **SIZES)
    assert llm.tokenizer is None
    (output,) = llm.generate([5, 6], GREEDY)
    assert output.outputs[0].token_ids == naive([5, 6], 12)
    assert output.outputs[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("hello")
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate([5], SamplingParams(stop="a"))


def test_numpy_arrays_and_tuples_are_prompts(llm, naive):
    outputs = llm.generate([np.array([5, 6]), (5, 6)], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)]] * 2


def test_no_prompts_return_no_outputs(llm):
    assert llm.generate([]) == []
    assert list(llm.stream([])) == []


# How outputs end


def test_a_stop_string_across_tokens_ends_the_output(llm, naive):
    prompt = llm.tokenizer.encode("abc")
    token_ids = naive(prompt, 24)
    pieces = [llm.tokenizer.decode([token]) for token in token_ids]
    text = "".join(pieces)
    # From the last character of token 9 to the first of token 11.
    stop = pieces[9][-1] + pieces[10] + pieces[11][0]
    first = text.find(stop)
    lengths = list(itertools.accumulate(map(len, pieces)))
    last = next(i for i, length in enumerate(lengths) if length >= first + len(stop))
    params = SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, stop=["never there", stop]
    )
    (output,) = llm.generate([prompt], params)
    (sample,) = output.outputs
    assert sample.token_ids == token_ids[: last + 1]
    assert sample.text == text[:first]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)
    assert len(sample.token_ids) < 24
    assert is_idle(llm)


def test_a_stop_token_ends_the_output_and_has_no_text(llm, naive):
    prompt = [7, 9]
    token_ids = naive(prompt, 12)
    stop = token_ids[5]
    end = token_ids.index(stop)
    params = dataclasses.replace(GREEDY, stop_token_ids=[stop])
    (sample,) = llm.generate([prompt], params)[0].outputs
    assert sample.token_ids == token_ids[: end + 1]
    assert sample.text == llm.tokenizer.decode(token_ids[:end])
    assert (sample.finish_reason, sample.stop_reason) == ("stop", stop)


def test_eos_ends_the_output_unless_it_is_ignored(llm, naive):
    ends = 0
    for prompt in random_prompts(8, seed=3, longest=6):
        token_ids = naive(prompt, 12)
        end = next((i for i, t in enumerate(token_ids) if t in EOS), None)
        params = dataclasses.replace(GREEDY, ignore_eos=False)
        (stopped,) = llm.generate([prompt], params)[0].outputs
        (ignored,) = llm.generate([prompt], GREEDY)[0].outputs
        assert ignored.token_ids == token_ids
        assert ignored.finish_reason == "length"
        if end is not None:
            ends += 1
            assert stopped.token_ids == token_ids[: end + 1]
            assert stopped.text == llm.tokenizer.decode(token_ids[:end])
            assert (stopped.finish_reason, stopped.stop_reason) == ("stop", None)
    assert ends >= 2


def test_an_output_ends_at_max_model_len(llm):
    params = dataclasses.replace(GREEDY, max_tokens=1000)
    (sample,) = llm.generate([[5] * 60], params)[0].outputs
    assert len(sample.token_ids) == MAX_LEN - 60
    assert sample.finish_reason == "length"


# Log-probabilities


def test_logprobs_are_those_of_the_plain_forward_in_float64(full_llm, naive):
    llm = full_llm
    prompts = [[5, 6, 7], [250, 3]]
    params = [
        SamplingParams(
            n=2, seed=1, temperature=1.2, max_tokens=6, ignore_eos=True, logprobs=3
        ),
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0),
    ]
    outputs = llm.generate(prompts, params)
    for prompt, param, output in zip(prompts, params, outputs, strict=True):
        for sample in output.outputs:
            logits = naive.logits_of(prompt + sample.token_ids)[len(prompt) - 1 :]
            logits = logits[: len(sample.token_ids)]
            totals = np.log(np.exp(logits).sum(axis=1, keepdims=True))
            expected = logits - totals
            total = 0.0
            for row, token, found in zip(
                expected, sample.token_ids, sample.logprobs, strict=True
            ):
                total += row[token]
                likely = set(np.argsort(-row)[: param.logprobs].tolist())
                assert set(found) == likely | {token}
                for other, entry in found.items():
                    # The logits are float32, summed in another order.
                    assert math.isclose(entry.logprob, row[other], abs_tol=1e-4)
                    assert entry.rank == 1 + (row > row[other]).sum()
                    assert entry.decoded_token == llm.tokenizer.decoded_token(other)
            assert math.isclose(sample.cumulative_logprob, total, abs_tol=1e-3)


def test_logprobs_of_the_whole_vocabulary_need_a_larger_max_logprobs(llm):
    with pytest.raises(ValueError, match=r"at most max_logprobs \(20\), got 300"):
        llm.generate([5], SamplingParams(logprobs=-1))


# Statistics, policies, closing


def test_statistics_and_metrics_of_one_request(decoder):
    llm = LLM(decoder, **SIZES)
    assert llm.stats()["tokens_per_s"] == llm.stats()["kv_token_share"] == 0
    params = SamplingParams(n=2, max_tokens=5, ignore_eos=True)
    (output,) = llm.generate([5, 6, 7], params)
    stats = llm.stats()
    assert stats["prompt_tokens"] == 3
    assert stats["generated_tokens"] == 10
    assert stats["computed_tokens"] >= 12
    assert stats["num_steps"] >= 5
    assert stats["num_blocks"] == stats["num_free_blocks"] == 32
    # Keys and values, 2 layers, 2 heads of 16 float32 numbers, 4 tokens per block.
    assert stats["kv_bytes"] == 32 * 2 * 2 * 2 * 16 * 4 * 4
    assert 0 < stats["kv_token_share"] <= 1
    assert stats["tokens_per_s"] > 0
    assert stats["num_preemptions"] == stats["num_swapped_blocks"] == 0
    assert stats["prefix_hit_ratio"] == 0
    assert stats["num_compilations"] >= 4  # the programs of a prefill and of decoding
    assert stats.pop("attention") == backends.preferred()[0].name
    assert all(isinstance(value, int | float) for value in stats.values())
    metrics = output.metrics
    assert metrics["num_prompt_tokens"] == 3
    assert metrics["num_generated_tokens"] == 10
    assert 0 <= metrics["first_step"] < metrics["last_step"]
    assert 0 < metrics["first_token_s"] <= metrics["total_s"]


def test_a_pool_that_is_too_small_preempts_and_counts_preemptions(decoder, naive):
    llm = LLM(decoder, **SIZES)
    prompts = random_prompts(4, seed=5, longest=12)
    params = dataclasses.replace(GREEDY, max_tokens=40)
    outputs = llm.generate(prompts, params)
    assert tokens_of(outputs) == [[naive(prompt, 40)] for prompt in prompts]
    assert llm.stats()["num_preemptions"] > 0
    num_preemptions = [output.metrics["num_preemptions"] for output in outputs]
    assert sum(num_preemptions) == llm.stats()["num_preemptions"]


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", [5, 6, 7, 8]),
        ("priority", [8, 6, 7, 5]),
        ("shortest_prompt", [7, 5, 6, 8]),
    ],
)
def test_requests_are_submitted_in_the_order_of_the_policy(
    decoder, monkeypatch, policy, order
):
    llm = LLM(decoder, policy=policy, **SIZES)
    params = [dataclasses.replace(GREEDY, priority=p) for p in (3, 1, 2, 0)]
    submitted = []

    def submit(self, requests):
        (own,) = requests  # of the only replica
        submitted.extend(request.prompt_token_ids[0] for request in own)
        raise KeyboardInterrupt

    # No step runs: other tests check the order within the engine.
    monkeypatch.setattr(engine_host.EngineHost, "submit", submit)
    monkeypatch.setattr(runner.EngineRunner, "prepare", lambda *_: [])  # nor compiles
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5] * 2, [6] * 3, [7], [8] * 4], params)
    assert submitted == order


def test_no_load_and_no_value_compiles_anything_after_warm_up(decoder):
    llm = LLM(decoder, **SIZES)
    llm.warm_up(SamplingParams(top_p=0.9))
    compiled = llm.stats()["num_compilations"]
    assert compiled > 0
    for number in (1, 2, 3, 5, 20):
        llm.generate(random_prompts(number, seed=number), GREEDY)
    llm.generate(random_prompts(3, seed=8), SamplingParams(seed=1, top_k=5))
    llm.generate([[5] * 40, [6]], SamplingParams(n=4, temperature=0.3, min_p=0.1))
    list(llm.stream([[4, 5]] * 5, SamplingParams(n=2, top_p=0.5, max_tokens=30)))
    assert llm.stats()["num_compilations"] == compiled


def test_repr_shows_the_sizes_and_close_ends_all_use(folder):
    with LLM(folder, **SIZES) as llm:
        assert repr(llm).startswith(f"LLM({str(folder)!r}, dtype='float32', ")
        assert "num_blocks=32" in repr(llm)
    assert "closed" in repr(llm)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([5])
    with pytest.raises(RuntimeError, match="closed"):
        llm.stats()
    llm.close()


def test_no_progress_bar_is_shown_if_stderr_is_not_a_terminal(llm, capsys):
    llm.generate([5, 6], GREEDY, progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [dict(attention="reference"), dict(attention="xla")]
)
def test_each_attention_backend_generates_the_same_tokens(decoder, naive, arguments):
    llm = LLM(decoder, **SIZES, **arguments)
    outputs = llm.generate([[5, 6], [9]], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)], [naive([9], 12)]]


@pytest.mark.slow
def test_keys_and_values_can_be_stored_in_another_dtype(decoder):
    llm = LLM(decoder, kv_dtype="bfloat16", **SIZES)
    assert llm.stats()["kv_bytes"] == 32 * 2 * 2 * 2 * 16 * 4 * 2
    (output,) = llm.generate([[5, 6]], GREEDY)
    assert len(output.outputs[0].token_ids) == 12
