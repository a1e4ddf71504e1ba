"""Decoding: from logits to tokens and parents.

Pipeline: decoder -> logits -> [decoding] -> (tokens, parents) -> engine.

`base` defines logits transforms and decoding algorithms, `transforms` has the filters,
and `sample` samples the tokens of an engine step. `rules` applies the logits rules of
requests, `processors` the functions that users write; `automaton` and `constraints`
mask tokens for structured output. `beam`, `diverse_beam` and `stochastic_beam` are
search algorithms, `smc` is a particle method. `prompt_lookup` drafts tokens for
speculative decoding. `contrib` has methods of papers.
"""

from jpaged.decoding.base import NO_TOKEN as NO_TOKEN
from jpaged.decoding.base import Context as Context
from jpaged.decoding.base import Decision as Decision
from jpaged.decoding.base import DecodingAlgorithm as DecodingAlgorithm
from jpaged.decoding.base import LogitsTransform as LogitsTransform
from jpaged.decoding.base import chain as chain
from jpaged.decoding.beam import BeamState as BeamState
from jpaged.decoding.beam import beam_search as beam_search
from jpaged.decoding.beam import beam_state as beam_state
from jpaged.decoding.diverse_beam import DiverseBeamState as DiverseBeamState
from jpaged.decoding.diverse_beam import diverse_beam_search as diverse_beam_search
from jpaged.decoding.parameters import Range as Range
from jpaged.decoding.processors import LogitsProcessor as LogitsProcessor
from jpaged.decoding.processors import Row as Row
from jpaged.decoding.processors import processor as processor
from jpaged.decoding.rule_arrays import LogitsRules as LogitsRules
from jpaged.decoding.rule_arrays import RuleSizes as RuleSizes
from jpaged.decoding.rule_checks import check_rules as check_rules
from jpaged.decoding.sample import SamplingRows as SamplingRows
from jpaged.decoding.sample import greedy as greedy
from jpaged.decoding.sample import sample as sample
from jpaged.decoding.sample import sample_rows as sample_rows
from jpaged.decoding.sample import sampling as sampling
from jpaged.decoding.sample import token_keys as token_keys
from jpaged.decoding.sample import token_logprobs as token_logprobs
from jpaged.decoding.sample import top_logprobs as top_logprobs
from jpaged.decoding.smc import SMCState as SMCState
from jpaged.decoding.smc import smc as smc
from jpaged.decoding.stochastic_beam import StochasticBeamState as StochasticBeamState
from jpaged.decoding.stochastic_beam import (
    stochastic_beam_search as stochastic_beam_search,
)
from jpaged.decoding.transforms import min_p as min_p
from jpaged.decoding.transforms import temperature as temperature
from jpaged.decoding.transforms import top_k as top_k
from jpaged.decoding.transforms import top_p as top_p
