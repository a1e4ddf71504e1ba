"""Tests and benchmarks a GPU with one command, in less than nine minutes.

    python -m experiments.gpu_suite --out results
    python -m experiments.gpu_suite --out results --stages decode,cascade
    python -m experiments.gpu_suite --tiny

Correctness comes first: the tests marked `gpu`. The other stages measure attention by
all implementations and peers, and page updates, beside the measured bandwidths; decode
steps of Llama-3-8B's shape beside the memory's limit and transformers; blocks of 16 to
128 tokens; cascade attention beside its model; and 8-bit pages. The stages run in order
of importance. Each is a separate command with a time limit. If a stage fails or reaches
its limit, the suite keeps what it printed and continues with the next one.

With `--out`, the runner writes `gpu_suite.json` and `results.md`, a section for
docs/results.md, after each stage. At the end a table compares the figures with the
aims. Sizes are tiny with `--tiny`, and on machines without an accelerator. The last
line on stdout is one JSON object.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
from absl import flags

from experiments.lib import gpu_aims, processes, runner

FLAGS = flags.FLAGS
ROOT = pathlib.Path(__file__).resolve().parent.parent
_PACKAGES = "jax-triton triton torch transformers flashinfer-python ejkernel".split()


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command with its arguments for accelerators and for tiny sizes."""

    name: str
    module: str
    arguments: str
    tiny: str
    limit_s: float


_TINY = "--rows=2 --contexts=40 --updates=4 --repeats=1 --round_s=0.01 --read_gb=0.01"
_FIRST = "mosaic_gpu,triton,write_kv/triton,copy_blocks/triton,flashinfer,torch_sdpa"
_OTHERS = "jax_contiguous,ejkernel,jax_deprecated,torch_flex,transformers_paged"
STAGES = (
    Stage(
        "tests",
        "pytest",
        "-m gpu tests/gpu_test.py -v --tb=short -W default",
        "-m gpu tests/gpu_test.py -q -W default -k own_memory",
        limit_s=150,
    ),
    Stage(
        "attention",
        "experiments.bench_attention",
        f"--contenders={_FIRST},xla,write_kv/xla,copy_blocks/xla,{_OTHERS} "
        "--rows=1,16,32 --contexts=8192 --updates=256,8192 --round_s=0.03",
        f"--contenders=xla,write_kv/xla,copy_blocks/xla {_TINY}",
        limit_s=180,
    ),
    Stage(
        "decode",
        "experiments.bench_decode",
        "--contenders=triton,transformers,xla,mosaic_gpu",
        "--contenders=xla --model=tiny-python --batches=2 --context=40 --steps=2 "
        "--repeats=1 --read_gb=0.01 --max_num_batched_tokens=64",
        limit_s=170,
    ),
    Stage(
        "block sizes",
        "experiments.bench_attention",
        "--contenders=mosaic_gpu,triton --rows=16 --contexts=8192 "
        "--block_sizes=16,32,64,128 --round_s=0.03",
        f"--contenders=xla --block_sizes=16,32 {_TINY}",
        limit_s=60,
    ),
    Stage(
        "cascade",
        "experiments.bench_cascade",
        "--implementations=triton,mosaic_gpu --num_rows=4,16,64 "
        "--prefix_tokens=4096,16384 --own_tokens=256 --num_heads=32 --num_kv_heads=8 "
        "--head_dim=128 --dtype=bfloat16 --gemm_size=8192 --num_layers=32 --repeats=7",
        "--num_rows=2 --prefix_tokens=32 --own_tokens=16 --head_dim=16 --num_layers=1 "
        "--read_gb=0.01 --gemm_size=64 --repeats=1",
        limit_s=60,
    ),
    Stage(
        "pages of 8 bits",
        "experiments.bench_attention",
        "--contenders=triton,xla --kv_dtypes=auto,int8,fp8 --rows=16 --contexts=8192",
        f"--contenders=xla --kv_dtypes=int8,fp8 {_TINY}",
        limit_s=40,
    ),
)


def define_flags() -> None:
    """Defines the runner's flags."""
    names = ",".join(stage.name for stage in STAGES)
    flags.DEFINE_list("stages", None, f"Stages to run, of {names}; default: all.")
    flags.DEFINE_string("out", None, "Folder for gpu_suite.json and results.md.")
    flags.DEFINE_bool("tiny", None, "Tiny sizes; default: only without an accelerator.")
    flags.DEFINE_float(
        "limit_s", 530, "Time limit of all stages together, in seconds.", lower_bound=1
    )


