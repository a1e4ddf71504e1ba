"""Decoding loads: beams and samples of one prompt, through jpaged and through others.

Beside the road. Everybody gets the same weights and the prompt as token ids, and is
timed from there to all tokens of the answer.
"""

import dataclasses
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import baseline
from experiments.lib.decoding import baseline as baseline_decoding
from experiments.lib.engine_loads import copy_state
from experiments.lib.timing import Contender
from jpaged import engine, save_model
from jpaged.config import EngineConfig
from jpaged.engine.submission import Params
from jpaged.models import Decoder
from jpaged.params import BeamSearchParams, SamplingParams

METHODS = ("beams", "samples")
HAS_HUGGING_FACE = all(map(importlib.util.find_spec, ("torch", "transformers")))


@dataclasses.dataclass(frozen=True)
class Load:
    """A prompt, and what is asked for: so many rows of so many tokens."""

    method: str  # of METHODS
    prompt: Sequence[int]
    num_rows: int
    num_tokens: int

    def params(self) -> Params:
        """What jpaged is asked for."""
        if self.method == "beams":
            return BeamSearchParams(
                self.num_rows, max_tokens=self.num_tokens, ignore_eos=True
            )
        return SamplingParams(
            n=self.num_rows, max_tokens=self.num_tokens, ignore_eos=True, seed=0
        )

    def cut(self) -> "Load":
        """The same up to the second token: what comes before the steady steps.

        Not up to the first: a sample that ends with it takes the prompt's blocks away
        before the others have mapped them.
        """
        return dataclasses.replace(self, num_tokens=2)

    def middle(self, steps: int) -> int:
        """Tokens of a row when the middle `steps` of its steps begin."""
        if steps > self.num_tokens - 2:
            raise ValueError(
                f"steps: expected at most {self.num_tokens - 2}, two less than the "
                f"load's tokens, got {steps}"
            )
        return len(self.prompt) + (self.num_tokens - steps) // 2


class EngineDecoding:
    """Loads through one engine, again and again with the same pages."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.state = engine.init(model, config)

    def contender(self, load: Load) -> Contender:
        """One request: submitted, and run to its end in one device call."""
        params = load.params()

        def run(state: engine.EngineState) -> engine.EngineState:
            state, _ = engine.submit(state, [list(load.prompt)], params)
            self.state = engine.run(self.model, state, np.int32(2**30))
            return self.state

        return Contender(run, lambda: (self.clear(),))

    def clear(self) -> engine.EngineState:
        """The engine without requests."""
        everyone = jnp.ones_like(self.state.requests.queue.status, bool)
        abort = jnp.int32(engine.FINISH_REASONS.index("abort"))
        self.state = engine.end(self.state, everyone, abort)
        self.state = engine.release(self.state, everyone)
        return self.state

    def tokens(self) -> np.ndarray:
        """The tokens of the last run, i32[S, N]; of beams the best comes first."""
        return np.array([result.token_ids for result in engine.collect(self.state)])

    def counters(self) -> engine.Counters:
        """The engine's counters, on the host."""
        return jax.device_get(self.state.counters)


class PlainDecoding:
    """Loads through `experiments/lib/decoding/baseline.py`."""

    def __init__(self, model: Decoder) -> None:
        self.weights, self.shape = baseline.weights_of(model)
        self.out: Any = None

    def contenders(self, load: Load) -> dict[str, Contender]:
        """Both forms of its loop."""
        prompt = jnp.asarray(load.prompt, jnp.int32)
        sizes = dict(num_rows=load.num_rows, num_tokens=load.num_tokens)
        begin = baseline_decoding.begin_beams
        decoder = baseline_decoding.beams_to_end
        arguments = (self.weights, prompt)
        if load.method == "samples":
            begin = baseline_decoding.begin_samples
            decoder = baseline_decoding.samples_to_end
            arguments += (jax.random.key(0),)

        def contender(to_end: Callable[..., Any]) -> Contender:
            def run() -> jax.Array:
                state = begin(*arguments, shape=self.shape, **sizes)
                self.out = to_end(self.weights, state, shape=self.shape).tokens
                return self.out

            return Contender(run)

        return {name: contender(form) for name, form in decoder._asdict().items()}

    def tokens(self) -> np.ndarray:
        """The tokens of the last run, i32[S, N]."""
        return np.asarray(self.out)


class HuggingFaceDecoding:
    """Loads through `generate` of transformers, on as many threads as cores."""

    def __init__(self, model: Decoder) -> None:
        import torch
        import transformers

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, pathlib.Path(folder))
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
        self.about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
        }
        self.out: Any = None

    def contender(self, load: Load) -> Contender:
        """One call of `generate`, cache and all as it comes."""
        import torch

        prompt = torch.tensor([list(load.prompt)])
        options: dict[str, Any] = dict(
            max_new_tokens=load.num_tokens,
            num_return_sequences=load.num_rows,
            attention_mask=torch.ones_like(prompt),
            pad_token_id=0,
        )
        if load.method == "beams":
            options |= dict(num_beams=load.num_rows, do_sample=False)
        else:
            options |= dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

        def run() -> int:
            with torch.inference_mode():
                out = self.model.generate(prompt, **options)
            self.out = out[:, prompt.shape[1] :].numpy()
            return 0

        return Contender(run)

    def tokens(self) -> np.ndarray:
        """The tokens of the last run, i32[S, N]."""
        return self.out


def decoding_engine(
    model: Decoder, config: EngineConfig, load: Load, context: int
) -> engine.EngineState:
    """An engine in the middle of a load: each of its rows holds `context` tokens."""
    state = engine.init(model, config)
    state, _ = engine.submit(state, [list(load.prompt)], load.params())
    while True:
        state = engine.run(model, state, np.int32(1))
        lengths = np.asarray(state.blocks.context_lens)[np.asarray(state.rows) >= 0]
        if len(lengths) == load.num_rows and lengths.min() >= context:
            return copy_state(state)
