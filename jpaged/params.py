"""Request parameters: sampling, beam search, algorithms and structured outputs.

Host only: the engine turns parameters into arrays. Names and meanings follow vLLM
unless a docstring says otherwise. Values out of range raise ValueError; they are never
clamped, dropped or replaced silently.

Attributes of SamplingParams and BeamSearchParams can be set later. Values are checked
by the constructor, and those that were set are checked by the call that uses them.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jpaged import foreign_params, param_checks
from jpaged.decoding.base import parameters_of
from jpaged.decoding.sample import GREEDY_BELOW
from jpaged.names import checked_fields
from jpaged.validation import (
    error,
    flag,
    integer,
    number,
    strings,
    text,
    token_ids,
)


class RequestOutputKind(enum.Enum):
    """What a caller reads of a request, by vLLM's names.

    `LLM.generate` returns complete outputs and `LLM.stream` yields deltas, whatever the
    kind is, as vLLM's `generate` does.
    """

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


LEAST_TEMPERATURE = 0.01  # smaller temperatures overflow the softmax of large logits
MAX_TEMPERATURE = 1e30  # far below the largest float32: its inverse is a normal number


def _choices(value: Any) -> tuple[str, ...]:
    """Return the texts of `StructuredOutputsParams.choice`, at least one."""
    if isinstance(value, str):
        raise error("choice", "a sequence of strings", value)
    choices = strings("choice", value)
    if not choices:
        raise error("choice", "at least one string", choices)
    return tuple(text(f"choice[{i}]", choice) for i, choice in enumerate(choices))


def _json_schema(value: Any) -> str:
    """Return a schema as JSON text; `value` is a dict, a bool or JSON text."""
    if callable(of_model := getattr(value, "model_json_schema", None)):
        value = of_model()  # a class of pydantic
    schema = value
    try:
        if isinstance(value, str):
            schema = json.loads(text("json", value))
        if isinstance(schema, Mapping | bool):
            return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as cause:
        raise ValueError(
            f"json: expected a JSON schema, got {value!r}, which is not JSON: {cause}"
        ) from cause
    except RecursionError:
        raise ValueError(
            "json: expected a JSON schema with at most 100 schemas in one another, got "
            "one that is nested too deeply for Python's JSON parser"
        ) from None
    raise error("json", "a JSON schema: a dict, or one as JSON text", value)


@checked_fields(foreign_params.STRUCTURED)
@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    r"""A constraint on the whole generated text; set exactly one attribute.

    Attributes:
        regex: a pattern that the whole text matches.
        choice: the texts that are allowed; the output is one of them.
        json: a JSON schema as a dict, as JSON text or as a class of pydantic;
            {"type": "object"} allows any object. It is stored as JSON text.

    >>> StructuredOutputsParams(choice=["yes", "no"])
    StructuredOutputsParams(regex=None, choice=('yes', 'no'), json=None)

    Raises:
        ValueError: no attribute or several are set, or a value is invalid.
    """

    regex: str | None = None
    choice: Sequence[str] | None = None
    json: Mapping[str, Any] | bool | str | None = None

    def __post_init__(self) -> None:
        """Check the constraint and convert it to a form that can be hashed."""
        fields = dataclasses.fields(self)
        given = [
            field.name for field in fields if getattr(self, field.name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "structured_outputs: expected exactly one of regex, choice and json, "
                f"got {' and '.join(given) or 'none'}"
            )
        name, value = given[0], getattr(self, given[0])
        checked: Any
        if name == "regex":
            checked = text("regex", value)
        else:
            checked = _choices(value) if name == "choice" else _json_schema(value)
        object.__setattr__(self, name, checked)


GuidedDecodingParams = StructuredOutputsParams  # its name in older versions of vLLM


def _structured_outputs(value: Any, ignore_eos: bool) -> Any:
    """Return a constraint, compiled or not, or None; a dict has its attributes."""
    if isinstance(value, Mapping):
        names = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
        if unknown := sorted(map(str, set(value) - set(names))):
            expected = f"a dict with one of {', '.join(names)}"
            raise error("structured_outputs", expected, unknown[0])
        value = StructuredOutputsParams(**value)
    is_compiled = hasattr(value, "transitions") and hasattr(value, "classes")
    if not (value is None or is_compiled or isinstance(value, StructuredOutputsParams)):
        expected = "StructuredOutputsParams, a dict, a TokenAutomaton or None"
        raise error("structured_outputs", expected, value)
    # A text that may end anywhere needs no EOS.
    is_accepting = getattr(value, "is_accepting", None)
    needs_eos = is_accepting is None or not is_accepting.all()
    if value is not None and needs_eos and ignore_eos:
        raise ValueError(
            "ignore_eos: expected False with structured_outputs, got True: only EOS "
            "can end a text that is complete"
        )
    return value


@checked_fields(foreign_params.SAMPLING)
@dataclasses.dataclass
class SamplingParams:
    """How the tokens of one request are sampled, and when its outputs end.

    Attributes:
        n: number of samples; the prompt is computed once for all of them.
        temperature: values below 1e-5 become 0, which means greedy decoding and
            disables top_k, top_p and min_p. Values from 1e-5 to 0.01 are raised to
            0.01 with a warning, as in vLLM.
        top_k: after min_p, keep the k largest logits and ties with the last of them;
            0, -1 and the vocabulary's size or more keep all.
        top_p: after top_k, keep the smallest set of most probable tokens whose
            probabilities sum to at least this; 1 keeps all.
        min_p: first, drop tokens whose probability is below this fraction of the
            largest; 0 disables it.
        repetition_penalty: penalty on tokens of prompt and output; 1 disables it.
        presence_penalty, frequency_penalty: penalties on tokens of the output, from
            -2 to 2; 0 disables them.
        max_tokens: maximum number of tokens to generate; None is limited only by
            max_model_len.
        min_tokens: number of tokens before which neither EOS nor a stop token or stop
            string ends the output.
        stop: one or more strings that end the output; the text excludes them. A
            string can contain special tokens ("<|im_end|>"), also where the text does
            not show them.
        stop_token_ids: tokens that end the output as EOS does.
        ignore_eos: continue after the model's own EOS. `stop_token_ids` still end the
            output.
        logprobs: number of most probable tokens to report per position, besides the
            sampled one; -1 reports the whole vocabulary, None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt.
        token_masks: return which tokens could be sampled at each position, after rules
            and filters, as `CompletionOutput.token_masks`.
        logit_bias: numbers to add to the logits, keyed by token id.
        allowed_token_ids: the only tokens that may be sampled; None allows all.
        bad_words: strings that the generated text never contains, however it is divided
            into tokens, or sequences of token ids that are never generated. A string
            that begins with a blank is also forbidden, without the blank, at the start
            of the output. See docs/decoding.md.
        seed: 0 to 2**64 - 1; the same seed gives the same tokens in any batch.
            None and -1 derive a seed from the engine's.
        priority: under policy "priority", smaller values are admitted first; from
            -(2**31 - 1) to 2**31 - 1.
        deadline_ms: milliseconds from submission until the request should end, for
            policies such as "earliest_deadline"; a missed one ends nothing.
        user: name or number of the user, for policies such as "fair_share".
        structured_outputs: constraint on the text: a regex, a list of texts, or a JSON
            schema, as StructuredOutputsParams or as a dict ({"regex": "[a-z]+"}). None
            leaves the text unconstrained.
        logits_processors: functions that change the logits, after all rules above and
            before the temperature or the filters: LogitsProcessor, or functions
            `(logits, row) -> logits`. See docs/decoding.md.
        include_stop_str_in_output: whether the text includes the stop string, EOS or
            stop token that ended it.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: False removes what the tokenizer's decoder puts
            between special tokens, if the text shows them.
        detokenize: False leaves the texts of outputs and log-probabilities empty.
        truncate_prompt_tokens: use only this many tokens at the end of the prompt; -1
            is as many as max_model_len allows. None refuses a prompt that is too long.
        output_kind: see `RequestOutputKind`.
        retention: other numbers than the LLM's for its retention method, such as
            {"window": 256}; "off" keeps all blocks. None uses the LLM's.

    Raises:
        ValueError: a value is out of range, or two values contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_masks: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    seed: int | None = None
    priority: int = 0
    structured_outputs: Any = None
    logits_processors: Sequence[Any] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    deadline_ms: int | None = None
    user: str | int | None = None
    retention: Any = None

    def __post_init__(self) -> None:
        """Check all values and convert them to tuples, ints and floats."""
        self._check_numbers()
        self._check_ends()
        self._check_tokens()
        constraint = _structured_outputs(self.structured_outputs, self.ignore_eos)
        self._set("structured_outputs", constraint)
        if self.is_greedy and self.n > 1:
            raise ValueError(
                "n: expected 1 with greedy decoding (temperature "
                f"{self.temperature:g}), got {self.n}: all samples would be equal; set "
                "a temperature above 0"
            )
        self._set("_is_checked", True)

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Return parameters in which None means the default."""
        return cls(**{name: v for name, v in values.items() if v is not None})

    def clone(self) -> SamplingParams:
        """Return a copy."""
        return dataclasses.replace(self)

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy: each token is the most probable one."""
        return self.temperature == 0.0

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        self._set("n", integer("n", self.n, low=1))
        self._set("temperature", number("temperature", self.temperature, low=0))
        if self.temperature > MAX_TEMPERATURE:
            expected = f"a finite number of at most {MAX_TEMPERATURE:g}"
            raise error("temperature", expected, self.temperature)
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)
        elif self.temperature < LEAST_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature:g} is raised to {LEAST_TEMPERATURE}: "
                "smaller values overflow; use 0 for greedy decoding",
                stacklevel=4,
            )
            self._set("temperature", LEAST_TEMPERATURE)
        self._set("top_k", max(0, integer("top_k", self.top_k, low=-1)))
        self._set("top_p", number("top_p", self.top_p, above=0, high=1))
        self._set("min_p", number("min_p", self.min_p, low=0, high=1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, number(name, getattr(self, name), low=-2, high=2))
        penalty = number("repetition_penalty", self.repetition_penalty, above=0)
        self._set("repetition_penalty", penalty)
        self._set("priority", param_checks.priority(self.priority))
        self._set("deadline_ms", param_checks.deadline_ms(self.deadline_ms))
        self._set("user", param_checks.user(self.user))
        self._set("seed", param_checks.seed(self.seed))
        self._set("retention", param_checks.retention(self.retention))

    def _check_ends(self) -> None:
        self._set("max_tokens", param_checks.max_tokens(self.max_tokens))
        self._set("min_tokens", integer("min_tokens", self.min_tokens, low=0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: expected at most max_tokens ({self.max_tokens}), got "
                f"{self.min_tokens}"
            )
        self._set("stop", strings("stop", () if self.stop is None else self.stop))
        self._set("stop_token_ids", param_checks.stop_token_ids(self.stop_token_ids))
        for name in (
            "ignore_eos",
            "token_masks",
            "include_stop_str_in_output",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "detokenize",
        ):
            self._set(name, flag(name, getattr(self, name)))
        if self.stop and not self.detokenize:
            raise error("stop", "none with detokenize=False", self.stop)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise error("output_kind", "a RequestOutputKind", self.output_kind)

    def _check_tokens(self) -> None:
        if (length := self.truncate_prompt_tokens) is not None:
            length = integer("truncate_prompt_tokens", length, low=-1)
            if length == 0:
                raise error("truncate_prompt_tokens", "-1, or at least 1", length)
            self._set("truncate_prompt_tokens", length)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, integer(name, getattr(self, name), low=-1))
        if self.logit_bias is not None:
            self._set(
                "logit_bias", param_checks.logit_bias("logit_bias", self.logit_bias)
            )
        if self.allowed_token_ids is not None:
            allowed = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise error(
                    "allowed_token_ids", "None, or at least one token id", allowed
                )
            self._set("allowed_token_ids", allowed)
        self._set("bad_words", param_checks.bad_words(self.bad_words))
        processors = param_checks.logits_processors(self.logits_processors)
        self._set("logits_processors", processors)


@checked_fields(foreign_params.BEAM_SEARCH)
@dataclasses.dataclass
class BeamSearchParams:
    """Beam search with the semantics of Hugging Face `generate`.

    Attributes:
        beam_width: number of beams to keep.
        max_tokens: maximum number of tokens to generate; None is limited only by
            max_model_len.
        length_penalty: exponent of the score, cumulative_logprob / length **
            length_penalty. The length counts generated tokens only.
        early_stopping: when the search ends. True: as soon as beam_width beams have
            finished. False: when no running beam is expected to beat the finished
            ones. "never": when no running beam can possibly beat them.
        ignore_eos: continue after the model's own EOS. `stop_token_ids` still end a
            beam.
        stop_token_ids: tokens that end a beam as EOS does.
        num_return: number of beams to return, best first; None returns all.
        priority: under policy "priority", smaller values are admitted first.
        deadline_ms, user: as in `SamplingParams`.
        structured_outputs: constraint on the text, as in `SamplingParams`.
        logits_processors: as in `SamplingParams`; they change the log-probabilities
            that the search gets.

    Raises:
        ValueError: a value is out of range, or two values contradict each other.
    """

    beam_width: int
    max_tokens: int | None
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    num_return: int | None = None
    priority: int = 0
    structured_outputs: Any = None
    deadline_ms: int | None = None
    user: str | int | None = None
    logits_processors: Sequence[Any] = ()

    def __post_init__(self) -> None:
        """Check all values and convert them to tuples, ints and floats."""
        width = integer("beam_width", self.beam_width, low=1)
        early_stopping = self.early_stopping
        if early_stopping != "never":
            try:
                early_stopping = flag("early_stopping", early_stopping)
            except ValueError:
                expected = "False, True or 'never'"
                raise error("early_stopping", expected, early_stopping) from None
        ignore_eos = flag("ignore_eos", self.ignore_eos)
        num_return = self.num_return
        if num_return is not None:
            num_return = integer("num_return", num_return, low=1)
            if num_return > width:
                raise ValueError(
                    f"num_return: expected at most beam_width ({width}), got "
                    f"{num_return}"
                )
        checked = {
            "beam_width": width,
            "max_tokens": param_checks.max_tokens(self.max_tokens),
            "length_penalty": number("length_penalty", self.length_penalty),
            "early_stopping": early_stopping,
            "ignore_eos": ignore_eos,
            "stop_token_ids": param_checks.stop_token_ids(self.stop_token_ids),
            "num_return": num_return,
            "priority": param_checks.priority(self.priority),
            "deadline_ms": param_checks.deadline_ms(self.deadline_ms),
            "user": param_checks.user(self.user),
            "structured_outputs": _structured_outputs(
                self.structured_outputs, ignore_eos
            ),
            "logits_processors": param_checks.logits_processors(self.logits_processors),
        }
        for name, value in (checked | {"_is_checked": True}).items():
            object.__setattr__(self, name, value)


@checked_fields()
@dataclasses.dataclass(frozen=True)
class AlgorithmParams:
    """Parameters of a request that a custom decoding algorithm decodes.

    See `jpaged.decoding` for how to write one.

    Attributes:
        algorithm: a DecodingAlgorithm, or any object with its functions `init` and
            `step`. It becomes part of the compiled step, so create it once and reuse
            it: another object compiles the engine again, unless it has the same
            functions.
        num_rows: number of sequences that run, the S of the algorithm.
        n: how often the algorithm runs, with different keys; the outputs of all runs
            are returned, interleaved: output i of run c has index i * n + c. All runs
            share the blocks of the prompt, and n * num_rows sequences run in lockstep.
        parameters: values of some of the algorithm's parameters; others keep those of
            the algorithm. New values compile nothing.
        companions: prompts of the last rows, which the algorithm reads beside the
            request's own prompt: an unconditional prompt, for example. Each runs in one
            row. Their rows are no outputs.
        num_return: number of outputs to return, the first ones, of each run; None
            returns all.
        stop: strings that end an output, as in `SamplingParams`.
        logprobs: as in `SamplingParams`.
        max_tokens: maximum number of tokens to generate; None is limited only by
            max_model_len.
        ignore_eos: continue after the model's own EOS. `stop_token_ids` still end a
            sequence.
        stop_token_ids: tokens that end a sequence as EOS does.
        seed: 0 to 2**64 - 1; None and -1 derive a seed from the engine's.
        priority: under policy "priority", smaller values are admitted first.
        deadline_ms, user: as in `SamplingParams`.
        structured_outputs: constraint on the text, as in `SamplingParams`.
        logits_processors: as in `SamplingParams`; they change the log-probabilities
            that the search gets.

    Raises:
        ValueError: a value is out of range.
    """

    algorithm: Any
    num_rows: int = 1
    max_tokens: int | None = 16
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    n: int = 1
    parameters: Mapping[str, Any] | None = None
    companions: Sequence[Any] = ()
    num_return: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None
    seed: int | None = None
    priority: int = 0
    structured_outputs: Any = None
    deadline_ms: int | None = None
    user: str | int | None = None
    logits_processors: Sequence[Any] = ()

    def __post_init__(self) -> None:
        """Check all values and convert them to tuples and ints."""
        for name in ("init", "step"):
            if not callable(getattr(self.algorithm, name, None)):
                expected = "an object with functions init and step"
                raise error("algorithm", expected, self.algorithm)
        ignore_eos = flag("ignore_eos", self.ignore_eos)
        given = self.parameters
        if given is not None and not isinstance(given, Mapping):
            raise error("parameters", "a dict of name -> number or array", given)
        parameters_of(self.algorithm, given)
        for name, low in (("num_return", 1), ("logprobs", -1)):
            if getattr(self, name) is not None:
                object.__setattr__(
                    self, name, integer(name, getattr(self, name), low=low)
                )
        num_rows = integer("num_rows", self.num_rows, low=1)
        companions = param_checks.companions(self.companions, num_rows)
        needed = getattr(self.algorithm, "num_companions", None)
        if needed is not None and len(companions) != needed:
            expected = (
                f"{needed} prompts beside the request's own, which this algorithm "
                "compares it with (AlgorithmParams(..., companions=[...]))"
            )
            raise error("companions", expected, self.companions)
        checked = {
            "companions": companions,
            "n": integer("n", self.n, low=1),
            "parameters": None if given is None else dict(given),
            "stop": strings("stop", () if self.stop is None else self.stop),
            "num_rows": num_rows,
            "max_tokens": param_checks.max_tokens(self.max_tokens),
            "ignore_eos": ignore_eos,
            "stop_token_ids": param_checks.stop_token_ids(self.stop_token_ids),
            "seed": param_checks.seed(self.seed),
            "priority": param_checks.priority(self.priority),
            "deadline_ms": param_checks.deadline_ms(self.deadline_ms),
            "user": param_checks.user(self.user),
            "structured_outputs": _structured_outputs(
                self.structured_outputs, ignore_eos
            ),
            "logits_processors": param_checks.logits_processors(self.logits_processors),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
