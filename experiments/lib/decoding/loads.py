"""Beams and samples of one prompt, by jpaged, plain JAX and Hugging Face.

All contenders get the same weights and the prompt as token ids. Each is timed from the
prompt to all tokens of the output.
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
from experiments.lib.engine_loads import clear_state, copy_state, live_context_lens
from experiments.lib.timing import Contender
from jpaged import engine, save_model
from jpaged.config import EngineConfig
from jpaged.engine.submission import Params
from jpaged.models import Decoder
from jpaged.params import BeamSearchParams, SamplingParams

METHODS = ("beams", "samples")
HAS_HUGGING_FACE = all(map(importlib.util.find_spec, ("torch", "transformers")))


@dataclasses.dataclass(frozen=True)
class DecodingLoad:
    """A prompt and the output that is requested."""

    method: str  # of METHODS
    prompt: Sequence[int]
    num_rows: int  # beams or samples
    num_tokens: int  # of each row

    def params(self) -> Params:
        """Returns jpaged's request parameters."""
        if self.method == "beams":
            return BeamSearchParams(
                self.num_rows, max_tokens=self.num_tokens, ignore_eos=True
            )
        return SamplingParams(
            n=self.num_rows, max_tokens=self.num_tokens, ignore_eos=True, seed=0
        )

    def cut(self) -> "DecodingLoad":
        """Returns the load up to its second token, before the steady steps.

        One token is too few: a sample that ends with its first token releases the
        prompt's blocks before the other samples map them.
        """
        return dataclasses.replace(self, num_tokens=2)

    def middle(self, steps: int) -> int:
        """Returns the tokens of a row when the middle `steps` steps begin.

        Raises:
          ValueError: The load has fewer than `steps` + 2 tokens.
        """
        if steps > self.num_tokens - 2:
            raise ValueError(
                f"--cost_steps: expected at most {self.num_tokens - 2}, two less than "
                f"the load's tokens, got {steps}"
            )
        return len(self.prompt) + (self.num_tokens - steps) // 2


class EngineDecoding:
    """Runs loads through one engine repeatedly, with the same pages."""

    def __init__(self, model: Decoder, config: EngineConfig) -> None:
        self.model = model
        self.state = engine.init(model, config)

    def contender(self, load: DecodingLoad) -> Contender:
        """One request: submitted, and run to its end in one device call."""
        params = load.params()

        def run(state: engine.EngineState) -> engine.EngineState:
            state, _ = engine.submit(state, [list(load.prompt)], params)
            self.state = engine.run(self.model, state, np.int32(2**30))
            return self.state

        return Contender(run, lambda: (self.clear(),))

    def clear(self) -> engine.EngineState:
        """Returns the engine without requests."""
        self.state = clear_state(self.state)
        return self.state

    def tokens(self) -> np.ndarray:
        """Tokens of the last run, i32[S, N]; the best beam comes first."""
        return np.array([result.token_ids for result in engine.collect(self.state)])

    def counters(self) -> engine.Counters:
        """The engine's counters, on the host."""
        return jax.device_get(self.state.counters)


class PlainDecoding:
    """Runs loads through `experiments/lib/decoding/baseline.py`."""

    def __init__(self, model: Decoder) -> None:
        self.weights, self.shape = baseline.weights_of(model)
        self.out: Any = None

    def contenders(self, load: DecodingLoad) -> dict[str, Contender]:
        """Both forms of the baseline's loop, by name."""
        prompt = jnp.asarray(load.prompt, jnp.int32)
        sizes = dict(num_rows=load.num_rows, num_tokens=load.num_tokens)
        begin: Callable[..., Any] = baseline_decoding.begin_beams
        forms = baseline_decoding.decode_beams
        arguments: tuple[Any, ...] = (self.weights, prompt)
        if load.method == "samples":
            begin = baseline_decoding.begin_samples
            forms = baseline_decoding.decode_samples
            arguments += (jax.random.key(0),)

        def contender(decode: Callable[..., Any]) -> Contender:
            def run() -> jax.Array:
                state = begin(*arguments, shape=self.shape, **sizes)
                self.out = decode(self.weights, state, shape=self.shape).tokens
                return self.out

            return Contender(run)

        return {name: contender(form) for name, form in forms._asdict().items()}

    def tokens(self) -> np.ndarray:
        """Tokens of the last run, i32[S, N]."""
        return np.asarray(self.out)


class HuggingFaceDecoding:
    """Runs loads through `generate` of transformers, with one thread per core."""

    def __init__(self, model: Decoder) -> None:
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        transformers.utils.logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, pathlib.Path(folder))
            self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32
            ).eval()
        self.about = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "torch_threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
        }
        self.out: Any = None

    def contender(self, load: DecodingLoad) -> Contender:
        """One call of `generate` with its default cache."""
        import torch  # pyright: ignore[reportMissingImports]

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
        """Tokens of the last run, i32[S, N]."""
        return self.out


def load_in_progress(
    model: Decoder, config: EngineConfig, load: DecodingLoad, context: int
) -> engine.EngineState:
    """An engine during a load: each of its rows holds at least `context` tokens."""
    state = engine.init(model, config)
    state, _ = engine.submit(state, [list(load.prompt)], load.params())
    while True:
        state = engine.run(model, state, np.int32(1))
        lengths = live_context_lens(state)
        if len(lengths) == load.num_rows and lengths.min() >= context:
            return copy_state(state)
