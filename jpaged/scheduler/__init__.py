"""Scheduler: who runs in this step, and with how many tokens.

Place on the road: request table -> [scheduler] -> block manager.

A pure function of lengths, tables and the queue: it never sees a token, so the engine
and the simulator run the same one. Iteration-level scheduling with chunked prompts
(paper section 4.3): running rows decode one token each, what is left of the step's
budget goes to prompts, and requests are admitted while their prompts fit into the free
blocks. When blocks run out the latest requests give theirs back (paper section 4.5).
They are computed again later, from their prompt and what they had generated; or, with a
host's pool that has room, they are swapped: their blocks go there (`swap`), and nothing
is admitted until all of them are back.

A request's sequences (samples, beams) are admitted together and preempted together.
Those of a lockstep request, such as beams, also decode together: none computes its last
known token before all of them can. Samples need not: where a request has more of them
than fit even when nothing else runs, as many as fit run at a time.

Who is admitted first, the policy says (`policies`); who keeps memory, an order that
never changes: priority, arrival, and place for the sequences of a request.

Progress: memory and tokens are given to the running sequences in that order, so the
first of them, and in a lockstep request all of the first one's, is never preempted and
gets at least a token in each step. One that waits for a source waits for a row before
it. Where nothing runs, the policy's first request is admitted, for `submit` refuses
what does not fit into the whole pool alone. The first request in the fixed order that
is ever admitted so ends, then the next: every run ends. Swapped ones come back in the
fixed order, a request in a step, and never in a step that takes blocks back. Where
nothing else runs the first of them fits: its sequences share among themselves what they
shared before, and what they shared with others `submit` counted as their own. Who waits
for a source that is swapped computes for itself.

`queue` is what is known of each sequence, `admission` and `preemption` who comes and
who goes, `step` the whole.
"""

from jpaged.scheduler.admission import can_admit as can_admit
from jpaged.scheduler.preemption import Swaps as Swaps
from jpaged.scheduler.queue import BEFORE_ALL as BEFORE_ALL
from jpaged.scheduler.queue import EMPTY as EMPTY
from jpaged.scheduler.queue import FINISHED as FINISHED
from jpaged.scheduler.queue import NO_REQUEST as NO_REQUEST
from jpaged.scheduler.queue import RETAINED as RETAINED
from jpaged.scheduler.queue import RUNNING as RUNNING
from jpaged.scheduler.queue import SWAPPED as SWAPPED
from jpaged.scheduler.queue import WAITING as WAITING
from jpaged.scheduler.queue import Hits as Hits
from jpaged.scheduler.queue import Queue as Queue
from jpaged.scheduler.queue import init_queue as init_queue
from jpaged.scheduler.queue import is_new_request as is_new_request
from jpaged.scheduler.queue import row_values as row_values
from jpaged.scheduler.queue import rows_before as rows_before
from jpaged.scheduler.step import Plan as Plan
from jpaged.scheduler.step import schedule as schedule
