"""LLM: against a loop that recomputes everything, and whatever users get wrong."""

import dataclasses
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jpaged import engine
from jpaged.llm import LLM
from jpaged.models.loading.checkpoint import load_model
from jpaged.params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from jpaged.serving import batcher, engine_host
from jpaged.text.tokenizer import Tokenizer
from tests.support.models.checkpoints import write_tiny_llama

pytestmark = pytest.mark.long

VOCAB_SIZE = 300
MAX_LEN = 64
EOS = (1, 40, 80, 120, 160, 200)  # several, so that greedy outputs do meet one
# Few rows and tokens, so that little is compiled; the programs are shared by all LLMs
# of this file and of generate_test.
SIZES = dict(
    max_num_seqs=4,
    max_num_batched_tokens=16,
    block_size=4,
    num_blocks=32,
    max_model_len=MAX_LEN,
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def ascii_tokenizer() -> tokenizers.Tokenizer:
    """One or two ASCII characters a token; text is the tokens put together."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    singles = [chr(code) for code in range(32, 127)]
    pairs = map("".join, itertools.product(letters, letters))
    words = ["<s>", "</s>", *singles, *pairs][:VOCAB_SIZE]
    vocab = {word: token for token, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def byte_tokenizer() -> tokenizers.Tokenizer:
    """Bytes and some merges, so that characters lie across tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["日本語の文章 naïve café 😀😀"], trainer)
    return backend


def write_folder(path: pathlib.Path) -> pathlib.Path:
    """A checkpoint of the tests' vocabulary, with the ASCII tokenizer."""
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, eos_token_id=list(EOS))
    ascii_tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, **SIZES)


@pytest.fixture(scope="module")
def decoder(folder):
    return load_model(folder, "float32")


@pytest.fixture(scope="module")
def naive(decoder):
    """Greedy tokens by recomputing everything for each of them."""
    forward = jax.jit(lambda model, tokens: model(tokens))
    known = {}

    def logits_of(token_ids):
        padded = np.zeros((1, MAX_LEN), np.int32)
        padded[0, : len(token_ids)] = token_ids
        return np.asarray(forward(decoder, jnp.asarray(padded)), np.float64)[0]

    def greedy(prompt, num_tokens):
        key = (tuple(prompt), num_tokens)
        if key not in known:
            token_ids = list(prompt)
            for _ in range(num_tokens):
                token_ids.append(int(logits_of(token_ids)[len(token_ids) - 1].argmax()))
            known[key] = token_ids[len(prompt) :]
        return known[key]

    greedy.logits_of = logits_of
    return greedy


def random_prompts(count, seed=0, longest=30):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, size=count)
    return [rng.integers(2, VOCAB_SIZE, size=size).tolist() for size in sizes]


def tokens_of(outputs):
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


def is_idle(llm):
    """Whether no sequence is left in the engine."""
    host = llm._host
    assert llm.stats()["num_free_blocks"] == llm.config.num_blocks
    return host.num_empty == llm.config.max_num_requests and llm._batch.num_open == 0


# What is generated


def test_greedy_tokens_are_those_of_the_naive_loop_for_more_requests_than_places(
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


def test_a_seeded_request_gives_the_same_tokens_alone_in_a_batch_and_shuffled(llm):
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


def test_samples_of_a_request_come_in_order_and_differ(llm):
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


def test_requests_without_a_seed_draw_from_the_seed_of_the_llm_and_their_number(
    decoder,
):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = []
    for seed in (3, 3, 4):
        llm = LLM(decoder, seed=seed, **SIZES)
        # Two calls, then one: what counts is the number of the request.
        pair = [llm.generate([9, 8], params)[0], llm.generate([9, 8], params)[0]]
        runs.append(tokens_of(pair))
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]
    together = LLM(decoder, seed=3, **SIZES).generate([[9, 8]] * 2, params)
    assert tokens_of(together) == runs[0]


