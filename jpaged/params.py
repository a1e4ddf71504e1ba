"""Request parameters: sampling, beam search, algorithms and structured output.

Host only: the engine turns parameters into arrays. Names and meanings
are vLLM's unless said otherwise; nothing is clamped, dropped or replaced silently.
"""

import dataclasses
import json
import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

GREEDY_BELOW = 1e-5  # temperatures below it mean greedy decoding
LEAST_TEMPERATURE = 0.01  # smaller ones overflow the softmax of large logits
MAX_SEED = 2**32 - 1


def _wrong(name: str, wanted: str, got: Any) -> ValueError:
    return ValueError(f"{name}: wanted {wanted}, got {got!r} ({type(got).__name__})")


def _integer(name: str, value: Any, low: int | None = None, high: int | None = None):
    """Return `value` as int, or raise; bool and float are no integers."""
    wanted = "an integer"
    if low is not None:
        wanted += f" of at least {low}"
    if high is not None:
        wanted += f" and at most {high}" if low is not None else f" of at most {high}"
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _wrong(name, wanted, value)
    if (low is not None and value < low) or (high is not None and value > high):
        raise _wrong(name, wanted, value)
    return int(value)


def _number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
) -> float:
    """Return `value` as float if it is finite, in [low, high] and over `above`."""
    wanted = "a finite number"
    if above is not None:
        wanted += f" above {above:g}"
    if low > -math.inf:
        wanted += f" of at least {low:g}"
    if high < math.inf:
        wanted += f"{' and' if 'a finite number' != wanted else ' of'} at most {high:g}"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _wrong(name, wanted, value)
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise _wrong(name, wanted, value)
    if above is not None and number <= above:
        raise _wrong(name, wanted, value)
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _seed(value: Any) -> int | None:
    """Return a seed, or None for None and -1."""
    if value is None:
        return None
    seed = _integer("seed", value, low=-1, high=MAX_SEED)
    return None if seed == -1 else seed


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, "a sequence of token ids", value)
    return tuple(
        _integer(f"{name}[{i}]", token, low=0) for i, token in enumerate(value)
    )


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """Return a string or several as a tuple; none of them may be empty."""
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(name, "a string or a sequence of strings", value)
    strings = tuple(value)
    for i, string in enumerate(strings):
        if not isinstance(string, str) or not string:
            raise _wrong(f"{name}[{i}]", "a string that is not empty", string)
    return strings


