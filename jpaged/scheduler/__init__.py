"""Scheduler: which rows run in a step, and with how many tokens.

Pipeline: request table -> [scheduler] -> block manager.

The scheduler is a pure function of lengths, tables and the queue. It never reads a
token, so the engine and the simulator run the same code. It implements iteration-level
scheduling with chunked prompts (paper section 4.3): running rows decode one token each,
the rest of the step's budget goes to prompts, and requests are admitted while their
prompts fit into the free blocks. When blocks run out, the latest requests are preempted
(paper section 4.5). They are later recomputed from their prompt and their generated
tokens; or, if the host pool has space, they are swapped out: their blocks are copied to
the host (`jpaged.kv.swap`), and nothing is admitted until all of them are swapped in.

All sequences of a request (samples, beams) are admitted together and preempted
together. Sequences of a lockstep request, such as beams, also decode together: none
computes its last known token before all of them can. Samples do not have this
constraint: if a request has more samples than fit when nothing else runs, as many as
fit run at a time.

Policies (`policies`) decide which request is admitted first, which one is preempted
first, and how the tokens of a step are split. By default a fixed order decides which
rows keep their memory and get tokens: priority, then arrival, then sequence index.

Why every run ends: the first running sequence in the fixed order (for a lockstep
request, all sequences of the first request) is never preempted and gets at least one
token in each step, whatever the policies say. A sequence that waits for its source
waits for an earlier row; if that row is preempted, it computes its tokens itself. If
nothing runs, the policy's first request is admitted, because `submit` refuses a request
that does not fit into the whole pool alone. So the first request in the fixed order
that is ever admitted ends, then the next, and every run ends. Swapped requests are
swapped in by the fixed order, one request per step, and never in a step that preempts.
If nothing else runs, the first of them fits: its sequences share the blocks that they
shared before, and `submit` counted the blocks shared with other requests as its own. A
sequence whose source is swapped out computes its tokens itself.

Modules: `queue` is the state of each sequence, `admission` and `preemption` decide
which requests enter and which lose their blocks, `token_budget` splits the tokens of a
step, and `step` combines them.
"""

from jpaged.scheduler.admission import can_admit
from jpaged.scheduler.preemption import Swaps
from jpaged.scheduler.queue import (
    BEFORE_ALL,
    EMPTY,
    FINISHED,
    NO_REQUEST,
    RETAINED,
    RUNNING,
    SWAPPED,
    WAITING,
    Attributes,
    Hits,
    Queue,
    UntilDecision,
    count_user_tokens,
    idle_rows,
    init_queue,
    is_new_request,
    known_user_tokens,
    release_windows,
    row_values,
    rows_before,
)
from jpaged.scheduler.step import StepPlan, schedule
from jpaged.scheduler.step import _map_sources as map_sources

__all__ = [
    "BEFORE_ALL",
    "EMPTY",
    "FINISHED",
    "NO_REQUEST",
    "RETAINED",
    "RUNNING",
    "SWAPPED",
    "WAITING",
    "Attributes",
    "Hits",
    "Queue",
    "StepPlan",
    "Swaps",
    "UntilDecision",
    "can_admit",
    "count_user_tokens",
    "idle_rows",
    "init_queue",
    "is_new_request",
    "known_user_tokens",
    "map_sources",
    "release_windows",
    "row_values",
    "rows_before",
    "schedule",
]
