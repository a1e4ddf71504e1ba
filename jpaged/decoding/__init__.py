"""Decoding: from logits to tokens and parents.

Place on the road: decoder -> logits -> [decoding] -> (tokens, parents) -> engine.
`base` has the two interfaces, `transforms` the filters, `sample` what the engine
calls in every step, `automaton` and `constraints` what structured output masks.
"""

from jpaged.decoding.base import Decision as Decision
from jpaged.decoding.base import DecodingAlgorithm as DecodingAlgorithm
from jpaged.decoding.base import LogitsTransform as LogitsTransform
from jpaged.decoding.base import chain as chain
from jpaged.decoding.sample import SamplingRows as SamplingRows
from jpaged.decoding.sample import greedy as greedy
from jpaged.decoding.sample import sample as sample
from jpaged.decoding.sample import sampling as sampling
from jpaged.decoding.sample import token_keys as token_keys
from jpaged.decoding.sample import token_logprobs as token_logprobs
from jpaged.decoding.sample import top_logprobs as top_logprobs
from jpaged.decoding.transforms import min_p as min_p
from jpaged.decoding.transforms import temperature as temperature
from jpaged.decoding.transforms import top_k as top_k
from jpaged.decoding.transforms import top_p as top_p
