"""Programs compiled by a call that uses every decoding method.

The bundled model is used, because structured output needs a tokenizer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax

from jpaged import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jpaged.engine.submission import Params

_COMPILED = "/jax/core/compile/backend_compile_duration"


def every_method(max_tokens: int) -> dict[str, Params]:
    """Parameters of one request of each kind, by name."""
    limit: dict[str, Any] = dict(max_tokens=max_tokens)
    choice = StructuredOutputsParams(choice=["return", "yield", "pass"])
    return {
        "greedy": SamplingParams(temperature=0.0, **limit),
        "sampled": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, **limit),
        "n": SamplingParams(n=3, **limit),
        "beams": BeamSearchParams(4, **limit),
        "narrow_beams": BeamSearchParams(2, length_penalty=0.5, **limit),
        "rules": SamplingParams(
            repetition_penalty=1.2,
            presence_penalty=0.5,
            min_tokens=2,
            logit_bias={5: -1.0},
            bad_words=["import"],
            **limit,
        ),
        "choice": SamplingParams(structured_outputs=choice, max_tokens=16),
        "choice_beams": BeamSearchParams(2, max_tokens=16, structured_outputs=choice),
        "prompt_logprobs": SamplingParams(prompt_logprobs=2, logprobs=2, **limit),
    }


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Records the programs that are compiled or loaded in a `with` block.

    Yields:
      A list with one entry per program: its seconds, as text.
    """
    found: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == _COMPILED:
            found.append(f"{duration_secs:.3f}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def programs_of_calls(max_tokens: int) -> list[dict[str, int]]:
    """Counts the programs of two calls that use every method.

    The second call has other prompts and another order of requests.

    Returns:
      For each call: "all", the compiled programs, and "engine", those among them that
      are an engine step.
    """
    calls = []
    texts = ("import ", "def main(", "for i in range", "class A:\n    ", "return x")
    with LLM(
        "tiny-python", block_size=4, max_num_seqs=8, max_model_len=64, num_blocks=256
    ) as llm:
        for number in range(2):
            params = list(every_method(max_tokens).values())
            params = params if number == 0 else params[::-1]
            prompts = [texts[(i + number) % len(texts)] for i in range(len(params))]
            before = llm.stats()["num_compilations"]
            with compilations() as found:
                outputs = llm.generate(prompts, params, progress=False)
            assert all(output.finished for output in outputs)
            engine_programs = llm.stats()["num_compilations"] - before
            calls.append({"all": len(found), "engine": int(engine_programs)})
    return calls
