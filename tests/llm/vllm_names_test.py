"""LLM: what scripts for vLLM call, by vLLM's names, and what they read of outputs."""

import dataclasses
import logging
import os
import signal
import threading

import jax
import pytest

from jpaged import LLM, BeamSearchParams, SamplingParams, TextPrompt, TokensPrompt
from jpaged.outputs import Logprob
from jpaged.serving import batcher
from tests.support.signals import ctrl_c as ctrl_c
from tests.support.tiny_llm import GREEDY, SIZES, is_idle, random_prompts, tokens_of

pytestmark = pytest.mark.long

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}{{ extra or '' }}"
)
TALK = [{"role": "user", "content": "hey"}]


@pytest.fixture
def llm(plain_llm):
    return plain_llm


def test_prompts_and_parameters_by_vllm_s_names_give_the_same_tokens(llm, naive):
    expected = [[naive([5, 6], 12)]]
    for prompt in (
        {"prompt_token_ids": [5, 6]},
        TokensPrompt(prompt_token_ids=[5, 6]),
        [TokensPrompt(prompt_token_ids=[5, 6], prompt="any")],
    ):
        outputs = llm.generate(prompt, sampling_params=GREEDY, use_tqdm=False)
        assert tokens_of(outputs) == expected
    assert tokens_of(llm.generate(prompt_token_ids=[[5, 6]], sampling_params=GREEDY))
    text = [TextPrompt(prompt="ab"), {"prompt": "ab"}, "ab"]
    outputs = llm.generate(text, [GREEDY] * 3)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert [output.prompt for output in outputs] == ["ab"] * 3
    assert "".join(delta.text for delta in llm.stream("ab", sampling_params=GREEDY))
    assert llm.submit("ab", sampling_params=GREEDY).output().finished
    assert llm.check("ab", sampling_params=GREEDY) == [None]


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("generate", dict(sampling_param=GREEDY), "generate: .*'sampling_params'"),
        ("generate", dict(use_tdqm=False), "generate: .*did you mean 'use_tqdm'"),
        ("generate", dict(lora_request="x"), "lora_request: expected None.*LoRA"),
        ("generate", dict(params=GREEDY, sampling_params=GREEDY), "got both"),
        ("generate", dict(priority=[1]), r"SamplingParams\(priority"),
        ("chat", dict(use_tdqm=False), "chat: .*did you mean 'use_tqdm'"),
        ("chat", dict(continue_final=True), "chat: .*'continue_final_message'"),
        ("chat", dict(on_error="ignore"), "chat: on_error"),
        ("chat", dict(params=3, chat_template="x"), "chat: messages.*params: expected"),
        ("chat", {}, "chat: chat_template: expected one in the model's folder"),
        ("beam_search", dict(params=GREEDY), "beam_search expects BeamSearchParams"),
        ("stream", dict(temperature=0), "stream: unknown argument 'temperature'"),
    ],
)
def test_errors_name_the_call_and_the_nearest_name(llm, call, arguments, message):
    prompts = TALK if call == "chat" else "ab"
    with pytest.raises(ValueError, match=f"(?s){message}"):
        getattr(llm, call)(prompts, **arguments)
    assert is_idle(llm)


def test_chat_continues_messages_and_passes_variables_to_the_template(llm):
    tokenizer = llm.get_tokenizer()
    options = dict(chat_template=TEMPLATE, use_tqdm=False)
    outputs = llm.chat([TALK, TALK * 2], sampling_params=GREEDY, **options)
    texts = [tokenizer.decode(output.prompt_token_ids) for output in outputs]
    assert texts == ["uhey</s>a", "uhey</s>uhey</s>a"]
    assert [output.prompt for output in outputs] == texts
    answered = [*TALK, {"role": "assistant", "content": "so far "}]
    (output,) = llm.chat(
        answered,
        GREEDY,
        add_generation_prompt=False,
        continue_final_message=True,
        **options,
    )
    assert tokenizer.decode(output.prompt_token_ids) == "uhey</s>aso far"
    (output,) = llm.chat(TALK, GREEDY, chat_template_kwargs={"extra": "xy"}, **options)
    assert tokenizer.decode(output.prompt_token_ids) == "uhey</s>axy"
    with pytest.raises(ValueError, match="chat: continue_final_message: expected"):
        llm.chat(answered, GREEDY, continue_final_message=True, **options)
    bad = [TALK, [{"role": "user", "content": "x" * 80}]]
    with pytest.raises(ValueError, match=r"messages\[1\]: prompt: expected fewer"):
        llm.chat(bad, GREEDY, **options)
    assert tokenizer.apply_chat_template(
        TALK, chat_template=TEMPLATE, add_generation_prompt=True, tokenize=False
    ) == tokenizer.decode(
        tokenizer.apply_chat_template(
            TALK, chat_template=TEMPLATE, add_generation_prompt=True
        )
    )


