"""Methods from papers, one file each: logits processors and decoding algorithms.

Pipeline: logits -> [contrib] -> logits, or (tokens, parents).

They use nothing but the interfaces of `jpaged.decoding`, which a user's own methods
have too. Each file names its paper; `tests/decoding/contrib` compares each with an
implementation that is independent of it.
"""

from jpaged.decoding.contrib.best_of_n import best_of_n as best_of_n
from jpaged.decoding.contrib.branching import entropy_branching as entropy_branching
from jpaged.decoding.contrib.contrastive_decoding import (
    contrastive_decoding as contrastive_decoding,
)
from jpaged.decoding.contrib.contrastive_search import (
    contrastive_search as contrastive_search,
)
from jpaged.decoding.contrib.dola import dola as dola
from jpaged.decoding.contrib.dry import dry as dry
from jpaged.decoding.contrib.dynamic_temperature import (
    dynamic_temperature as dynamic_temperature,
)
from jpaged.decoding.contrib.experts import experts as experts
from jpaged.decoding.contrib.guidance import (
    classifier_free_guidance as classifier_free_guidance,
)
from jpaged.decoding.contrib.mirostat import mirostat as mirostat
from jpaged.decoding.contrib.self_consistency import (
    self_consistency as self_consistency,
)
from jpaged.decoding.contrib.thinking_budget import thinking_budget as thinking_budget
from jpaged.decoding.contrib.top_n_sigma import top_n_sigma as top_n_sigma
from jpaged.decoding.contrib.truncation import epsilon_sampling as epsilon_sampling
from jpaged.decoding.contrib.truncation import eta_sampling as eta_sampling
from jpaged.decoding.contrib.twisted_smc import twisted_smc as twisted_smc
from jpaged.decoding.contrib.typical import typical as typical
from jpaged.decoding.contrib.value_beam import value_beam as value_beam
from jpaged.decoding.contrib.watermark import Watermark as Watermark
from jpaged.decoding.contrib.xtc import xtc as xtc
