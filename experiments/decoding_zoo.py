"""Compares decoding methods on one set of prompts: quality proxies, steps and time.

    python -m experiments.decoding_zoo
    python -m experiments.decoding_zoo --model FOLDER --max_tokens 64 --out zoo
    python -m experiments.decoding_zoo --methods greedy,typical,dola --prompt "def "
    python -m experiments.decoding_zoo --model smollm2-135m-instruct --out zoo
    python -m experiments.decoding_zoo --model LARGE --draft SMALL

Each method generates `--max_tokens` tokens after each prompt, all prompts in one call,
after a call that compiles. The table has, as means over outputs:

- perplexity: of the output under the model, without filters or temperature;
- repetition: share of 4-grams that occurred before in the output;
- distinct_2: different 2-grams by all 2-grams, over all outputs of the method;
- diversity: product of (1 - repetition) of 2-, 3- and 4-grams;
- steps of the decoder and seconds of the call; blocks copied before a write; tokens per
  second, of the outputs that are compared.

Low perplexity with high repetition is degenerate text. A method is better where
diversity is high and perplexity near that of human text, which no run knows.

The last line on stdout is one JSON object. `--out` writes DIR/zoo.csv, and DIR/zoo.png
if matplotlib is installed (extra `plot`).

Each method has one output per prompt; best_of_n chooses the sample of four that repeats
itself least. The value function of value_beam and tree_search adds the mean
log-probability and the share of new tokens. smc and twisted_smc have four particles and
a potential that penalises tokens among the last 16; the output is the first particle,
without its weight. thinking_budget forces a line break after half of the tokens.
contrastive_decoding needs a smaller model of the same vocabulary, which no bundled
model has: it runs with `--draft` only.

Time: about four minutes on two CPU cores, mostly for compilation.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.lib import runner
from experiments.lib.runner import Report, progress
from jpaged.decoding import contrib, smc
from jpaged.decoding.values import Leaf, mean_logprob
from jpaged.llm import LLM
from jpaged.params import AlgorithmParams, BeamSearchParams, SamplingParams
from jpaged.plot import style
from jpaged.search import TreeSearchParams

FLAGS = flags.FLAGS
CODE_MODEL = "tiny-python"
DRAFTED = "contrastive_decoding"
PROMPTS = ("def ", "class ", "import ", "for i in ", "    return ", "if __name__")
TEXT_PROMPTS = (
    "The history of the city begins with",
    "A good night's sleep is important because",
    "Water boils at a lower temperature when",
    "Once upon a time, in a village by the sea,",
)


def define_flags() -> None:
    """Defines the runner's flags."""
    flags.DEFINE_string("model", CODE_MODEL, "Folder, or a bundled model's name.")
    flags.DEFINE_multi_string("prompt", [], "A prompt; may be repeated.")
    flags.DEFINE_string("draft", None, "A smaller model, for contrastive_decoding.")
    flags.DEFINE_list("methods", None, f"Some of {', '.join(METHODS)}; default: all.")
    flags.DEFINE_integer("max_tokens", 48, "Tokens of each output.", lower_bound=4)
    flags.DEFINE_integer("seed", 0, "Seed of the first prompt.", lower_bound=0)
    flags.DEFINE_string("out", None, "Folder for zoo.csv and zoo.png.")


def _sampled(**settings: Any) -> Callable[[LLM, int, int], Any]:
    return lambda llm, length, seed: SamplingParams(
        max_tokens=length, ignore_eos=True, seed=seed, **settings
    )


def _processed(one: Any) -> Callable[[LLM, int, int], Any]:
    return _sampled(logits_processors=[one])


def _algorithm(
    make: Callable[[LLM, int], Any], num_rows: int = 1, **settings: Any
) -> Callable[[LLM, int, int], Any]:
    def params(llm: LLM, length: int, seed: int) -> AlgorithmParams:
        more: dict[str, Any] = {
            name: value(llm) if callable(value) else value
            for name, value in settings.items()
        }
        length += more.pop("lookahead", 0)
        return AlgorithmParams(
            make(llm, length),
            num_rows,
            max_tokens=length,
            ignore_eos=True,
            seed=seed,
            **more,
        )

    return params