def test_text_is_the_tokens_text_and_a_prompt_may_be_text_or_ids(llm):
    (by_text, by_ids) = llm.generate(["hello", llm.tokenizer.encode("hello")], GREEDY)
    assert by_text.prompt == "hello"
    assert by_ids.prompt is None
    assert tokens_of([by_text]) == tokens_of([by_ids])
    (sample,) = by_text.outputs
    assert sample.text == llm.tokenizer.decode(sample.token_ids)
    assert len(sample.text) >= 12


def test_a_model_without_a_tokenizer_works_with_ids_and_has_no_text(decoder, naive):
    llm = LLM(decoder, **SIZES)
    assert llm.tokenizer is None
    (output,) = llm.generate([5, 6], GREEDY)
    assert output.outputs[0].token_ids == naive([5, 6], 12)
    assert output.outputs[0].text == ""
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate("hello")
    with pytest.raises(ValueError, match="stop_token_ids"):
        llm.generate([5], SamplingParams(stop="a"))


def test_numpy_arrays_and_tuples_are_prompts_too(llm, naive):
    outputs = llm.generate([np.array([5, 6]), (5, 6)], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)]] * 2


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []
    assert list(llm.stream([])) == []


# How outputs end


def test_a_stop_string_ends_the_output_across_the_borders_of_tokens(llm, naive):
    prompt = llm.tokenizer.encode("abc")
    token_ids = naive(prompt, 24)
    pieces = [llm.tokenizer.decode([token]) for token in token_ids]
    text = "".join(pieces)
    # From the last character of one token to the first of the one after the next.
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


def test_a_stop_token_ends_the_output_and_is_no_text(llm, naive):
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


def test_an_output_ends_at_the_longest_sequence(llm):
    params = dataclasses.replace(GREEDY, max_tokens=1000)
    (sample,) = llm.generate([[5] * 60], params)[0].outputs
    assert len(sample.token_ids) == MAX_LEN - 60
    assert sample.finish_reason == "length"


# Log-probabilities


def test_logprobs_are_those_of_the_plain_forward_in_float64(decoder, folder, naive):
    llm = LLM(folder, **SIZES)
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
                    # float32 logits that were summed in another order.
                    assert math.isclose(entry.logprob, row[other], abs_tol=1e-4)
                    assert entry.rank == 1 + (row > row[other]).sum()
                    assert entry.decoded_token == llm.tokenizer.decoded_token(other)
            assert math.isclose(sample.cumulative_logprob, total, abs_tol=1e-3)


def test_whole_vocabulary_logprobs_need_leave(llm):
    with pytest.raises(ValueError, match=r"at most max_logprobs \(20\), got 300"):
        llm.generate([5], SamplingParams(logprobs=-1))