def test_the_tokenizer_has_the_usual_methods(llm):
    tokenizer = llm.get_tokenizer()
    assert tokenizer is llm.get_tokenizer()
    ids = tokenizer.encode("hello")
    assert ids == tokenizer("hello").input_ids == tokenizer("hello")["input_ids"]
    assert tokenizer(["a", "bc"]).attention_mask == [[1], [1, 1]]
    assert tokenizer.decode([*ids, 1]) == "hello</s>"
    assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == "hello"
    assert tokenizer.batch_decode([ids, [1]]) == ["hello", "</s>"]
    assert tokenizer.decode(ids[0]) == "h"
    assert tokenizer.convert_ids_to_tokens(1) == "</s>"
    assert tokenizer.convert_tokens_to_ids(["</s>", "h"]) == [1, ids[0]]
    assert tokenizer.tokenize("ab") == ["a", "b"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", 1)
    assert (tokenizer.bos_token_id, tokenizer.pad_token) == (None, None)
    assert tokenizer.all_special_tokens == ["<s>", "</s>"]
    assert len(tokenizer) == len(tokenizer.get_vocab()) == tokenizer.vocab_size
    with pytest.raises(AttributeError, match="AutoTokenizer"):
        tokenizer.save_pretrained("x")


def test_outputs_have_the_fields_that_vllm_s_have(llm):
    params = dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1)
    (output,) = llm.generate(["hello"], params)
    sample = output.outputs[0]
    assert (output.prompt, output.finished, sample.index) == ("hello", True, 0)
    assert (sample.finish_reason, sample.stop_reason) == ("length", None)
    assert sample.finished()
    assert len(sample.logprobs) == len(sample.token_ids) == 12
    for token, likely in zip(sample.token_ids, sample.logprobs, strict=True):
        assert isinstance(likely[token], Logprob)
        assert likely[token].rank == 1
        assert isinstance(likely[token].decoded_token, str)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    total = sum(
        d[t].logprob for d, t in zip(sample.logprobs, sample.token_ids, strict=True)
    )
    assert total == pytest.approx(sample.cumulative_logprob)
    assert output.num_cached_tokens == output.metrics.num_cached_tokens
    assert output.metrics.first_token_latency > 0
    text = repr(output)
    assert "CompletionOutput(index=0" in text
    assert len(text.splitlines()) == 1


def test_prompts_are_truncated_and_texts_left_out_where_it_is_asked(llm, naive):
    params = dataclasses.replace(GREEDY, truncate_prompt_tokens=2)
    (output,) = llm.generate([[9, 9, 5, 6]], params)
    assert output.prompt_token_ids == [5, 6]
    assert output.outputs[0].token_ids == naive([5, 6], 12)
    params.truncate_prompt_tokens, params.max_tokens = -1, 1
    (output,) = llm.generate([[7] * 100], params)
    assert len(output.prompt_token_ids) == SIZES["max_model_len"] - 1
    (output,) = llm.generate(["ab"], dataclasses.replace(GREEDY, detokenize=False))
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 12)
    params.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens: expected an integer"):
        llm.generate(["ab"], params)


