"""jpaged: the PagedAttention system as pure functions on arrays.

The road that data takes, and the modules along it:

  requests -> scheduler -> block_manager -> step_inputs -> models -> attention -> logits
      ^                                                                            |
      '---- llm <- engine <- block_manager (fork, free) <- (tokens, parents) <- decoding

    from jpaged import LLM, SamplingParams

    llm = LLM("tiny-python")
    outputs = llm.generate(["import ", "def "], SamplingParams(max_tokens=32))

Source: Kwon et al. 2023. https://arxiv.org/abs/2309.06180
"""

from jpaged.config import EngineConfig as EngineConfig
from jpaged.jobs import Delta as Delta
from jpaged.live import Request as Request
from jpaged.llm import LLM as LLM
from jpaged.metrics import Event as Event
from jpaged.metrics import StepRecord as StepRecord
from jpaged.models.checkpoint import load_model as load_model
from jpaged.models.checkpoint import save_model as save_model
from jpaged.parallel import make_mesh as make_mesh
from jpaged.prefix import Prefix as Prefix
from jpaged.requests import AlgorithmParams as AlgorithmParams
from jpaged.requests import BeamSearchParams as BeamSearchParams
from jpaged.requests import CompletionOutput as CompletionOutput
from jpaged.requests import Logprob as Logprob
from jpaged.requests import RequestOutput as RequestOutput
from jpaged.requests import SamplingParams as SamplingParams
from jpaged.requests import StructuredOutputsParams as StructuredOutputsParams
from jpaged.scoring import Perplexity as Perplexity
from jpaged.scoring import Score as Score

__all__ = [
    "LLM",
    "AlgorithmParams",
    "BeamSearchParams",
    "CompletionOutput",
    "Delta",
    "EngineConfig",
    "Event",
    "Logprob",
    "Perplexity",
    "Prefix",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "StepRecord",
    "StructuredOutputsParams",
    "load_model",
    "make_mesh",
    "save_model",
]