def _words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Return bad words: strings that are not empty, or tuples of token ids."""
    words = (value,) if isinstance(value, str) else () if value is None else value
    if isinstance(words, (bytes, Mapping)) or not isinstance(words, Iterable):
        raise _wrong("bad_words", "strings or sequences of token ids", value)
    checked: list[str | tuple[int, ...]] = []
    for i, word in enumerate(words):
        name = f"bad_words[{i}]"
        if not isinstance(word, str):
            word = _token_ids(name, word)
        if not word:
            raise _wrong(name, "a string that is not empty, or token ids", word)
        checked.append(word)
    return tuple(checked)


def _logit_bias(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "a dict of token id -> number", value)
    return {
        _integer(f"{name} key", token, low=0): _number(f"{name}[{token}]", bias)
        for token, bias in value.items()
    }


def _text(name: str, value: Any) -> str:
    """Return `value` if it is a string that can be written as UTF-8."""
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(name, "text without lone surrogates", value) from None
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        raise _wrong("choice", "a sequence of strings", value)
    choices = _strings("choice", value)
    if not choices:
        raise _wrong("choice", "at least one string", choices)
    return tuple(_text(f"choice[{i}]", choice) for i, choice in enumerate(choices))


def _json_schema(value: Any) -> str:
    """Return a schema, given as dict, bool or JSON text, as JSON text."""
    schema = value
    try:
        if isinstance(value, str):
            schema = json.loads(_text("json", value))
        if isinstance(schema, Mapping | bool):
            return json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"json: wanted a JSON schema, got {value!r}, which is no JSON: {error}"
        ) from error
    raise _wrong("json", "a JSON schema: a dict, or one as JSON text", value)


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    r"""What the generated text must be, as a whole; exactly one of the three.

    Attributes:
        regex: a pattern that the whole text matches.
        choice: texts, of which the whole text is one.
        json: a JSON schema as a dict or as JSON text; {"type": "object"} for any
            object. It is kept as JSON text.

    >>> StructuredOutputsParams(choice=["yes", "no"])
    StructuredOutputsParams(regex=None, choice=('yes', 'no'), json=None)

    Raises:
        ValueError: none or several are given, or one is not what is said here.
    """

    regex: str | None = None
    choice: Sequence[str] | None = None
    json: Mapping[str, Any] | bool | str | None = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form that can be hashed."""
        fields = dataclasses.fields(self)
        given = [
            field.name for field in fields if getattr(self, field.name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "structured_outputs: wanted exactly one of regex, choice and json, got "
                f"{' and '.join(given) or 'none'}"
            )
        name, value = given[0], getattr(self, given[0])
        checked: Any
        if name == "regex":
            checked = _text("regex", value)
        else:
            checked = _choices(value) if name == "choice" else _json_schema(value)
        object.__setattr__(self, name, checked)


def _check_can_end(structured_outputs: Any, ignore_eos: Any) -> None:
    if structured_outputs is not None and ignore_eos is True:
        raise ValueError(
            "ignore_eos: wanted False with structured_outputs, got True: EOS is what "
            "ends a text that must not go on"
        )


def _structured_outputs(value: Any) -> None:
    is_compiled = hasattr(value, "transitions") and hasattr(value, "classes")
    if not (value is None or is_compiled or isinstance(value, StructuredOutputsParams)):
        wanted = "StructuredOutputsParams, a TokenAutomaton or None"
        raise _wrong("structured_outputs", wanted, value)


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when it ends.

    Attributes:
        n: number of samples; their prompt is computed once.
        temperature: below 1e-5 becomes 0, which is greedy: top_k, top_p and min_p
            do not matter. From there to 0.01 it becomes 0.01, with a warning, as in
            vLLM.
        top_k: keep the k largest logits and their ties; 0 or -1 keeps all.
        top_p: keep the fewest tokens with this mass, after top_k; 1 keeps all.
        min_p: drop tokens below this share of the largest probability; 0 is off.
        repetition_penalty: over prompt and output; 1 is off.
        presence_penalty, frequency_penalty: over the output, -2 to 2; 0 is off.
        max_tokens: most tokens to generate.
        min_tokens: tokens before which neither EOS nor any stop ends the output.
        stop: string or strings that end the output; not part of the text.
        stop_token_ids: tokens that end the output as EOS does.
        ignore_eos: go on after the model's own EOS. `stop_token_ids` still end it.
        logprobs: report this many most probable tokens per position besides the
            chosen one; -1 is the whole vocabulary; None reports none.
        prompt_logprobs: the same for the prompt's tokens.
        logit_bias: numbers to add to the logits of tokens.
        allowed_token_ids: the only tokens that may be chosen; None allows all.
        bad_words: strings, or sequences of token ids, that must not be generated.
        seed: 0 to 2**32 - 1; the same seed gives the same tokens in any batch.
            None (or -1) takes one from the engine's seed.
        priority: the smaller, the earlier, under policy "priority".
        structured_outputs: what the text must be: a regex, one of several texts, JSON
            by a schema. None leaves it free.

    Raises:
        ValueError: a value is outside what is said here, or two contradict.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    seed: int | None = None
    priority: int = 0
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form: tuples, ints, floats."""
        self._check_numbers()
        self._check_ends()
        self._check_tokens()
        _structured_outputs(self.structured_outputs)
        _check_can_end(self.structured_outputs, self.ignore_eos)
        if self.is_greedy and self.n > 1:
            raise ValueError(
                f"n: wanted 1 with greedy decoding (temperature {self.temperature:g}), "
                f"got {self.n}: all samples would be equal. Set a temperature above 0"
            )

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the most probable one."""
        return self.temperature == 0.0

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        self._set("n", _integer("n", self.n, low=1))
        self._set("temperature", _number("temperature", self.temperature, low=0))
        if self.temperature < GREEDY_BELOW:
            self._set("temperature", 0.0)
        elif self.temperature < LEAST_TEMPERATURE:
            warnings.warn(
                f"temperature {self.temperature:g} is raised to {LEAST_TEMPERATURE}: "
                "smaller ones overflow. 0 asks for greedy decoding",
                stacklevel=4,
            )
            self._set("temperature", LEAST_TEMPERATURE)
        self._set("top_k", max(0, _integer("top_k", self.top_k, low=-1)))
        self._set("top_p", _number("top_p", self.top_p, above=0, high=1))
        self._set("min_p", _number("min_p", self.min_p, low=0, high=1))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, _number(name, getattr(self, name), low=-2, high=2))
        penalty = _number("repetition_penalty", self.repetition_penalty, above=0)
        self._set("repetition_penalty", penalty)
        self._set("priority", _integer("priority", self.priority))
        self._set("seed", _seed(self.seed))

    def _check_ends(self) -> None:
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, low=1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, low=0))
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: wanted at most max_tokens ({self.max_tokens}), got "
                f"{self.min_tokens}"
            )
        self._set("stop", _strings("stop", () if self.stop is None else self.stop))
        stop_ids = () if self.stop_token_ids is None else self.stop_token_ids
        self._set("stop_token_ids", _token_ids("stop_token_ids", stop_ids))
        _flag("ignore_eos", self.ignore_eos)

    def _check_tokens(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, _integer(name, getattr(self, name), low=-1))
        if self.logit_bias is not None:
            self._set("logit_bias", _logit_bias("logit_bias", self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise _wrong(
                    "allowed_token_ids", "None, or at least one token id", allowed
                )
            self._set("allowed_token_ids", allowed)
        self._set("bad_words", _words(self.bad_words))


@dataclasses.dataclass(frozen=True)
class BeamSearchParams:
    """Beam search with the semantics of Hugging Face `generate`.

    Attributes:
        beam_width: number of beams that are kept.
        max_tokens: most tokens to generate.
        length_penalty: a beam's score is cumulative_logprob / length ** this, the
            length counted over generated tokens.
        early_stopping: True ends when beam_width beams have ended; False when no
            running beam can be expected to be better; "never" when none can be.
        ignore_eos: go on after the model's own EOS. `stop_token_ids` still end.
        stop_token_ids: tokens that end a beam as EOS does.
        num_return: how many beams come back, best first; None is all.
        priority: the smaller, the earlier, under policy "priority".
        structured_outputs: what the text must be, as in `SamplingParams`.

    Raises:
        ValueError: a value is outside what is said here, or two contradict.
    """

    beam_width: int
    max_tokens: int
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    num_return: int | None = None
    priority: int = 0
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form: tuples, ints, floats."""
        width = _integer("beam_width", self.beam_width, low=1)
        penalty = _number("length_penalty", self.length_penalty)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise _wrong(
                "early_stopping", "False, True or 'never'", self.early_stopping
            )
        _flag("ignore_eos", self.ignore_eos)
        _structured_outputs(self.structured_outputs)
        _check_can_end(self.structured_outputs, self.ignore_eos)
        stop_ids = _token_ids("stop_token_ids", self.stop_token_ids)
        num_return = self.num_return
        if num_return is not None:
            num_return = _integer("num_return", num_return, low=1)
            if num_return > width:
                raise ValueError(
                    f"num_return: wanted at most beam_width ({width}), got {num_return}"
                )
        checked = {
            "beam_width": width,
            "max_tokens": _integer("max_tokens", self.max_tokens, low=1),
            "length_penalty": penalty,
            "stop_token_ids": stop_ids,
            "num_return": num_return,
            "priority": _integer("priority", self.priority),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True)
class AlgorithmParams:
    """A request that is decoded by an algorithm of the user's, see `jpaged.decoding`.

    Attributes:
        algorithm: a DecodingAlgorithm, or any object with its `init` and `step`. It
            becomes part of the compiled step: make it once, and use it again.
        num_rows: sequences that run, the S of the algorithm.
        max_tokens: most tokens to generate.
        ignore_eos: go on after the model's own EOS. `stop_token_ids` still end.
        stop_token_ids: tokens that end a sequence as EOS does.
        seed: 0 to 2**32 - 1; None (or -1) takes one from the engine's seed.
        priority: the smaller, the earlier, under policy "priority".
        structured_outputs: what the text must be, as in `SamplingParams`.

    Raises:
        ValueError: a value is outside what is said here.
    """

    algorithm: Any
    num_rows: int = 1
    max_tokens: int = 16
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None
    priority: int = 0
    structured_outputs: Any = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form: tuples, ints."""
        _structured_outputs(self.structured_outputs)
        for name in ("init", "step"):
            if not callable(getattr(self.algorithm, name, None)):
                wanted = "an object with functions init and step"
                raise _wrong("algorithm", wanted, self.algorithm)
        _flag("ignore_eos", self.ignore_eos)
        _check_can_end(self.structured_outputs, self.ignore_eos)
        checked = {
            "num_rows": _integer("num_rows", self.num_rows, low=1),
            "max_tokens": _integer("max_tokens", self.max_tokens, low=1),
            "stop_token_ids": _token_ids("stop_token_ids", self.stop_token_ids),
            "seed": _seed(self.seed),
            "priority": _integer("priority", self.priority),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