# Bad input


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (None, "prompts: wanted text"),
        (3, "prompts: wanted text"),
        ([[]], r"prompts\[0\]: prompt: expected at least one token"),
        ([[5], []], r"1 of 2 requests are wrong.*\n  prompts\[1\]"),
        ([[300]], "from 0 to 299 .* got 300"),
        ([[-1]], "from 0 to 299 .* got -1"),
        ([[1.5]], "text or a list of token ids"),
        ([[True]], "text or a list of token ids"),
        ([[5], 7.0], r"prompts\[1\]: prompt: wanted text"),
        ([[5] * 64], r"fewer than max_model_len \(64\)"),
        ("\ud800", "surrogate"),
        ("", "at least one token"),
    ],
)
def test_a_wrong_prompt_is_named_before_anything_runs(llm, prompts, match):
    num_steps = llm.stats()["num_steps"]
    with pytest.raises(ValueError, match=match):
        llm.generate(prompts)
    with pytest.raises(ValueError, match=match):
        llm.stream(prompts)
    assert llm.stats()["num_steps"] == num_steps


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (BeamSearchParams(5, 4), r"beam_width: expected at most max_num_seqs \(4\)"),
        ("greedy", "params: wanted one, or one for each of 2 prompts, got 6"),
        (3, "wanted SamplingParams, BeamSearchParams or AlgorithmParams, got 3"),
        ([SamplingParams()], "one for each of 2 prompts, got 1"),
        (SamplingParams(logit_bias={300: 1.0}), "logit_bias: wanted token ids below"),
        (SamplingParams(logit_bias={3: 1e30}), r"logit_bias\[3\]: wanted -3e\+38 to"),
        (SamplingParams(allowed_token_ids=[300]), "allowed_token_ids: wanted token"),
        (SamplingParams(repetition_penalty=1e30), "repetition_penalty: wanted 1e-09"),
        (
            SamplingParams(allowed_token_ids=[3], bad_words=[[3]]),
            "bad_words: wanted at least one token of allowed_token_ids to be left",
        ),
        (
            SamplingParams(allowed_token_ids=[40], min_tokens=2),
            "min_tokens: wanted 0, got 2: all tokens of allowed_token_ids",
        ),
        (SamplingParams(prompt_logprobs=21), "prompt_logprobs: wanted at most max_"),
        (SamplingParams(prompt_logprobs=-1), r"max_logprobs \(20\), got 300"),
        (
            SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a")),
            "regex: ",
        ),
        (
            SamplingParams(
                max_tokens=3, structured_outputs=StructuredOutputsParams(regex="a{9}")
            ),
            "max_tokens: wanted at least 6, the fewest tokens",
        ),
        (SamplingParams(stop_token_ids=[300]), "stop_token_ids: wanted ids from 0 to"),
        (SamplingParams(stop_token_ids=range(2, 12)), "at most max_num_stop_ids"),
        (SamplingParams(n=99), r"n: expected at most max_num_requests \(48\), got 99"),
    ],
)
def test_wrong_params_are_named_before_anything_runs(llm, params, match):
    with pytest.raises(ValueError, match=match):
        llm.generate([[5], [6]], params)
    assert is_idle(llm)


def test_a_request_that_never_fits_into_the_pool_is_refused(decoder):
    llm = LLM(decoder, **(SIZES | dict(num_blocks=3)))
    with pytest.raises(ValueError, match="need 4 blocks of 4, the pool has 3"):
        llm.generate([5] * 8, SamplingParams(max_tokens=8))


def test_wrong_requests_can_come_back_with_their_error_while_the_others_run(llm, naive):
    seen = {}
    outputs = llm.generate(
        [[5, 6], [], [7]], GREEDY, on_error="return", on_output=seen.__setitem__
    )
    assert [output.error is None for output in outputs] == [True, False, True]
    assert "at least one token" in outputs[1].error
    assert outputs[1].outputs == []
    assert all(output.finished for output in outputs)
    assert outputs[2].outputs[0].token_ids == naive([7], 12)
    assert seen == dict(enumerate(outputs))
    assert [bool(error) for error in llm.check([[5, 6], [], [7]])] == [0, 1, 0]
    with pytest.raises(ValueError, match="on_error"):
        llm.generate([5], on_error="ignore")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            dict(preemption="swap"),
            "num_swap_blocks: wanted an integer of at least 1 with preemption='swap'",
        ),
        (dict(preemption="drop"), "preemption: wanted one of"),
        (
            dict(num_swap_blocks=4),
            "num_swap_blocks: wanted 0 with preemption='recompute', got 4",
        ),
        (dict(mesh=object()), "mesh: wanted one of jpaged.make_mesh"),
        (dict(kv_dtype="int4"), "kv_dtype: wanted one of"),
        (dict(dtype="float8"), "dtype: expected 'auto' or one of"),
        (dict(attention="cuda"), "attention: expected None or one of"),
        (dict(policy="random"), "policy: expected one of"),
        (dict(enable_prefix_caching=1), "enable_prefix_caching: wanted True or False"),
        (dict(memory_fraction=1.5), "memory_fraction: wanted a share"),
        (dict(max_model_len=257), r"max_position_embeddings \(256\), got 257"),
        (dict(block_size=0), "block_size: wanted an integer of at least 1"),
        (dict(num_blocks=2.5), "num_blocks: wanted an integer of at least 1"),
        (dict(seed=-1), "seed: wanted an integer of at least 0"),
        (dict(max_num_batched_tokens=2), "max_num_batched_tokens: expected at least"),
        (dict(max_num_requests=2), "max_num_requests: expected at least"),
    ],
)
def test_what_does_not_exist_is_refused(folder, arguments, match):
    with pytest.raises(ValueError, match=match):
        LLM(folder, **(SIZES | arguments))


