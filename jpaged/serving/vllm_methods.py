"""vLLM methods: those of its LLM that are thin layers over ours.

Pipeline: user -> [vllm methods] -> llm. Host only.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jpaged.models.config import ModelConfig
from jpaged.models.loading import sources
from jpaged.models.loading.files import read_json
from jpaged.names import Foreign, checked_names, suggestion
from jpaged.outputs import BeamSearchOutput, BeamSearchSequence, RequestOutput
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.progress import Progress
from jpaged.serving.user_tokenizer import UserTokenizer
from jpaged.serving.vllm_names import LLM_METHODS, REQUEST_ARGUMENTS
from jpaged.text.tokenizer import Tokenizer

# Fields of generation_config.json that are defaults of SamplingParams.
_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class VllmMethods:
    """Base class of LLM: methods that scripts for vLLM call."""

    tokenizer: Tokenizer | None
    _name: str
    _sampling_defaults: dict[str, Any]
    _user_tokenizer: UserTokenizer | None = None

    if TYPE_CHECKING:

        @property
        def _model_config(self) -> ModelConfig: ...
        def generate(  # noqa: D102
            self, prompts: Any, params: Any = ..., progress: Progress = ...
        ) -> list[RequestOutput]: ...

    else:

        def __getattr__(self, name: str) -> Any:
            """Say what to use instead of a method of vLLM's that does not exist."""
            if name.startswith("_"):
                raise AttributeError(name)
            if name in LLM_METHODS:
                raise AttributeError(f"LLM has no {name!r}: {LLM_METHODS[name]}")
            public = [known for known in dir(type(self)) if not known.startswith("_")]
            raise AttributeError(f"LLM has no {name!r}{suggestion(name, public)}")

    def get_tokenizer(self) -> UserTokenizer:
        """Return the tokenizer, with the usual methods of transformers' tokenizers.

        Raises:
          ValueError: the model has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "get_tokenizer: expected a model with a tokenizer, got one whose "
                "folder has no tokenizer.json; pass LLM(tokenizer=...)"
            )
        if self._user_tokenizer is None:
            eos = self._model_config.eos_token_ids
            self._user_tokenizer = UserTokenizer(self.tokenizer, eos, self._name)
        return self._user_tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of requests that have none.

        They are `SamplingParams()` with what the model's generation_config.json says
        about temperature, top_k, top_p, min_p, repetition_penalty and max_new_tokens.

        Raises:
          ValueError: a value in generation_config.json is invalid.
        """
        return default_params(self._sampling_defaults)

    @checked_names(
        "beam_search",
        {
            "sampling_params": Foreign((None,), "params"),
            "lora_request": REQUEST_ARGUMENTS["lora_request"],
            "concurrency_limit": REQUEST_ARGUMENTS["concurrency_limit"],
        },
    )
    def beam_search(
        self,
        prompts: Any,
        params: BeamSearchParams | Sequence[BeamSearchParams],
        *,
        use_tqdm: Progress = False,
    ) -> list[BeamSearchOutput]:
        """Search with beams, and return them with the fields of vLLM's `beam_search`.

        The search is that of `generate` with BeamSearchParams. It differs from vLLM's
        in two points, which are Hugging Face's: scores divide by the number of
        generated tokens, without the prompt's, and the search ends as soon as
        `early_stopping` allows.

        Args:
          prompts: as for `generate`.
          params: parameters for all prompts, or one for each.
          use_tqdm: show a progress bar.

        Raises:
          ValueError: requests are invalid.
        """
        each = list(params) if isinstance(params, Sequence) else [params]
        for one in each:
            if not isinstance(one, BeamSearchParams):
                raise ValueError(
                    f"params: beam_search expects BeamSearchParams, got {one!r:.80}; "
                    "generate accepts all kinds"
                )
        outputs = self.generate(prompts, params, use_tqdm)
        return [BeamSearchOutput(self._sequences(output)) for output in outputs]

    def _sequences(self, output: RequestOutput) -> list[BeamSearchSequence]:
        found = []
        for beam in output.outputs:
            end = -1 if beam.finish_reason == "stop" else None
            tokens = [*output.prompt_token_ids, *beam.token_ids[:end]]
            text = None
            if self.tokenizer is not None:
                text = self.tokenizer.decode(tokens, skip_special_tokens=False)
            found.append(
                BeamSearchSequence(
                    tokens=tokens,
                    text=text,
                    cum_logprob=beam.cumulative_logprob,
                    logprobs=beam.logprobs or [],
                    finish_reason=beam.finish_reason,
                    stop_reason=beam.stop_reason,
                    score=beam.score,
                )
            )
        return found


def default_params(defaults: Mapping[str, Any]) -> SamplingParams:
    """Return SamplingParams with some fields of generation_config.json.

    Raises:
      ValueError: a value is invalid.
    """
    try:
        return SamplingParams(**defaults)
    except ValueError as error:
        raise ValueError(
            f"generation_config.json: {error}; pass SamplingParams"
        ) from error


def sampling_defaults(model: Any, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the fields of SamplingParams that a model's folder sets.

    Args:
      model: as for `LLM`.
      tokenizer: its tokenizer, which knows the folder of a hub model.
    """
    folder = None if tokenizer is None else tokenizer.folder
    if isinstance(model, str) and model in sources.bundled_models():
        folder = sources.bundled_path(model)
    elif not hasattr(model, "config") and pathlib.Path(model).is_dir():
        folder = pathlib.Path(model)
    file = None if folder is None else folder / "generation_config.json"
    found = read_json(file) if file is not None and file.is_file() else {}
    return {
        ours: found[theirs]
        for theirs, ours in _DEFAULTS.items()
        if found.get(theirs) is not None
    }
