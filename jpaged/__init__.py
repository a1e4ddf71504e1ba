"""jpaged: the PagedAttention system as pure functions on arrays.

The life of a request, and the packages that it passes through:

  requests -> scheduler -> kv.block_manager -> step inputs -> models -> attention
      ^                                                                     |
      |                                                                  logits
      |                                                                     v
      '---- llm <- engine <- kv.block_manager (fork, free) <- tokens <- decoding

    from jpaged import LLM, SamplingParams

    llm = LLM("tiny-python")
    outputs = llm.generate(["import ", "def "], SamplingParams(max_tokens=32))

Source: Kwon et al. 2023. https://arxiv.org/abs/2309.06180
"""

from jpaged.config import EngineConfig as EngineConfig
from jpaged.engine_args import EngineArgs as EngineArgs
from jpaged.llm import LLM as LLM
from jpaged.models.loading.checkpoint import load_model as load_model
from jpaged.models.loading.checkpoint import save_model as save_model
from jpaged.models.scoring import Perplexity as Perplexity
from jpaged.models.scoring import Score as Score
from jpaged.outputs import BeamSearchOutput as BeamSearchOutput
from jpaged.outputs import BeamSearchSequence as BeamSearchSequence
from jpaged.outputs import CompletionOutput as CompletionOutput
from jpaged.outputs import Logprob as Logprob
from jpaged.outputs import RequestOutput as RequestOutput
from jpaged.outputs import SearchStep as SearchStep
from jpaged.outputs import TreeSearchOutput as TreeSearchOutput
from jpaged.parallel.mesh import make_mesh as make_mesh
from jpaged.params import AlgorithmParams as AlgorithmParams
from jpaged.params import BeamSearchParams as BeamSearchParams
from jpaged.params import GuidedDecodingParams as GuidedDecodingParams
from jpaged.params import RequestOutputKind as RequestOutputKind
from jpaged.params import SamplingParams as SamplingParams
from jpaged.params import StructuredOutputsParams as StructuredOutputsParams
from jpaged.prompts import PromptType as PromptType
from jpaged.prompts import TextPrompt as TextPrompt
from jpaged.prompts import TokensPrompt as TokensPrompt
from jpaged.search.params import TreeSearchParams as TreeSearchParams
from jpaged.serving.live import Request as Request
from jpaged.serving.metrics import Event as Event
from jpaged.serving.metrics import StepRecord as StepRecord
from jpaged.serving.prefix import Prefix as Prefix
from jpaged.serving.request_state import Delta as Delta

__all__ = [
    "LLM",
    "AlgorithmParams",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Delta",
    "EngineArgs",
    "EngineConfig",
    "Event",
    "GuidedDecodingParams",
    "Logprob",
    "Perplexity",
    "Prefix",
    "PromptType",
    "Request",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Score",
    "SearchStep",
    "StepRecord",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "TreeSearchOutput",
    "TreeSearchParams",
    "load_model",
    "make_mesh",
    "save_model",
]
