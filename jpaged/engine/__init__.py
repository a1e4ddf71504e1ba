"""The pure engine: its state is a pytree, a step is EngineState -> EngineState."""

from jpaged.engine.api import FINISH_REASONS as FINISH_REASONS
from jpaged.engine.api import Counters as Counters
from jpaged.engine.api import DraftedModel as DraftedModel
from jpaged.engine.api import EngineState as EngineState
from jpaged.engine.api import Model as Model
from jpaged.engine.api import Result as Result
from jpaged.engine.api import SampledStep as SampledStep
from jpaged.engine.api import ScheduledStep as ScheduledStep
from jpaged.engine.api import begin_step as begin_step
from jpaged.engine.api import check_request as check_request
from jpaged.engine.api import collect as collect
from jpaged.engine.api import end as end
from jpaged.engine.api import end_step as end_step
from jpaged.engine.api import has_work as has_work
from jpaged.engine.api import host_table as host_table
from jpaged.engine.api import init as init
from jpaged.engine.api import pin as pin
from jpaged.engine.api import release as release
from jpaged.engine.api import reset_prefix_cache as reset_prefix_cache
from jpaged.engine.api import run as run
from jpaged.engine.api import step as step
from jpaged.engine.api import submit as submit
from jpaged.engine.api import unpin as unpin
from jpaged.engine.api import violations as violations