def test_an_unknown_model_is_told_where_models_come_from(decoder, tmp_path):
    with pytest.raises(FileNotFoundError, match="hf download"):
        LLM("meta-llama/Llama-3.2-1B")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LLM(tmp_path)
    with pytest.raises(ValueError, match="model: wanted a folder"):
        LLM(3)
    with pytest.raises(ValueError, match=r"the Decoder's own \('float32'\)"):
        LLM(decoder, dtype="bfloat16")
    with pytest.raises(TypeError, match="num_gpus"):
        LLM(decoder, num_gpus=2)


# Streams


@pytest.mark.parametrize("kind", ["ascii", "bytes"])
def test_a_stream_put_together_is_what_generate_gives(decoder, kind, monkeypatch):
    # A slice after almost every step, whatever the machine.
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    backend = {"ascii": ascii_tokenizer, "bytes": byte_tokenizer}[kind]()
    llm = LLM(decoder, tokenizer=Tokenizer(backend), **SIZES)
    prompts = ["hello", [5, 6, 7], "日本"]
    prompts = prompts[: 2 if kind == "ascii" else 3]
    params = [
        SamplingParams(n=3, seed=4, max_tokens=20, stop=["e", "zz", "q?"]),
        SamplingParams(temperature=0, max_tokens=10),
        SamplingParams(seed=2, temperature=0.3, max_tokens=20, ignore_eos=True),
    ][: len(prompts)]
    expected = llm.generate(prompts, params)
    text, token_ids, ends, num_deltas = {}, {}, {}, 0
    for delta in llm.stream(prompts, params):
        key = (delta.request, delta.sample)
        assert key not in ends
        num_deltas += 1
        text[key] = text.get(key, "") + delta.text
        token_ids[key] = token_ids.get(key, []) + delta.token_ids
        if delta.finish_reason is not None:
            ends[key] = (delta.finish_reason, delta.stop_reason)
    assert num_deltas > 15
    for i, output in enumerate(expected):
        for sample in output.outputs:
            key = (i, sample.index)
            assert text[key] == sample.text
            assert token_ids[key] == sample.token_ids
            assert ends[key] == (sample.finish_reason, sample.stop_reason)
    assert is_idle(llm)


