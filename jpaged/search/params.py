"""Parameters of a tree search. Host only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jpaged import param_checks
from jpaged.decoding.parameters import as_parameters
from jpaged.decoding.values import mean_logprob
from jpaged.names import absent, checked_fields
from jpaged.validation import error, flag, integer, number

_ONE_TEXT = "a tree search chooses one text; `best` of its output is another"
# Parameters of other requests.
_FOREIGN = {
    "stop": absent(
        None,
        (),
        [],
        instead="tree search has no stop strings; set stop_token_ids",
    ),
    "structured_outputs": absent(
        None,
        instead="tree search has no structured output; BeamSearchParams and "
        "SamplingParams have it",
    ),
    "logits_processors": absent(
        None, (), [], instead="tree search has no logits rules; use `value`"
    ),
    "logprobs": absent(
        None, instead="outputs of a tree search have token_logprobs and steps"
    ),
    "n": absent(None, 1, instead=_ONE_TEXT),
    "num_return": absent(None, 1, instead=_ONE_TEXT),
}


@checked_fields(_FOREIGN)
@dataclasses.dataclass(frozen=True)
class TreeSearchParams:
    """Monte Carlo tree search: for each token, a search from the text so far.

    Attributes:
        value: function `(leaf, **parameters) -> f32[]` of a text, see `search.Leaf`;
            larger is better, on any scale. None is the mean log-probability of the
            text's tokens. It is compiled: create it once.
        parameters: keyword arguments of `value`, numbers or arrays. They are data: new
            values compile nothing.
        num_simulations: visits of the root for each token; each computes at most one
            new node. With `reuse_tree`, visits of earlier searches count.
        num_actions: most probable tokens that may follow a text.
        max_tokens: maximum number of tokens to generate.
        exploration, exploration_base: the constants c1 and c2 of MuZero. A larger c1
            visits more actions.
        temperature: 0 chooses the token with the most visits; otherwise a token is
            sampled in proportion to its visits to the power of 1 / temperature.
        reuse_tree: keep the subtree of the token that was chosen. False starts a
            new tree for each token.
        ignore_eos: continue after the model's own EOS.
        stop_token_ids: tokens that end a text as EOS does.
        seed: for `temperature`, the same for each prompt of a call, whose text
            therefore does not depend on the other prompts. None derives different
            ones from the LLM's.

    Raises:
        ValueError: a value is out of range.
    """

    value: Callable[..., Any] | None = None
    num_simulations: int = 32
    num_actions: int = 8
    max_tokens: int = 16
    parameters: Mapping[str, Any] | None = None
    exploration: float = 1.25
    exploration_base: float = 19652.0
    temperature: float = 0.0
    reuse_tree: bool = True
    ignore_eos: bool = False
    stop_token_ids: Sequence[int] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check all values and convert them to tuples, ints and floats."""
        value = mean_logprob if self.value is None else self.value
        if not callable(value) or isinstance(value, type):
            raise error("value", "a function (leaf, **parameters) -> number", value)
        given = {} if self.parameters is None else self.parameters
        if not isinstance(given, Mapping):
            raise error("parameters", "a dict of name -> number or array", given)
        checked = {
            "value": value,
            "parameters": as_parameters(given),
            "num_simulations": integer("num_simulations", self.num_simulations, low=1),
            "num_actions": integer("num_actions", self.num_actions, low=1),
            "max_tokens": integer("max_tokens", self.max_tokens, low=1),
            "exploration": number("exploration", self.exploration, low=0),
            "exploration_base": number(
                "exploration_base", self.exploration_base, above=0
            ),
            "temperature": number("temperature", self.temperature, low=0),
            "reuse_tree": flag("reuse_tree", self.reuse_tree),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "stop_token_ids": param_checks.stop_token_ids(self.stop_token_ids),
            "seed": param_checks.seed(self.seed),
        }
        for name, one in checked.items():
            object.__setattr__(self, name, one)