_RECENT = 16  # tokens that the potential of the particle methods penalises


def fresh_potential(recent: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A log-potential: -2 for a token among the last `_RECENT` ones of the output."""
    is_old = jnp.any(recent == token)
    return jnp.roll(recent, 1).at[0].set(token), jnp.where(is_old, -2.0, 0.0)


@functools.cache
def _particles(make: Callable[..., Any]) -> Any:
    """A particle method; one object, so that calls share programs."""
    return make(fresh_potential, np.full((_RECENT,), -1, np.int32))


def _budget(llm: LLM, length: int, seed: int) -> SamplingParams:
    assert llm.tokenizer is not None
    ends = llm.tokenizer.encode("\n", add_special_tokens=False)
    return _processed(contrib.thinking_budget(length // 2, ends))(llm, length, seed)


def _watermarked(llm: LLM, length: int, seed: int) -> SamplingParams:
    mark = contrib.Watermark(llm.model.config.vocab_size)
    return _processed(mark.processor)(llm, length, seed)


def _unconditional(llm: LLM) -> list[list[int]]:
    """A prompt that says nothing: the first token that the model knows."""
    return [[llm.model.config.bos_token_id or 0]]


def _early_layers(llm: LLM) -> tuple[int, ...]:
    """Two layers of the first half."""
    half = max(1, llm.model.config.num_layers // 2)
    return tuple(sorted({0, half - 1}))


def _instructions(llm: LLM | None = None) -> list[str]:
    """Prompts of an expert and of an anti-expert."""
    del llm
    return ["A clear and varied text: ", "A dull text that repeats itself: "]


def fresh_value(leaf: Leaf) -> jax.Array:
    """The mean log-probability plus three times the share of new output tokens."""
    index = jnp.arange(leaf.tokens.shape[0], dtype=jnp.int32)
    is_output = (index >= leaf.prompt_len) & (index < leaf.num_tokens)
    is_equal = leaf.tokens[:, None] == leaf.tokens[None, :]
    is_earlier = (index[None, :] < index[:, None]) & is_output[None, :]
    is_new = is_output & ~jnp.any(is_equal & is_earlier, axis=1)
    count = jnp.maximum(leaf.num_tokens - leaf.prompt_len, 1).astype(jnp.float32)
    return mean_logprob(leaf) + 3.0 * jnp.sum(is_new).astype(jnp.float32) / count


def _tree(llm: LLM, length: int, seed: int) -> TreeSearchParams:
    del llm
    return TreeSearchParams(
        fresh_value,
        num_simulations=15,
        num_actions=4,
        max_tokens=length,
        ignore_eos=True,
        seed=seed,
    )


def _contrastive(llm: LLM, length: int) -> Any:
    size = llm.model.config.hidden_size
    return contrib.contrastive_search(max_tokens=length, hidden_size=size)


# (llm, max_tokens, seed) -> parameters of a request.
METHODS: dict[str, Callable[[LLM, int, int], Any]] = {
    "greedy": _sampled(temperature=0.0),
    "sampling": _sampled(),
    "top_p": _sampled(top_p=0.9),
    "beam_search": lambda llm, length, seed: BeamSearchParams(
        4, length, ignore_eos=True, num_return=1
    ),
    "typical": _processed(contrib.typical(0.9)),
    "epsilon": _processed(contrib.epsilon_sampling(0.01)),
    "eta": _processed(contrib.eta_sampling(0.01)),
    "top_n_sigma": _processed(contrib.top_n_sigma(1.0)),
    "mirostat": _processed(contrib.mirostat(3.0, 0.1)),
    "dry": _sampled(temperature=0.0, logits_processors=[contrib.dry()]),
    "xtc": _processed(contrib.xtc()),
    "dynamic_temperature": _processed(contrib.dynamic_temperature()),
    "thinking_budget": _budget,
    "watermark": _watermarked,
    "contrastive_search": _algorithm(_contrastive, 4, lookahead=1),
    "dola": _algorithm(lambda llm, length: contrib.dola(_early_layers(llm))),
    "guidance": _algorithm(
        lambda llm, length: contrib.classifier_free_guidance(1.5),
        2,
        companions=_unconditional,
    ),
    "experts": _algorithm(
        lambda llm, length: contrib.experts(1.0, 0.1), 3, companions=_instructions
    ),
    DRAFTED: _algorithm(lambda llm, length: contrib.contrastive_decoding()),
    "smc": _algorithm(lambda llm, length: _particles(smc), 4),
    "twisted_smc": _algorithm(lambda llm, length: _particles(contrib.twisted_smc), 4),
    "value_beam": _algorithm(
        lambda llm, length: contrib.value_beam(fresh_value, width=2), 6, lookahead=1
    ),
    "best_of_n": _sampled(n=4),
    "tree_search": _tree,
}


def repetition(tokens: Sequence[int], size: int) -> float:
    """Share of the n-grams that occurred before; 0 if there are none."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(outputs: Sequence[Sequence[int]], size: int) -> float:
    """Different n-grams by all n-grams, over all outputs; 1 if there are none."""
    grams = [
        tuple(tokens[i : i + size])
        for tokens in outputs
        for i in range(len(tokens) - size + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 1.0


def quality(outputs: Sequence[Any]) -> dict[str, float]:
    """The proxies of some outputs, see the module's docstring."""
    tokens = [list(one.token_ids) for one in outputs]
    logprob = sum(one.cumulative_logprob for one in outputs)
    diversities = [
        math.prod(1.0 - repetition(one, size) for size in (2, 3, 4)) for one in tokens
    ]
    return {
        "perplexity": math.exp(-logprob / max(sum(map(len, tokens)), 1)),
        "repetition": float(np.mean([repetition(one, 4) for one in tokens])),
        "distinct_2": distinct(tokens, 2),
        "diversity": float(np.mean(diversities)),
    }


def measure(llm: LLM, name: str, prompts: Sequence[str]) -> dict[str, float]:
    """Runs a method twice, and measures the second run."""
    make = METHODS[name]
    params = [make(llm, FLAGS.max_tokens, FLAGS.seed + i) for i in range(len(prompts))]
    run = _search if isinstance(params[0], TreeSearchParams) else _generate
    run(llm, prompts, params)
    start = time.perf_counter()
    found, steps, copies = run(llm, prompts, params)
    seconds = time.perf_counter() - start
    num_tokens = sum(len(one.token_ids) for one in found)
    return quality(found) | {
        "steps": steps,
        "block_copies": copies,
        "seconds": seconds,
        "tokens_per_s": num_tokens / seconds,
    }


def _generate(
    llm: LLM, prompts: Sequence[str], params: Sequence[Any]
) -> tuple[list[Any], int, int]:
    """Return one output per prompt, decoder steps, and copied blocks."""
    before = llm.stats()
    outputs = llm.generate(prompts, params, progress=False)
    after = llm.stats()
    counts = [after[x] - before[x] for x in ("num_steps", "num_block_copies")]
    found = [output.outputs[0] for output in outputs]
    if getattr(params[0], "n", 1) > 1:
        found = [
            contrib.best_of_n(one.outputs, _Repetitions(one.outputs)).output
            for one in outputs
        ]
    return found, *counts


class _Repetitions:
    """A verifier of texts: minus the share of repeated 4-grams."""

    def __init__(self, outputs: Sequence[Any]):
        self._of_text = {one.text: repetition(one.token_ids, 4) for one in outputs}

    def __call__(self, text: str) -> float:
        return -self._of_text[text]


def _search(
    llm: LLM, prompts: Sequence[str], params: Sequence[Any]
) -> tuple[list[Any], int, int]:
    """As `_generate`, for a tree search, which has one seed for all prompts."""
    outputs = llm.tree_search(list(prompts), params[0])
    metrics = outputs[0].metrics
    found = [output.outputs[0] for output in outputs]
    return found, metrics["num_steps"], metrics["num_block_copies"]


def write_files(folder: str, found: dict[str, dict[str, float]]) -> None:
    """Writes the table, and the figure if matplotlib is installed."""
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    names = list(next(iter(found.values())))
    rows = [[method, *(row[name] for name in names)] for method, row in found.items()]
    runner.write_csv(path / "zoo.csv", ["method", *names], rows)
    if importlib.util.find_spec("matplotlib") is None:
        progress("no figure: matplotlib is not installed (extra `plot`)")
        return
    figure, panels = style.new_figure(panel=(7.0, 5.0))
    axis = panels[0, 0]
    for number, (method, row) in enumerate(found.items()):
        color = style.COLORS[number % len(style.COLORS)]
        marker = style.MARKERS[number // len(style.COLORS) % len(style.MARKERS)]
        point = (row["perplexity"], row["diversity"])
        axis.plot(*point, marker=marker, color=color, linestyle="", label=method)
    axis.set_xscale("log")
    style.plain_x(axis)
    label = "perplexity under the model (log scale)"
    style.dress(axis, label, "diversity", grid="both")
    style.legend_beside(axis)
    style.save(figure, path / "zoo.png")


def chosen_methods() -> list[str]:
    """The methods to run, which `--methods` and `--draft` choose.

    Raises:
      ValueError: A method does not exist or needs `--draft`, or none needs it.
    """
    names = runner.some_of("methods", FLAGS.methods, list(METHODS))
    if FLAGS.draft is None and DRAFTED in names:
        if FLAGS.methods:
            raise ValueError(
                f"--draft: expected a smaller model of the same vocabulary with "
                f"{DRAFTED}, got none"
            )
        names.remove(DRAFTED)
    if FLAGS.draft is not None and DRAFTED not in names:
        raise ValueError(
            f"--draft: expected {DRAFTED} among --methods, which are {', '.join(names)}"
        )
    return names


def main(argv: list[str]) -> None:
    """Runs all methods, and prints a table."""
    del argv
    report, found = Report(), {}
    with runner.user_errors("decoding_zoo"):
        names = chosen_methods()
        texts = PROMPTS if FLAGS.model == CODE_MODEL else TEXT_PROMPTS
        prompts = list(FLAGS.prompt or texts)
        length = FLAGS.max_tokens + 1
        longest = max(len(prompt.encode()) for prompt in [*prompts, *_instructions()])
        sizes: dict[str, Any] = dict(
            max_num_seqs=32, max_model_len=longest + length + 8
        )
        llm = LLM(FLAGS.model, **sizes)
        for name in names:
            progress(f"{name} ...")
            if name == DRAFTED:  # hidden states and layers are not read beside a draft
                draft = {"model": FLAGS.draft}
                with LLM(FLAGS.model, speculative_config=draft, **sizes) as drafted:
                    found[name] = row = measure(drafted, name, prompts)
            else:
                found[name] = row = measure(llm, name, prompts)
            report.row(
                name,
                f"perplexity {row['perplexity']:.2f}",
                f"diversity {row['diversity']:.2f}, repetition {row['repetition']:.2f}",
                f"{row['tokens_per_s']:.0f} tokens/s, {row['steps']:.0f} steps",
            )
            report.tokens_per_s[name] = row["tokens_per_s"]
        if FLAGS.out:
            write_files(FLAGS.out, found)
    report.details["methods"] = found
    report.last_line(runner.flag_values(__name__))


if __name__ == "__main__":
    runner.start(main, define_flags)