def test_beam_search_returns_sequences_that_agree_with_generate(decoder, folder):
    llm = LLM(folder, **SIZES)
    params = BeamSearchParams(beam_width=3, max_tokens=8)
    (found,) = llm.beam_search([{"prompt": "hello"}], params)
    (output,) = llm.generate(["hello"], params)
    assert len(found.sequences) == 3
    for beam, sequence in zip(output.outputs, found.sequences, strict=True):
        ended = beam.finish_reason == "stop"
        own = list(beam.token_ids)[: -1 if ended else None]
        assert sequence.tokens == [*output.prompt_token_ids, *own]
        assert sequence.text == llm.get_tokenizer().decode(sequence.tokens)
        assert sequence.cum_logprob == beam.cumulative_logprob
        assert [*sequence.logprobs] == beam.logprobs
        each = [
            likely[t].logprob
            for likely, t in zip(beam.logprobs, beam.token_ids, strict=True)
        ]
        (score,) = llm.score(["hello"], [list(beam.token_ids)])
        assert each == pytest.approx(score.token_logprobs, abs=1e-4)
        assert sum(each) == pytest.approx(sequence.cum_logprob, abs=1e-5)


def test_the_defaults_of_sampling_are_those_of_the_checkpoint(folder, naive, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    text = '{"temperature": 0.0, "max_new_tokens": 5, "top_k": null, "eos_token_id": 1}'
    (tmp_path / "generation_config.json").write_text(text)
    llm = LLM(tmp_path, **SIZES)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams(temperature=0.0, max_tokens=5)
    assert tokens_of(llm.generate([[5, 6]])) == [[naive([5, 6], 5)]]
    assert llm.submit([5, 6]).output().outputs[0].token_ids == naive([5, 6], 5)
    params.max_tokens = 3
    assert tokens_of(llm.generate([[5, 6]], params)) == [[naive([5, 6], 3)]]


def test_arguments_of_vllm_with_an_equal_choose_the_same_engine(folder, caplog):
    same = dict(
        gpu_memory_utilization=0.5,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        trust_remote_code=True,
        enforce_eager=False,
        swap_space=0,
        num_gpu_blocks_override=32,
        kv_cache_dtype="auto",
        scheduling_policy="priority",
        enable_chunked_prefill=True,
        disable_log_stats=True,
        load_format="auto",
        compilation_config=None,
        hf_overrides={},
        revision=None,
        max_num_seqs=4,
        enable_prefix_caching=None,
        max_num_batched_tokens=16,
        block_size=4,
        max_model_len=64,
    )
    with caplog.at_level(logging.INFO, "jpaged"):
        llm = LLM(model=folder, **same)
    assert (llm.config.num_blocks, llm.config.policy) == (32, "priority")
    (message,) = (text for text in caplog.messages if text.startswith("LLM("))
    for part in ("dtype='float32'", "num_blocks=32", "attention="):
        assert part in message
    for name, value, message in (
        ("gpu_memory_utilization", 1.5, "memory_fraction: expected"),
        ("pipeline_parallel_size", 2, r"make_mesh\(tensor="),
        ("enforce_eager", True, "always|all steps are compiled"),
        ("swap_space", 4, "num_swap_blocks"),
        ("quantization", "awq", "quantization: expected"),
        ("load_format", "dummy", "random:NAME"),
        ("speculative_model", "x", "speculative_config="),
    ):
        with pytest.raises(ValueError, match=message):
            LLM(folder, **{name: value})
    with pytest.raises(ValueError, match="which are the same, got both"):
        LLM(folder, num_blocks=4, num_gpu_blocks_override=5)
    size = 1 + len(jax.devices())
    with pytest.raises(ValueError, match=rf"use mesh=jpaged\.make_mesh\(tensor={size}"):
        LLM(folder, tensor_parallel_size=size)


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_a_usable_engine(llm, naive, monkeypatch, call):
    long = dataclasses.replace(GREEDY, max_tokens=40)
    seen = threading.Event()
    run = batcher.Batcher.run_slice

    def slice_and_signal(self):
        if not seen.is_set():
            seen.set()
            os.kill(os.getpid(), signal.SIGINT)  # as a terminal does
        return run(self)

    monkeypatch.setattr(batcher.Batcher, "run_slice", slice_and_signal)
    if call == "chat":
        prompts, options = [TALK] * 9, dict(chat_template=TEMPLATE)
    else:
        prompts, options = random_prompts(9), {}
    with pytest.raises(KeyboardInterrupt):
        list(getattr(llm, call)(prompts, long, **options))
    assert seen.is_set()
    assert tokens_of(llm.generate([[5, 6]], GREEDY)) == [[naive([5, 6], 12)]]
    assert is_idle(llm)
