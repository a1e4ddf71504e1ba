"""`evaluate` on a local task, with several ways to decode."""

import functools
import json

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `lm_eval`")

from experiments.evaluate import params_maker
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from tests.support.runners import call_experiment, last_json

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]

run = functools.partial(call_experiment, "evaluate")
TASK = """
task: jpaged_lines
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{rest}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
STARTS = ["import ", "def __init__(", "    return ", "for i in "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"start": start, "rest": "x"}) for start in STARTS]
    (path / "data.jsonl").write_text("\n".join(lines))
    (path / "task.yaml").write_text(TASK.replace("DATA", str(path / "data.jsonl")))
    return path


DECODINGS = [
    ("greedy", {}),
    ("sampling", {"temperature": 0.7, "top_p": 0.9}),
    ("beam", {"beam_width": 3}),
    ("stochastic_beam_search", {"num_rows": 2}),
]


@pytest.mark.parametrize(("name", "options"), DECODINGS)
def test_a_task_runs_with_each_way_to_decode(folder, tmp_path, name, options):
    out = tmp_path / "samples.json"
    status, stdout, err = run(
        "--tasks=jpaged_lines",
        f"--include_path={folder}",
        f"--decoding={name}",
        f"--decoding_options={json.dumps(options)}",
        "--max_num_seqs=4",
        f"--out={out}",
    )
    assert status == 0, err
    assert "exact_match,none" in last_json(stdout)["results"]["jpaged_lines"]
    samples = json.loads(out.read_text())["jpaged_lines"]
    answers = [sample["filtered_resps"][0] for sample in samples]
    assert len(answers) == len(STARTS)
    assert any(answers)
    assert not any("\n" in answer for answer in answers)


def test_parameters_are_those_of_the_method():
    task = SamplingParams(temperature=0, max_tokens=7, stop=["x"])
    greedy = params_maker("greedy", {"min_tokens": 2}, (1,))(task)
    assert (greedy.min_tokens, greedy.stop, greedy.max_tokens) == (2, ("x",), 7)
    sampled = params_maker("sampling", {"top_k": 5}, (1,))(task)
    assert (sampled.temperature, sampled.top_k) == (1.0, 5)
    beams = params_maker("beam", {"beam_width": 4}, (1,))(task)
    assert beams == BeamSearchParams(4, 7)
    make = params_maker("diverse_beam_search",
                        {"num_rows": 4, "num_groups": 2, "diversity_penalty": 0.5},
                        (1,))  # fmt: skip
    first, second = make(task), make(task)
    assert isinstance(first, AlgorithmParams)
    assert first.algorithm is second.algorithm
    assert (first.num_rows, first.max_tokens) == (4, 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--tasks: expected"),
        (["--tasks=a", "--decoding=what"], "--decoding: expected greedy"),
        (["--tasks=a", "--decoding=nothing:f"], "--decoding: No module"),
        (["--tasks=a", "--decoding_options=x"], "--decoding_options: expected JSON"),
        (["--tasks=a", "--decoding_options=[]"], "expected a JSON object"),
        (["--tasks=a", '--decoding_options={"x": 1}'], "unknown argument 'x'"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message):
    status, _, err = run(*arguments)
    assert status == 1
    assert message in err