def run_stage(stage: Stage, is_tiny: bool, limit_s: float) -> dict[str, Any]:
    """Runs a stage.

    Args:
      stage: The stage.
      is_tiny: Whether it runs at tiny sizes.
      limit_s: Time limit in seconds.

    Returns:
      The stage's record: its command, how it ended, what it printed, and its JSON.
    """
    arguments = shlex.split(stage.tiny if is_tiny else stage.arguments)
    if stage.module in ("experiments.bench_attention", "experiments.bench_decode"):
        # These end by themselves shortly before the limit, with complete results.
        arguments.append(f"--limit_s={max(limit_s - 10, limit_s / 2):.0f}")
    backend = jax.default_backend()
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {
        "JAX_PLATFORMS": {"gpu": "cuda"}.get(backend, backend),  # tests default to cpu
        "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep),
    }
    words = [stage.module, *arguments]
    print(f"\n== {stage.name}: python -m {shlex.join(words)}", flush=True)
    ended = processes.run_limited(
        [sys.executable, "-m", *words],
        limit_s,
        show=lambda line: None if line.startswith("{") else print(line, flush=True),
        environment=variables,
        folder=str(ROOT),
    )
    lines = ended.stdout.splitlines()
    result = None
    if lines and lines[-1].startswith("{"):
        result = json.loads(lines.pop())
    record = {
        "name": stage.name,
        "command": f"python -m {shlex.join(words)}",
        "seconds": round(ended.seconds, 1),
        "ended": {0: "whole", None: "cut"}.get(ended.status, f"status {ended.status}"),
        "printed": lines,
        "result": result,
    }
    if ended.status != 0:
        record["errors"] = ended.stderr[-2000:]
        print(record["errors"], file=sys.stderr, flush=True)
    print(f"== {stage.name}: {record['ended']} after {record['seconds']} s", flush=True)
    return record


def suite_environment() -> dict[str, Any]:
    """Date, device, versions of all packages that matter, and the command."""
    found: dict[str, Any] = runner.environment() | {"date": time.strftime("%Y-%m-%d")}
    for name in _PACKAGES:
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    words = ["python", "-m", "experiments.gpu_suite", *sys.argv[1:]]
    return found | {"command": shlex.join(words)}


def results_section(found: dict[str, Any]) -> str:
    """The section for docs/results.md."""
    versions = ", ".join(f"{name} {what}" for name, what in found["versions"].items())
    parts = [
        f"## {found['device']}, {found['date']}\n",
        f"`{found['command']}`; {versions}.\n",
        "| aim | wanted | here | |\n| --- | ---: | ---: | --- |",
    ]
    for aim in found["aims"]:
        parts[-1] += (
            f"\n| {aim['aim']} | {aim['wanted']} | {aim['here']} | {aim['of']} |"
        )
    for stage in found["stages"]:
        ended = f"{stage['ended']}, {stage['seconds']} s"
        body = "\n".join([f"$ {stage['command']}", *stage["printed"]])
        parts.append(f"\n### {stage['name']} ({ended})\n\n```text\n{body}\n```")
    return "\n".join(parts) + "\n"


def write_results(found: dict[str, Any], out: str | None) -> None:
    """Writes the results so far into the folder `out`, unless it is None."""
    if out is not None:
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found, indent=1)
        (folder / "gpu_suite.json").write_text(text, "utf-8")
        (folder / "results.md").write_text(results_section(found), "utf-8")


def main(argv: list[str]) -> int:
    """Runs the stages and prints the aims."""
    del argv
    begin = time.monotonic()
    processes.share_accelerator()
    with runner.user_errors("gpu_suite"):
        names = [stage.name for stage in STAGES]
        chosen = runner.some_of("stages", FLAGS.stages, names)
    is_tiny = jax.default_backend() == "cpu" if FLAGS.tiny is None else FLAGS.tiny
    found = suite_environment() | {"aims": [], "stages": []}
    for stage in STAGES:
        left_s = FLAGS.limit_s - (time.monotonic() - begin)
        if stage.name not in chosen or left_s < 5:
            continue
        record = run_stage(stage, is_tiny, min(stage.limit_s, left_s))
        found["stages"].append(record)
        found["aims"] = gpu_aims.aims(found["stages"])
        write_results(found, FLAGS.out)
    print(f"\n{'aim':<48}{'wanted':>8}{'here':>14}  of")
    for aim in found["aims"]:
        print(f"{aim['aim']:<48}{aim['wanted']:>8}{aim['here']:>14}  {aim['of']}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    runner.start(main, define_flags)
