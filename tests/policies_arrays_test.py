"""Built-in policies on random arrays, compared with plain Python."""

import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import policies
from jpaged.config import EngineConfig
from jpaged.policies import NO_DEADLINE, Requests, Rows
from tests.support.paths import ROOT

NUMBER = 9
QUANTA = (4.0, 9.0)


def random_requests(rng, parameters=()):
    def ints(low, high):
        values = [rng.randint(low, high) for _ in range(NUMBER)]
        return jnp.array(values, jnp.int32)

    prompts = ints(1, 20)
    return Requests(
        arrivals=jnp.array(rng.sample(range(50), NUMBER), jnp.int32),
        priorities=ints(-2, 2),
        prompt_lens=prompts,
        num_tokens=prompts + ints(0, 12),
        cached_lens=ints(0, 5),
        num_preemptions=ints(0, 2),
        leaders=jnp.arange(NUMBER, dtype=jnp.int32),
        is_waiting=ints(0, 1) == 1,
        is_running=ints(0, 1) == 1,
        max_tokens=ints(1, 30),
        ages=ints(0, 5000),
        times_left=jnp.where(ints(0, 2) == 0, NO_DEADLINE, ints(-50, 50)),
        users=ints(-1, 2),
        user_tokens=ints(0, 30),
        parameters=jnp.array(parameters, jnp.float32),
    )


def level(requests, i):
    generated = int(requests.num_tokens[i] - requests.prompt_lens[i])
    return sum(generated >= quantum for quantum in QUANTA)


def fair_share(requests, i):
    """The user's tokens, and the costs of its earlier waiting requests."""
    before = [
        int(requests.prompt_lens[j] + requests.max_tokens[j])
        for j in range(NUMBER)
        if requests.users[j] == requests.users[i]
        and requests.arrivals[j] < requests.arrivals[i]
        and requests.is_waiting[j]
    ]
    return int(requests.user_tokens[i]) + sum(before)


def left(requests, i):
    generated = int(requests.num_tokens[i] - requests.prompt_lens[i])
    return int(requests.max_tokens[i]) - generated


def yields(requests, i):
    best = min(
        [level(requests, j) for j in range(NUMBER) if requests.is_waiting[j]],
        default=math.inf,
    )
    own = level(requests, i)
    return math.inf if own > best else own


EXPECTED = {
    ("policy", "shortest_job"): left,
    ("policy", "earliest_deadline"): lambda r, i: int(r.times_left[i]),
    ("policy", "feedback"): level,
    ("policy", "fair_share"): fair_share,
    ("preemption_policy", "longest_job"): left,
    ("preemption_policy", "latest_deadline"): lambda r, i: int(r.times_left[i]),
    ("preemption_policy", "least_computed"): lambda r, i: -int(r.num_tokens[i]),
    ("preemption_policy", "largest_share"): lambda r, i: int(r.user_tokens[i]),
    ("preemption_policy", "feedback"): yields,
}


@pytest.mark.parametrize(("argument", "name"), EXPECTED)
def test_scores_are_those_of_python(argument, name):
    kind = next(kind for kind in policies.KINDS if kind.argument == argument)
    for seed in range(5):
        rng = random.Random(seed)
        requests = random_requests(rng, QUANTA if name == "feedback" else ())
        expected = [EXPECTED[argument, name](requests, i) for i in range(NUMBER)]
        assert policies.find(kind, name)(requests).tolist() == expected


# The token budget.


def one_by_one(keys, wanted, budget):
    """Rows in the order of keys get all they want while there is some."""
    found = [0] * len(wanted)
    for i in sorted(range(len(wanted)), key=lambda i: keys[i]):
        found[i] = max(min(wanted[i], budget), 0)
        budget -= found[i]
    return found


def round_robin(ranks, wanted, budget):
    """One token for each in turn."""
    found = [0] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda i: ranks[i])
    while budget > 0 and found != wanted:
        for i in order:
            if budget > 0 and found[i] < wanted[i]:
                found[i] += 1
                budget -= 1
    return found


def slow_split(name, remaining, ranks, budget, times, share):
    decodes = [int(n == 1) for n in remaining]
    prompts = [0 if n == 1 else n for n in remaining]
    most = budget - sum(decodes)
    if name == "prefill_first":
        found = one_by_one(ranks, prompts, budget)
        decodes = one_by_one(ranks, decodes, budget - sum(found))
    elif name == "fair_split":
        found = round_robin(ranks, prompts, most)
    elif name == "deadline_first":
        pairs = list(zip(times, ranks, strict=True))
        found = one_by_one(pairs, prompts, most)
    else:
        if name == "chunked" and any(decodes):
            most = min(most, math.ceil(np.float32(budget) * np.float32(share)))
        found = one_by_one(ranks, prompts, most)
    return [a + b for a, b in zip(decodes, found, strict=True)]


