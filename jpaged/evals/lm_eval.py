"""A model of lm-evaluation-harness.

Pipeline: lm_eval -> [lm_eval] -> llm, and back. Needs the extra `lm_eval`.

    import lm_eval
    from jpaged.evals.lm_eval import JPagedLM

    model = JPagedLM("smollm2-135m-instruct")
    results = lm_eval.simple_evaluate(model, tasks=["lambada_openai"])

The numbers equal those of the harness's own `hf` model on the same checkpoint, as far
as floating point allows. What `hf` cannot do: decode with any method of jpaged, see
`JPagedLM.make_params`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The lines are checked where the extra is installed.
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import (  # pyright: ignore[reportMissingImports]
    register_model,
)
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)
from tqdm import tqdm

from jpaged.engine.limits import Params
from jpaged.evals import special
from jpaged.llm import LLM
from jpaged.models import scoring
from jpaged.params import SamplingParams
from jpaged.text import chat
from jpaged.validation import error, integer

MakeParams = Callable[[SamplingParams], Params]
DEFAULT_MAX_GEN_TOKS = 256
_SCORED_AT_ONCE = 256  # texts between two updates of the progress bar


@register_model("jpaged")
class JPagedLM(TemplateLM):
    """An LLM as lm-evaluation-harness calls it.

    Args:
      pretrained: the model, as for `jpaged.LLM`, or an LLM.
      make_params: maps the sampling parameters of a generation request, which are
        those that its task describes, to other parameters: beam search, an algorithm,
        other sampling. None keeps them.
      add_bos_token: whether texts are encoded with the tokenizer's special tokens; None
        is what the tokenizer does by itself.
      prefix_token_id: context of texts that have none; None is BOS, or else EOS.
      max_length: tokens of a window; None is the model's maximum.
      max_gen_toks: generated tokens, if a task does not say.
      think_end_token: text after which the answer begins.
      chat_template_args: further variables of the chat template.
      seed: seed of requests that sample.
      progress: show progress bars.
      batch_size, max_batch_size, device: accepted from the harness's command line. The
        batch follows from the LLM's sizes, and the device is jax's.
      **options: further arguments of `jpaged.LLM`.

    Raises:
      ValueError: an argument is invalid, or the model has no tokenizer.
      FileNotFoundError: the model does not exist.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | LLM,
        *,
        make_params: MakeParams | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = DEFAULT_MAX_GEN_TOKS,
        think_end_token: str | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        seed: int | None = None,
        progress: bool = True,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(pretrained, LLM):
            if options:
                raise error("options", "none with an LLM that exists", options)
            self.llm = pretrained
        else:
            self.llm = LLM(pretrained, **options)
        if self.llm.tokenizer is None:
            raise ValueError(
                "pretrained: expected a model with a tokenizer, got one whose folder "
                "has no tokenizer.json"
            )
        self.make_params: MakeParams = make_params or (lambda params: params)
        self._tokenizer = self.llm.tokenizer
        self._special = special.special_tokens(self.llm)
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        longest = self.llm.model.config.max_length
        self._max_length = longest
        if max_length is not None:
            self._max_length = integer("max_length", max_length, low=2, high=longest)
        self._max_gen_toks = integer("max_gen_toks", max_gen_toks, low=1)
        self._think_end_token = think_end_token
        self._variables = dict(chat_template_args or {})
        self._seed = seed
        self._progress = progress

    # What the harness asks about the model.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._special.eos_id is None:
            raise ValueError("expected a model with an EOS token, got one without")
        return self._special.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self._special.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Number of tokens of a window."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Number of tokens to generate, if a task does not say."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the names of caches."""
        folder = self._tokenizer.folder
        return "jpaged" if folder is None else str(folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the chat template that is used, for the results."""
        if chat_template is False or chat_template is None:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        return chat.templates_of(self._tokenizer).choose(name, None)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the text of a conversation."""
        return special.render(
            self.llm,
            chat_history,
            add_generation_prompt=add_generation_prompt,
            variables=self._variables,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the token ids of a text, without a second BOS."""
        adds = add_special_tokens
        if adds is None:
            prefix = self._tokenizer.decode([self.prefix_token_id], False)
            has_prefix = bool(prefix) and string.startswith(prefix)
            adds = False if has_prefix else self._add_bos_token
        return self._tokenizer.encode(string, True if adds is None else adds)

    def tok_decode(self, tokens: int | Sequence[int]) -> str:
        """Return the text of tokens."""
        return self._tokenizer.decode([tokens] if isinstance(tokens, int) else tokens)

    def get_model_info(self) -> dict[str, Any]:
        """Return what the results say about the model."""
        config = self.llm.model.config
        return {
            "model_dtype": config.dtype,
            "model_architecture": config.architecture,
            "attention": self.llm.stats()["attention"],
        }

    # Requests.

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether it is greedy.

        Texts of similar length share a batch; equal texts are computed once.
        """
        texts: dict[tuple[int, ...], None] = {}
        wanted = []
        for _, context, continuation in requests:
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    "requests: expected a context and a continuation of 1 to "
                    f"{self.max_length} tokens, got {len(context)} and "
                    f"{len(continuation)}"
                )
            # The last token is no input, so one more than the window fits.
            text = tuple((context + continuation)[-(self.max_length + 1) :])
            wanted.append((text, len(continuation)))
            texts[text] = None
        ordered = sorted(texts, key=len, reverse=True)
        found: dict[tuple[int, ...], Any] = {}
        with self._bar(len(ordered), "loglikelihood", disable_tqdm) as bar:
            for first in range(0, len(ordered), _SCORED_AT_ONCE):
                part = ordered[first : first + _SCORED_AT_ONCE]
                values = scoring.text_logprobs(self.llm.model, [list(t) for t in part])
                found.update(zip(part, values, strict=True))
                bar.update(len(part))
        answers = []
        for (key, _, _), (text, size) in zip(requests, wanted, strict=True):
            logprobs, is_best = found[text]
            answer = float(logprobs[-size:].sum()), bool(is_best[-size:].all())
            answers.append(answer)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-probability of each text, in windows of `max_length`."""
        windows: list[Any] = []
        counts = []
        for request in requests:
            (text,) = request.args
            parts = [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += parts
            counts.append(len(parts))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            total = sum(next(values)[0] for _ in range(count))
            totals.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return the text that each context is continued with.

        All requests run in the engine's batch; it shares common prefixes.
        """
        arguments = [request.args for request in requests]
        prompts, params, stops = [], [], []
        for context, given in arguments:
            one, until = self._params(given)
            most = one.max_tokens or self.max_gen_toks
            room = min(self.max_length, self.llm.config.max_model_len) - most
            if room <= 0:
                raise ValueError(
                    f"max_gen_toks: expected fewer than {room + most}, the model's "
                    f"maximum length, got {most}"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(self.make_params(one))
            stops.append(until)
        answers: dict[int, str] = {}
        # The longest prompts come first, as in the harness's other models.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        with self._bar(len(prompts), "generate_until", disable_tqdm) as bar:

            def on_output(position: int, output: Any) -> None:
                index = order[position]
                text = postprocess_generated_text(
                    output.outputs[0].text, stops[index], self._think_end_token
                )
                answers[index] = text
                self.cache_hook.add_partial("generate_until", arguments[index], text)
                bar.update()

            self.llm.generate(
                [prompts[i] for i in order],
                [params[i] for i in order],
                progress=False,
                on_output=on_output,
            )
        return [answers[index] for index in range(len(prompts))]

    def _params(self, given: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """Return the sampling parameters of a task's generation arguments.

        Raises:
          ValueError: an argument has no equal in jpaged.
        """
        options: dict[str, Any] = dict(
            normalize_gen_kwargs(dict(given), self.max_gen_toks)
        )
        options.pop("do_sample", None)
        until = handle_stop_sequences(options.pop("until", None), self._special.eos)
        until = [text for text in until if text]
        most = options.pop("max_gen_toks")
        options.setdefault("temperature", 0.0)
        known = {field.name for field in dataclasses.fields(SamplingParams)}
        if unknown := sorted(set(options) - known):
            raise ValueError(
                f"generation_kwargs: expected names of SamplingParams, got "
                f"{unknown[0]!r}; use make_params for other methods, such as beams"
            )
        params = SamplingParams(
            max_tokens=most, stop=until, **{"seed": self._seed, **options}
        )
        return params, until

    def _bar(self, total: int, name: str, is_disabled: bool) -> tqdm[Any]:
        return tqdm(
            total=total,
            desc=f"jpaged {name}",
            disable=is_disabled or not self._progress,
        )