def test_a_stream_that_ends_early_leaves_nothing_behind(llm, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([[5, 6]] * 3, dataclasses.replace(GREEDY, max_tokens=50))
    next(stream)
    assert llm._batch.num_open == 3
    stream.close()
    assert is_idle(llm)
    llm.stream([5, 6], GREEDY)  # never iterated
    assert is_idle(llm)


def test_a_call_can_run_while_a_stream_is_open(llm, naive, monkeypatch):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    stream = llm.stream([5, 6], dataclasses.replace(GREEDY, max_tokens=20))
    token_ids = list(next(stream).token_ids)
    assert len(token_ids) < 20
    (output,) = llm.generate([8], GREEDY)
    assert output.outputs[0].token_ids == naive([8], 12)
    for delta in stream:
        token_ids += delta.token_ids
    assert token_ids == naive([5, 6], 20)


def test_streams_that_hold_all_places_and_are_not_read_keep_no_call_from_its_turn(
    llm, naive, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    streams = [
        llm.stream([[5]] * 24, dataclasses.replace(GREEDY, max_tokens=30))
        for _ in range(2)
    ]
    first = [next(stream) for stream in streams]
    assert tokens_of(llm.generate([8], GREEDY)) == [[naive([8], 12)]]
    token_ids = [
        token
        for delta in (first[1], *streams[1])
        if delta.request == 23
        for token in delta.token_ids
    ]
    assert token_ids == naive([5], 30)
    streams[0].close()
    assert is_idle(llm)


# Interrupts and faults


@pytest.mark.parametrize("moment", ["before the call", "after the state was donated"])
def test_an_interrupt_leaves_the_llm_usable(decoder, naive, monkeypatch, moment):
    llm = LLM(decoder, **SIZES)
    run, calls = engine.run, []

    def interrupted(model, state, max_steps, **limits):
        calls.append(max_steps)
        if len(calls) == 3:
            if moment != "before the call":
                run(model, state, max_steps, **limits)
            raise KeyboardInterrupt
        return run(model, state, max_steps, **limits)

    interrupted._cache_size = run._cache_size
    monkeypatch.setattr(engine, "run", interrupted)
    monkeypatch.setattr(batcher, "QUIET_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(random_prompts(9), GREEDY)
    assert len(calls) == 3
    assert is_idle(llm)
    steps = llm.stats()["num_steps"]
    outputs = llm.generate([[5, 6], [9]], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)], [naive([9], 12)]]
    assert llm.stats()["num_steps"] > steps > 0


def test_an_interrupt_while_requests_are_submitted_leaves_the_llm_usable(
    decoder, naive, monkeypatch
):
    llm = LLM(decoder, **SIZES)
    submit = engine_host.EngineHost.submit

    def interrupted(self, requests):
        submit(self, requests)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine_host.EngineHost, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([[5]] * 3, GREEDY)
    # The table is also clean where the next call wants another one.
    params = dataclasses.replace(GREEDY, logprobs=3)
    assert tokens_of(llm.generate([9], params)) == [[naive([9], 12)]]
    assert is_idle(llm)


def lose_state(llm, monkeypatch):
    """A call that is interrupted when the old state is gone and the new not there."""
    run = engine.run

    def lost(model, state, max_steps, **limits):
        run(model, state, max_steps, **limits)
        raise KeyboardInterrupt

    lost._cache_size = run._cache_size
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", lost)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([9], GREEDY)


def test_a_stream_is_told_when_another_call_lost_the_engines_state(
    decoder, naive, monkeypatch
):
    monkeypatch.setattr(batcher, "STREAM_S", 0.0)
    llm = LLM(decoder, **SIZES)
    stream = llm.stream([5, 6], dataclasses.replace(GREEDY, max_tokens=20))
    next(stream)
    lose_state(llm, monkeypatch)
    with pytest.raises(RuntimeError, match="state was lost"):
        list(stream)
    assert is_idle(llm)
    assert tokens_of(llm.generate([9], GREEDY)) == [[naive([9], 12)]]


def test_an_engine_that_stalls_raises_and_can_be_used_again(
    decoder, naive, monkeypatch
):
    llm = LLM(decoder, **SIZES)
    llm.generate([9], GREEDY)
    run = engine.run

    def stalled(model, state, max_steps, **limits):
        state = run(model, state, max_steps, **limits)
        counters = dataclasses.replace(state.counters, is_stalled=jnp.array(True))
        return dataclasses.replace(state, counters=counters)

    stalled._cache_size = run._cache_size
    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", stalled)
        with pytest.raises(RuntimeError, match="report it with the prompts' lengths"):
            llm.generate([9], GREEDY)
    assert is_idle(llm)
    assert tokens_of(llm.generate([9], GREEDY)) == [[naive([9], 12)]]


# Around it


def test_statistics_and_metrics(decoder):
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
    # Keys and values, 2 layers, 2 heads of 16 float32 numbers, 4 tokens a block.
    assert stats["kv_bytes"] == 32 * 2 * 2 * 2 * 16 * 4 * 4
    assert 0 < stats["kv_token_share"] <= 1
    assert stats["tokens_per_s"] > 0
    assert stats["num_preemptions"] == stats["num_swapped_blocks"] == 0
    assert stats["prefix_hit_ratio"] == 0
    assert stats["num_compilations"] <= 1
    assert all(isinstance(value, int | float) for value in stats.values())
    metrics = output.metrics
    assert metrics["num_prompt_tokens"] == 3
    assert metrics["num_generated_tokens"] == 10
    assert 0 <= metrics["first_step"] < metrics["last_step"]
    assert 0 < metrics["first_token_s"] <= metrics["total_s"]


def test_a_pool_that_is_too_small_for_all_preempts_and_counts_it(decoder, naive):
    llm = LLM(decoder, **SIZES)
    prompts = random_prompts(4, seed=5, longest=12)
    params = dataclasses.replace(GREEDY, max_tokens=40)
    outputs = llm.generate(prompts, params)
    assert tokens_of(outputs) == [[naive(prompt, 40)] for prompt in prompts]
    assert llm.stats()["num_preemptions"] > 0
    num_preemptions = [output.metrics["num_preemptions"] for output in outputs]
    assert sum(num_preemptions) == llm.stats()["num_preemptions"]


@pytest.mark.parametrize(
    ("policy", "order"), [("fcfs", [5, 6, 7, 8]), ("priority", [8, 6, 7, 5])]
)
def test_requests_wait_for_places_in_the_order_of_the_policy(
    decoder, monkeypatch, policy, order
):
    llm = LLM(decoder, policy=policy, **SIZES)
    params = [dataclasses.replace(GREEDY, priority=p) for p in (3, 1, 2, 0)]
    submitted = []

    def submit(self, requests):
        (own,) = requests  # of the one replica
        submitted.extend(request.prompt_token_ids[0] for request in own)
        raise KeyboardInterrupt

    # Nothing is compiled and nothing runs; the order within the engine is its own test.
    monkeypatch.setattr(engine_host.EngineHost, "submit", submit)
    monkeypatch.setattr(engine_host.EngineHost, "_choose_program", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5], [6], [7], [8]], params)
    assert submitted == order


