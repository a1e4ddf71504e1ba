"""All decoding methods in one registry: requests for a tiny LLM, and their limits.

`tests/decoding/contrib/laws_test.py` runs the same laws over all of them. What a method
does not have is data of its entry (`refuses`, `law_of_n`), so that no law is skipped
silently. A new method needs one entry here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpaged import TreeSearchParams
from jpaged.decoding import (
    chain,
    contrib,
    diverse_beam_search,
    greedy,
    processor,
    sampling,
    smc,
    stochastic_beam_search,
    temperature,
    top_k,
)
from jpaged.params import (
    AlgorithmParams,
    BeamSearchParams,
    SamplingParams,
)
from tests.support.models import checkpoints
from tests.support.tiny_llm import VOCAB_SIZE

LENGTH = 8  # tokens of every output
SEED = 5
# Parameters that some methods lack. A method has them, or an error names them.
OPTIONAL = {
    "n": 2,
    "seed": SEED,
    "stop": ("zz",),
    "logprobs": 2,
}
BONUS = np.random.default_rng(3).normal(size=VOCAB_SIZE).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Method:
    """A decoding method.

    Attributes:
      params: a request, with the seed SEED if the method has seeds.
      changed: new values of numbers of the request, which compile nothing.
      is_stochastic: whether another seed gives other tokens.
      law_of_n: what n > 1 gives. "first": output i is the same for every n > i.
        "equal": n equal copies. "different": runs with other keys. None: no n.
      refuses: parameters among OPTIONAL that an error names.
      needs_draft: whether it runs in an LLM with a draft model only.
      lookahead: tokens of `max_tokens` that are not part of the output.
      acts_rarely: whether the tiny model's texts give it nothing to do.
    """

    params: Any
    changed: Mapping[str, Any]
    is_stochastic: bool = False
    law_of_n: str | None = None
    refuses: frozenset[str] = frozenset()
    needs_draft: bool = False
    lookahead: int = 0
    acts_rarely: bool = False

    @property
    def engine(self) -> str:
        """The LLM that runs it; methods that see hidden states have other programs."""
        needs = set(getattr(getattr(self.params, "algorithm", None), "needs", ()))
        if self.needs_draft:
            return "drafted"
        return "seen" if needs & {"hidden", "layers"} else "plain"

    @property
    def num_rows(self) -> int:
        """Sequences of a request that run at the same time."""
        names = ("num_rows", "beam_width")
        return next(
            (getattr(self.params, x) for x in names if hasattr(self.params, x)), 1
        )

    def accepts(self, option: str) -> bool:
        """Whether the method has this parameter of OPTIONAL."""
        return option not in self.refuses

    @property
    def is_algorithm(self) -> bool:
        """Whether the request's rows run in lockstep by an algorithm of its own."""
        return isinstance(self.params, AlgorithmParams)

    @property
    def streams(self) -> bool:
        """Whether tokens are final as soon as they are known."""
        keeps = getattr(getattr(self.params, "algorithm", None), "keeps_rows", False)
        return isinstance(self.params, SamplingParams) or keeps

    @property
    def is_tree(self) -> bool:
        """Whether the method is a search between two slices of the engine."""
        return isinstance(self.params, TreeSearchParams)

    def request(self, **values: Any) -> Any:
        """Return the request with other values."""
        return dataclasses.replace(self.params, **values)


def _sampled(changed: Mapping[str, Any], **settings: Any) -> Method:
    values = dict(max_tokens=LENGTH, ignore_eos=True, seed=SEED) | settings
    is_greedy = values.get("temperature") == 0.0
    return Method(
        SamplingParams(**values),
        changed,
        is_stochastic=not is_greedy,
        law_of_n=None if is_greedy else "first",
        # All samples would be equal.
        refuses=frozenset({"n"} if is_greedy else ()),
    )


def _processed(one: Any, other: Any, **settings: Any) -> Method:
    changed = {"logits_processors": [other]}
    return _sampled(changed, logits_processors=[one], **settings)


def _algorithm(
    algorithm: Any,
    num_rows: int,
    changed: Mapping[str, Any],
    *,
    is_stochastic: bool = False,
    lookahead: int = 0,
    needs_draft: bool = False,
    **settings: Any,
) -> Method:
    own_keys = num_rows - len(settings.get("companions", ())) == 1
    law = ("first" if own_keys else "different") if is_stochastic else "equal"
    return Method(
        AlgorithmParams(
            algorithm,
            num_rows,
            max_tokens=LENGTH + lookahead,
            ignore_eos=True,
            seed=SEED,
            **settings,
        ),
        {"parameters": changed} if changed else {"max_tokens": LENGTH - 3},
        is_stochastic=is_stochastic,
        law_of_n=law,
        needs_draft=needs_draft,
        lookahead=lookahead,
    )


def _echo(logits: Any, row: Any, *, penalty: Any) -> Any:
    """A user's processor: a penalty on the last token."""
    return logits.at[row.tokens[row.num_tokens - 1]].add(-penalty)


def _total(leaf: Any, *, bonus: Any) -> Any:
    """A value: a bonus for each token of the output, and the log-probability."""
    index = jnp.arange(leaf.tokens.shape[0], dtype=jnp.int32)
    is_output = (index >= leaf.prompt_len) & (index < leaf.num_tokens)
    each = bonus[jnp.minimum(leaf.tokens, VOCAB_SIZE - 1)]
    return jnp.sum(jnp.where(is_output, each, 0.0)) + 0.3 * leaf.logprob


