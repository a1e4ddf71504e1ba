"""vLLM's name of the module of request parameters; see `jpaged.params`."""

from jpaged.params import BeamSearchParams as BeamSearchParams
from jpaged.params import GuidedDecodingParams as GuidedDecodingParams
from jpaged.params import RequestOutputKind as RequestOutputKind
from jpaged.params import SamplingParams as SamplingParams
from jpaged.params import StructuredOutputsParams as StructuredOutputsParams
