"""`JPagedLM` and the server against the `hf` model of lm-evaluation-harness."""

import json
import pathlib
import warnings

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra `lm_eval`")
pytest.importorskip("torch", reason="the hf model needs torch")
pytest.importorskip("transformers", reason="the hf model needs transformers")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from jpaged.evals.lm_eval import JPagedLM  # noqa: E402
from jpaged.llm import LLM  # noqa: E402
from jpaged.params import BeamSearchParams  # noqa: E402
from tests.support.models.checkpoints import write_tiny_llama  # noqa: E402
from tests.support.tiny_llm import VOCAB_SIZE, byte_tokenizer  # noqa: E402

pytestmark = [
    pytest.mark.long,
    # Of torch, transformers, datasets and the harness.
    pytest.mark.filterwarnings("ignore"),
]

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHOICES = """
task: jpaged_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
GENERATE = """
task: jpaged_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["q", "ab"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match}
"""
ROLLING = """
task: jpaged_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""
TASKS = ["jpaged_choices", "jpaged_generate", "jpaged_rolling"]
WORDS = ["naïve", "café", "日本", "語", "text", "the", "😀", "abc", "q", "文章"]


def write_tasks(folder: pathlib.Path) -> TaskManager:
    """Tasks of all three kinds, with 12 documents."""
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(12):
        words = rng.choice(WORDS, size=40).tolist()
        record = {
            "question": " ".join(words[: rng.integers(1, 12)]),
            "choices": words[20:23],
            "answer": int(rng.integers(3)),
            "text": " ".join(words),
        }
        lines.append(json.dumps(record))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines))
    for text in (CHOICES, GENERATE, ROLLING):
        name = text.split()[1]
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that both implementations load."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_llama(path, vocab_size=VOCAB_SIZE, eos_token_id=1)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(
        folder,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        block_size=4,
        num_blocks=256,
        max_model_len=120,
    )


