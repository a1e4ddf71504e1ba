"""Decoding programs: one call that uses every method, and what it compiles.

Beside the road. On the bundled model, which has a tokenizer for structured output.
"""

import contextlib
from collections.abc import Iterator

import jax

from jpaged import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jpaged.engine.submission import Params

_COMPILED = "/jax/core/compile/backend_compile_duration"


def every_method(max_tokens: int) -> dict[str, Params]:
    """A request of each kind, by its name."""
    limit = dict(max_tokens=max_tokens)
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
def counted() -> Iterator[list[str]]:
    """Counts the programs that are compiled (or loaded) meanwhile: one entry each."""
    found: list[str] = []

    def listen(event: str, seconds: float, **_: object) -> None:
        if event == _COMPILED:
            found.append(f"{seconds:.3f}")

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def programs_of_passes(max_tokens: int) -> list[dict[str, int]]:
    """Of two calls with every method, the second with other prompts and other orders:
    the programs compiled, and those among them that are the engine's step."""
    passes = []
    texts = ("import ", "def main(", "for i in range", "class A:\n    ", "return x")
    with LLM(
        "tiny-python", block_size=4, max_num_seqs=8, max_model_len=64, num_blocks=256
    ) as llm:
        for number in range(2):
            params = list(every_method(max_tokens).values())
            params = params if number == 0 else params[::-1]
            prompts = [texts[(i + number) % len(texts)] for i in range(len(params))]
            before = llm.stats()["num_compilations"]
            with counted() as found:
                outputs = llm.generate(prompts, params, progress=False)
            assert all(output.finished for output in outputs)
            engine_programs = llm.stats()["num_compilations"] - before
            passes.append({"all": len(found), "engine": int(engine_programs)})
    return passes