@pytest.mark.parametrize("name", policies.BUDGET.policies)
def test_the_budget_is_split_as_in_python(name):
    policy = jax.jit(policies.find(policies.BUDGET, name))
    for seed in range(30):
        rng = random.Random(seed)
        remaining = [rng.choice([0, 1, 1, rng.randint(2, 25)]) for _ in range(NUMBER)]
        ranks, budget = rng.sample(range(NUMBER), NUMBER), rng.randint(NUMBER, 60)
        requests = random_requests(rng)
        parameters = (0.4,) if name == "chunked" else ()
        rows = Rows(
            remaining=jnp.array(remaining, jnp.int32),
            is_decode=jnp.array(remaining) == 1,
            ranks=jnp.array(ranks, jnp.int32),
            budget=jnp.int32(budget),
            requests=requests,
            parameters=jnp.array(parameters, jnp.float32),
        )
        times = requests.times_left.tolist()
        expected = slow_split(name, remaining, ranks, budget, times, 0.4)
        assert policy(rows).tolist() == expected, (seed, remaining, ranks, budget)


# What is refused, with the example that shows it.


def divides(blocks):
    return blocks.last_used / blocks.depths * 0


def branches(requests):
    return requests.arrivals if requests.arrivals[0] > 0 else -requests.arrivals


def raises(rows):
    raise RuntimeError("no idea")


REFUSED = [
    ("preemption_policy", "lifo", "expected one of ('latest', 'least_computed'"),
    ("preemption_policy", branches, "that jax.jit can trace, got Tracer"),
    ("eviction_policy", "mru", "expected one of ('lru', 'fifo', 'lfu', 'gdsf')"),
    ("eviction_policy", divides, "got NaN among"),
    ("eviction_policy", lambda b: b.now, "for each block, of shape (8,)"),
    ("budget_policy", lambda r: r.remaining / 2, "an integer for each row"),
    ("budget_policy", raises, "got RuntimeError (no idea) for the example"),
    ("budget_policy", lambda r: "all", "an integer for each row"),
    ("policy", lambda r: r.deadlines, "got AttributeError"),
]


@pytest.mark.parametrize(("argument", "policy", "message"), REFUSED)
def test_a_bad_policy_is_refused_with_the_example(argument, policy, message):
    with pytest.raises(ValueError, match=f"{argument}: expected") as error:
        EngineConfig(8, enable_prefix_caching=True, **{argument: policy})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(preemption_policy="feedback", preemption_parameters=(float("nan"),)),
        dict(budget_parameters=(0.5,)),
        dict(eviction_policy="gdsf", eviction_parameters=(1.0, 2.0)),
        dict(preemption_parameters=[1.0]),
    ],
)
def test_wrong_parameters_are_refused(fields):
    with pytest.raises(ValueError, match="_parameters: expected"):
        EngineConfig(8, enable_prefix_caching=True, **fields)


def test_an_eviction_policy_needs_a_prefix_cache():
    with pytest.raises(ValueError, match="eviction_policy: expected 'lru'"):
        EngineConfig(8, eviction_policy="lfu")


def test_only_what_policies_read_is_in_the_request_table():
    default = EngineConfig(8)
    assert not default.has_attributes
    assert default.scheduler_params.budget is None
    by_level = EngineConfig(8, policy="feedback", preemption_policy="feedback")
    assert not by_level.has_attributes
    for fields in (
        dict(policy="shortest_job"),
        dict(preemption_policy="largest_share"),
        dict(budget_policy="deadline_first"),
    ):
        config = EngineConfig(8, **fields)
        assert config.has_attributes
        assert config.reads_clock == ("deadline_first" in fields.values())


def test_the_guide_writes_a_feedback_queue_in_at_most_25_lines():
    guide = (ROOT / "docs" / "policies.md").read_text("utf-8")
    section = guide[guide.index("## A multi-level feedback queue") :]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    lines = [line for line in code.splitlines() if line.strip()]
    assert "YIELD" in code
    assert "policy=level" in code
    assert len(lines) <= 25