def test_a_mixed_run_compiles_the_engine_once(decoder):
    llm = LLM(decoder, **SIZES)
    llm.generate(random_prompts(20, seed=7), GREEDY)
    known = engine.run._cache_size()
    llm.generate(random_prompts(3, seed=8), SamplingParams(seed=1, top_k=5))
    list(llm.stream([[4, 5]] * 5, SamplingParams(n=2)))
    assert engine.run._cache_size() == known
    assert llm.stats()["num_compilations"] <= 1


def test_it_shows_what_it_is_and_closes(folder):
    with LLM(folder, **SIZES) as llm:
        assert repr(llm).startswith(f"LLM({str(folder)!r}, dtype='float32', ")
        assert "num_blocks=32" in repr(llm)
    assert "closed" in repr(llm)
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([5])
    with pytest.raises(RuntimeError, match="closed"):
        llm.stats()
    llm.close()


def test_nothing_is_written_where_stderr_is_no_terminal(llm, capsys):
    llm.generate([5, 6], GREEDY, progress=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [dict(attention="reference"), dict(attention="xla")]
)
def test_a_forced_attention_gives_the_same_tokens(decoder, naive, arguments):
    llm = LLM(decoder, **SIZES, **arguments)
    outputs = llm.generate([[5, 6], [9]], GREEDY)
    assert tokens_of(outputs) == [[naive([5, 6], 12)], [naive([9], 12)]]


@pytest.mark.slow
def test_keys_and_values_can_be_stored_in_another_dtype(decoder):
    llm = LLM(decoder, kv_dtype="bfloat16", **SIZES)
    assert llm.stats()["kv_bytes"] == 32 * 2 * 2 * 2 * 16 * 4 * 2
    (output,) = llm.generate([[5, 6]], GREEDY)
    assert len(output.outputs[0].token_ids) == 12
