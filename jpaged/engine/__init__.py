"""The pure engine: its state is one pytree, and a step is EngineState -> EngineState.

Typical use:

    state = engine.init(model, config)
    state, seq_indices = engine.submit(state, prompts, params)
    state = engine.run(model, state)
    results = engine.collect(state)
"""

from jpaged.engine.api import has_work as has_work
from jpaged.engine.api import run as run
from jpaged.engine.api import step as step
from jpaged.engine.bookkeeping import SampledStep as SampledStep
from jpaged.engine.bookkeeping import ScheduledStep as ScheduledStep
from jpaged.engine.bookkeeping import begin_step as begin_step
from jpaged.engine.bookkeeping import end_step as end_step
from jpaged.engine.host import collect as collect
from jpaged.engine.host import end as end
from jpaged.engine.host import host_table as host_table
from jpaged.engine.host import pin as pin
from jpaged.engine.host import release as release
from jpaged.engine.host import reset_prefix_cache as reset_prefix_cache
from jpaged.engine.host import set_clock as set_clock
from jpaged.engine.host import submit as submit
from jpaged.engine.host import unpin as unpin
from jpaged.engine.invariants import violations as violations
from jpaged.engine.limits import check_request as check_request
from jpaged.engine.new_weights import mark_stale as mark_stale
from jpaged.engine.new_weights import recompute as recompute
from jpaged.engine.request_table import FINISH_REASONS as FINISH_REASONS
from jpaged.engine.results import Result as Result
from jpaged.engine.speculation import DraftedModel as DraftedModel
from jpaged.engine.state import Counters as Counters
from jpaged.engine.state import EngineState as EngineState
from jpaged.engine.state import Model as Model
from jpaged.engine.state import init as init