@pytest.fixture(scope="module")
def models(folder, llm):
    """The same model as ours and as that of Hugging Face; windows of 100 tokens."""
    ours = JPagedLM(llm, max_length=100, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = HFLM(str(folder), max_length=100, device="cpu", dtype="float32")
    return ours, theirs


def results(model, tasks, **options):
    found = lm_eval.simple_evaluate(
        model,
        tasks=TASKS,
        task_manager=tasks,
        log_samples=True,
        bootstrap_iters=0,
        **options,
    )
    return found["results"], found["samples"]


def close(ours, theirs):
    """Equal apart from rounding in float32."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            close(ours[name], theirs[name])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            close(one, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
    else:
        assert ours == theirs


@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True}])
def test_tasks_have_the_results_of_the_hf_model(models, tasks, options):
    ours, theirs = (results(model, tasks, **options) for model in models)
    assert any(sample["filtered_resps"][0] for sample in ours[1]["jpaged_generate"]), (
        "nothing was generated"
    )
    close(ours[0], theirs[0])
    for task in TASKS:
        for one, other in zip(ours[1][task], theirs[1][task], strict=True):
            close(one["filtered_resps"], other["filtered_resps"])


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_edges_have_the_results_of_the_hf_model(models):
    pairs = [
        ("", "naïve"),
        ("abc ", "café"),
        ("<s>the", " text"),
        ("text " * 60, " abc " * 5),  # longer than the window
        ("the", "a" * 90),
        ("the", "a" * 90),
    ]
    requests = [instance("loglikelihood", *pair) for pair in pairs]
    close(*(model.loglikelihood(requests, disable_tqdm=True) for model in models))
    texts = ["abc", "text " * 70, "日本 " * 150]
    requests = [instance("loglikelihood_rolling", text) for text in texts]
    close(
        *(model.loglikelihood_rolling(requests, disable_tqdm=True) for model in models)
    )
    options = {"until": ["a"], "max_gen_toks": 30, "do_sample": False}
    requests = [instance("generate_until", text, options) for text in texts]
    close(*(model.generate_until(requests, disable_tqdm=True) for model in models))
    ours, theirs = models
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    for adds in (True, False):
        assert ours.apply_chat_template(chat, adds) == theirs.apply_chat_template(
            chat, adds
        )
    for text in ("naïve", "<s>naïve", ""):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
    assert ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id


def test_any_decoding_method_runs_tasks(llm, models):
    def beams(params):
        return BeamSearchParams(beam_width=3, max_tokens=params.max_tokens)

    model = JPagedLM(llm, max_length=100, make_params=beams, progress=False)
    options = {"until": ["a"], "max_gen_toks": 8}
    requests = [instance("generate_until", text, options) for text in WORDS[:3]]
    found = model.generate_until(requests, disable_tqdm=True)
    ids = [model.tok_encode(text) for text in WORDS[:3]]
    right = llm.generate(ids, BeamSearchParams(beam_width=3, max_tokens=8))
    for text, output in zip(found, right, strict=True):
        until = output.outputs[0].text.split("</s>")[0].split("a")[0]
        assert text == until


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length: expected"),
        ({"max_gen_toks": 0}, "max_gen_toks: expected"),
        ({"max_num_seqs": 4}, "options: expected none"),
    ],
)
def test_wrong_arguments_are_named(llm, options, message):
    with pytest.raises(ValueError, match=message):
        JPagedLM(llm, **options)


def test_unknown_generation_arguments_are_named(models):
    ours, _ = models
    request = instance("generate_until", "a", {"num_beams": 3})
    with pytest.raises(ValueError, match=r"generation_kwargs: .*'num_beams'"):
        ours.generate_until([request], disable_tqdm=True)


def test_the_server_gives_the_clients_of_the_harness_the_same_results(
    folder, llm, models, tasks
):
    pytest.importorskip("starlette", reason="needs the extra `server`")
    pytest.importorskip("tenacity", reason="the harness's API models need lm_eval[api]")
    from lm_eval.models.openai_completions import (
        LocalChatCompletion,
        LocalCompletionsAPI,
    )

    from jpaged.server.settings import ServerSettings
    from tests.server.conftest import running

    ours, _ = models
    settings = ServerSettings(model_names=("tiny",), allow_admin=True, drain_s=1)
    pairs = [("abc the", " café"), ("日本", "語 text"), ("naïve", " the the")]
    scored = [instance("loglikelihood", *pair) for pair in pairs]
    until = {"until": ["q"], "max_gen_toks": 10}
    texts = [instance("generate_until", text, until) for text, _ in pairs]
    chats = [[{"role": "user", "content": text, "type": "text"}] for text, _ in pairs]
    right = [
        ours.loglikelihood(scored, disable_tqdm=True),
        ours.generate_until(texts, disable_tqdm=True),
        ours.generate_until(
            [
                instance("generate_until", ours.apply_chat_template(chat), until)
                for chat in chats
            ],
            disable_tqdm=True,
        ),
    ]
    with running(llm, settings) as served:
        url = f"{served.url}/v1/completions"
        client = LocalCompletionsAPI(base_url=url, model="tiny", batch_size=2)
        assert client.tokenizer_backend == "remote"
        assert client.eot_token_id == ours.eot_token_id
        assert client.tok_encode("naïve") == ours.tok_encode("naïve")
        close(client.loglikelihood(scored, disable_tqdm=True), right[0])
        close(client.generate_until(texts, disable_tqdm=True), right[1])
        url = f"{served.url}/v1/chat/completions"
        client = LocalChatCompletion(base_url=url, model="tiny", max_length=100)
        from lm_eval.models.api_models import JsonChatStr

        chats = [
            instance("generate_until", JsonChatStr(json.dumps(chat)), until)
            for chat in chats
        ]
        close(client.generate_until(chats, disable_tqdm=True), right[2])
        served.wait_until_idle()