def _even(last: Any, token: Any) -> Any:
    """A potential: prefers even tokens, and some tokens before them."""
    gain = jnp.where(token % 2 == 0, 0.0, -1.5) - (last % 5).astype(jnp.float32)
    return token, gain


def _methods() -> dict[str, Method]:
    hidden = checkpoints.LLAMA["hidden_size"]
    start = np.int32(0)
    mark = contrib.Watermark(VOCAB_SIZE, bias=4.0)
    other_mark = dataclasses.replace(mark, bias=2.0, secret=7)
    warped = chain(temperature(1.3), top_k(50))
    search = contrib.contrastive_search(max_tokens=LENGTH + 1, hidden_size=hidden)
    value_beam = contrib.value_beam(_total, width=2, parameters={"bonus": BONUS})
    tree = TreeSearchParams(
        _total,
        num_simulations=7,
        num_actions=4,
        max_tokens=LENGTH,
        parameters={"bonus": BONUS},
        temperature=1.0,
        ignore_eos=True,
        seed=SEED,
    )
    one_answer = frozenset({"n", "seed", "stop", "logprobs"})
    return {
        # Ordinary sampling, and its parameters.
        "greedy": _sampled({"max_tokens": 5}, temperature=0.0),
        "sampling": _sampled({"temperature": 0.6}),
        "filters": _sampled(
            {"top_p": 0.5, "top_k": 9, "min_p": 0.1}, top_p=0.9, top_k=60, min_p=0.01
        ),
        "penalties": _sampled(
            {"frequency_penalty": 1.0, "repetition_penalty": 1.1, "temperature": 0.7},
            frequency_penalty=0.5,
            repetition_penalty=1.5,
        ),
        # Logits processors.
        "user's processor": _processed(
            processor(_echo, penalty=2.0), processor(_echo, penalty=9.0)
        ),
        "typical": _processed(contrib.typical(0.9), contrib.typical(0.4)),
        "epsilon": _processed(
            contrib.epsilon_sampling(0.002), contrib.epsilon_sampling(0.01)
        ),
        "eta": _processed(contrib.eta_sampling(0.002), contrib.eta_sampling(0.01)),
        "top_n_sigma": _processed(contrib.top_n_sigma(2.0), contrib.top_n_sigma(1.0)),
        "mirostat": _processed(contrib.mirostat(5.0, 0.3), contrib.mirostat(3.0, 0.9)),
        # The texts have no repetitions.
        "dry": dataclasses.replace(
            _processed(
                contrib.dry(2.0, 1.5, 1), contrib.dry(5.0, 2.0, 2), temperature=0.0
            ),
            acts_rarely=True,
        ),
        "xtc": _processed(contrib.xtc(0.001, 0.7), contrib.xtc(0.01, 0.2)),
        "dynamic_temperature": _processed(
            contrib.dynamic_temperature(0.5, 1.5), contrib.dynamic_temperature(0.2, 0.9)
        ),
        "thinking_budget": _processed(
            contrib.thinking_budget(3, [30, 31]), contrib.thinking_budget(5, [9, 11])
        ),
        "watermark": _processed(mark.processor, other_mark.processor),
        # Beam searches.
        "beam_search": Method(
            BeamSearchParams(3, LENGTH, ignore_eos=True),
            {"beam_width": 2, "length_penalty": 0.5},
            refuses=one_answer,
        ),
        "diverse_beam_search": _algorithm(
            diverse_beam_search(num_groups=2, diversity_penalty=0.5, max_tokens=LENGTH),
            4,
            {},
        ),
        "stochastic_beam_search": _algorithm(
            stochastic_beam_search(max_tokens=LENGTH), 3, {}, is_stochastic=True
        ),
        # Algorithms.
        "greedy algorithm": _algorithm(greedy(), 1, {}),
        "sampling algorithm": _algorithm(
            sampling(warped),
            2,
            {"temperature_0": 0.7, "top_k_1": 5},
            is_stochastic=True,
        ),
        "contrastive_search": _algorithm(search, 3, {"alpha": 0.2}, lookahead=1),
        "dola": _algorithm(contrib.dola((0, 1)), 1, {"alpha": 0.5}),
        "guidance": _algorithm(
            contrib.classifier_free_guidance(1.5, temperature=1.0),
            2,
            {"scale": 3.0},
            companions=[[9, 8]],
            is_stochastic=True,
        ),
        "experts": _algorithm(
            contrib.experts(1.0, 0.05), 3, {"alpha": 3.0}, companions=[[7], [8, 6, 5]]
        ),
        "entropy_branching": _algorithm(
            contrib.entropy_branching(0.5), 3, {"threshold": 5.2}
        ),
        "value_beam": _algorithm(value_beam, 4, {"bonus": -BONUS}, lookahead=1),
        "smc": _algorithm(smc(_even, start, threshold=0.9), 3, {}, is_stochastic=True),
        "twisted_smc": _algorithm(
            contrib.twisted_smc(_even, start, threshold=0.9),
            3,
            {"threshold": 0.0},
            is_stochastic=True,
        ),
        # Beside a draft model.
        "speculative sampling": dataclasses.replace(
            _sampled({"temperature": 0.6}), needs_draft=True
        ),
        "contrastive_decoding": _algorithm(
            contrib.contrastive_decoding(0.02, 0.8, temperature=1.0),
            1,
            {"beta": 0.1},
            is_stochastic=True,
            needs_draft=True,
        ),
        # Between two slices of the engine.
        "tree_search": Method(
            tree,
            {"num_simulations": 6, "exploration": 3.0},
            is_stochastic=True,
            refuses=frozenset({"n", "stop", "logprobs"}),
        ),
    }


METHODS = _methods()
