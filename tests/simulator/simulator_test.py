"""The simulator runs the engine's own schedule, on a clock with exact time."""

import dataclasses
import fractions
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jpaged import engine, models
from jpaged.config import EngineConfig, Speculation
from jpaged.models import config as model_config
from jpaged.params import SamplingParams
from jpaged.simulator import loop
from jpaged.simulator.clock import VirtualTime
from jpaged.simulator.simulate import simulate, sweep
from jpaged.simulator.systems import synthetic_tokens
from jpaged.simulator.systems.engine_entries import make_engine_system
from jpaged.simulator.systems.engine_system import EngineSystem
from jpaged.simulator.systems.registry import SYSTEMS, find_system
from jpaged.simulator.workloads.workload import Workload

pytestmark = pytest.mark.long


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstantCost:
    """A cost model whose steps all take the same time."""

    seconds: jax.Array

    def __call__(self, load) -> jax.Array:
        del load
        return self.seconds


HALF = ConstantCost(jnp.float32(0.5))
SIZES = dict(
    num_blocks=24,
    block_size=4,
    max_num_seqs=6,
    max_model_len=64,
    max_num_batched_tokens=24,
    max_num_requests=32,
    max_num_stop_ids=1,
    num_recorded_steps=512,
)


def at_once(prompt_lens, output_lens, **more) -> Workload:
    return Workload(np.zeros(len(prompt_lens)), prompt_lens, output_lens, **more)


def random_workload(count: int, seed: int, **more) -> Workload:
    rng = np.random.default_rng(seed)
    return at_once(rng.integers(1, 30, count), rng.integers(1, 30, count), **more)


def run_to_end(system: EngineSystem, workload: Workload) -> loop.Simulation:
    trace = loop.trace(workload)
    return loop.run_steps(
        system, HALF, trace, loop.init_simulation(system, trace), 10_000
    )


def real_engine(config: EngineConfig, workload: Workload) -> engine.EngineState:
    """Run the engine with a model, on prompts that share no prefix."""
    model = models.init_model(
        model_config.ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=64,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            head_dim=8,
            intermediate_size=16,
            max_position_embeddings=64,
        ),
        seed=0,
    )
    state = engine.init(model, config)
    prompts = [
        [1 + index % 60, *np.random.default_rng(index).integers(1, 64, size - 1)]
        for index, size in enumerate(workload.prompt_lens)
    ]
    params = [
        SamplingParams(n=int(n), max_tokens=int(size), ignore_eos=True, temperature=1.0)
        for n, size in zip(workload.num_samples, workload.output_lens, strict=True)
    ]
    state, _ = engine.submit(state, prompts, params)
    return engine.run(model, state)


@functools.cache
def real_run_of_twenty_requests(config: EngineConfig) -> engine.EngineState:
    return real_engine(config, random_workload(20, seed=3))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"preemption": "swap", "num_swap_blocks": 16},
        {
            "policy": "shortest_job",
            "preemption_policy": "feedback",
            "preemption_parameters": (6.0, 12.0),
            "budget_policy": "fair_split",
            "enable_prefix_caching": True,
            "eviction_policy": "gdsf",
        },
        pytest.param({"max_prompt_chunk": 5, "watermark": 0.1}, marks=pytest.mark.slow),
    ],
    ids=["recompute", "swap", "policies", "chunks"],
)
def test_a_simulated_schedule_equals_the_engines_step_by_step(more):
    workload = random_workload(20, seed=3)
    config = EngineConfig(**SIZES, **more)
    real = real_run_of_twenty_requests(config)
    simulated = run_to_end(EngineSystem(config), workload).state.engine
    assert int(real.counters.num_preemptions) > 0  # the load is tight enough to matter
    for name in ("num_steps", "num_tokens", "num_preemptions", "num_swapped_blocks"):
        assert getattr(simulated.counters, name) == getattr(real.counters, name), name
    np.testing.assert_array_equal(simulated.timeline.steps, real.timeline.steps)


def test_samples_share_their_prompt_as_in_the_engine():
    workload = random_workload(
        10, seed=5, num_samples=np.array([1, 3, 2, 1, 2, 3, 1, 1, 2, 1])
    )
    config = EngineConfig(**SIZES)  # as above, so that no other engine is compiled
    real = real_engine(config, workload)
    kinds = ((1, 0), (2, 0), (3, 0))
    simulated = run_to_end(EngineSystem(config, kinds), workload).state.engine
    np.testing.assert_array_equal(simulated.timeline.steps, real.timeline.steps)
    assert np.any(np.asarray(real.timeline.steps)[:, 3] > 0)  # blocks were saved


def test_times_match_a_calculation_by_hand():
    # Steps take 0.5 s. The first request arrives at 1.25 at an idle system and gets its
    # tokens at 1.75, 2.25 and 2.75. The second arrives at 1.5, during the first step,
    # is admitted at 1.75 and gets its only token at 2.25. The third arrives at 10.
    workload = Workload(np.array([1.25, 1.5, 10.0]), [5, 6, 7], [3, 1, 2])
    outcome = simulate(EngineSystem(EngineConfig(**SIZES)), workload, HALF)
    np.testing.assert_array_equal(outcome.first_times, [1.75, 2.25, 10.5])
    np.testing.assert_array_equal(outcome.end_times, [2.75, 2.25, 11.0])
    np.testing.assert_allclose(outcome.normalized_latencies, [0.5, 0.75, 0.5])
    assert outcome.makespan == 9.75
    assert outcome.num_steps == 5


def test_means_count_steps_between_the_warm_up_and_the_last_arrival():
    # Arrivals at 0, 5 and 10; a step takes 0.5 s; each request runs for 4 steps. The
    # warm-up ends at 1.0 s (a tenth). Steps at 1.0 and 1.5 belong to the first request
    # and steps at 5.0 to 6.5 to the second. Steps at 10.0 or later do not count.
    workload = Workload(np.array([0.0, 5.0, 10.0]), [4, 4, 4], [4, 4, 4])
    outcome = simulate(EngineSystem(EngineConfig(**SIZES)), workload, HALF)
    assert outcome.totals.num_steps == 6
    assert outcome.mean("num_requests") == 1.0
    # Stored tokens: 6 and 7 of the first, then 4, 5, 6 and 7 of the second. They use
    # two blocks of 4, except for the step with 4 tokens.
    assert outcome.composition["token_states"] == pytest.approx(35 / (11 * 4))


@given(
    start=st.integers(0, 2**40),
    steps=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=20),
)
def test_the_clock_adds_up_microseconds_exactly(start, steps):
    micros = start % (2**30 * 10**6)
    clock = VirtualTime(*map(jnp.int32, divmod(micros, 10**6)))
    for seconds in steps:
        before = clock
        clock = clock.after(jnp.float32(seconds))
        micros += round(fractions.Fraction(seconds) * 10**6)
        assert not bool(clock.is_before(before))
    # Half a microsecond may be rounded to even; whole microseconds are exact.
    found = int(clock.seconds) * 10**6 + int(clock.micros)
    assert (
        abs(found - micros) <= len(steps) * 4
    )  # a float32 of 100 s is exact to 4 of them


def test_the_same_workload_gives_identical_results():
    workload, system = random_workload(12, seed=1), EngineSystem(EngineConfig(**SIZES))
    one, two = (simulate(system, workload, HALF).summary() for _ in range(2))
    assert one == two


@pytest.mark.parametrize("name", ["vllm", "orca_oracle"])
def test_a_sweep_equals_separate_simulations(name):
    workloads = [
        random_workload(count, seed) for count, seed in ((9, 0), (14, 1), (3, 2))
    ]
    costs = [ConstantCost(jnp.float32(seconds)) for seconds in (0.5, 0.25, 1.0)]
    sizes = {"block_size": 4, "max_model_len": 64} if name == "vllm" else {}
    system = find_system(name, workloads[0], 4096, max_num_seqs=8, **sizes)
    together = sweep(system, workloads, costs)
    for outcome, workload, cost in zip(together, workloads, costs, strict=True):
        alone = simulate(system, workload, cost)
        assert outcome.summary() == alone.summary()
        np.testing.assert_array_equal(outcome.end_times, alone.end_times)


def test_one_program_sweeps_scheduler_parameters():
    workload = random_workload(20, seed=3)
    numbers = [
        dict(policy_parameters=(0, 0, 1.0, 0, 0, 0)),
        dict(policy_parameters=(1.0, 0, -0.5, 0, 0, 0), max_num_seqs=3, watermark=0.3),
        dict(max_prompt_chunk=5, max_num_batched_tokens=16),
        dict(watermark=0.3),
        dict(watermark=0.0),
    ]
    none = dict(policy="weighted", policy_parameters=(0.0,) * 6)
    systems = [EngineSystem(EngineConfig(**SIZES | none | one)) for one in numbers]
    together = sweep(systems, workload, HALF)
    ends = [outcome.end_times.tolist() for outcome in together]
    assert len(set(map(tuple, ends))) == len(numbers)  # every setting changes the times
    # In separate programs the parameters are constants. The two have all of them.
    for index in (1, 2):
        alone = run_to_end(systems[index], workload)
        assert ends[index] == alone.end_times.as_seconds().tolist()
    by_length = EngineSystem(EngineConfig(**SIZES | {"policy": "shortest_prompt"}))
    alone = run_to_end(by_length, workload)
    assert ends[0] == alone.end_times.as_seconds().tolist()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EngineSystem(EngineConfig(**SIZES | {"num_blocks": 25})), "expected engines"),
        (find_system("orca_max", random_workload(3, 0), 4096), "expected engines"),
    ],
)
def test_a_sweep_of_systems_without_a_common_program_raises(other, message):
    system = EngineSystem(EngineConfig(**SIZES))
    with pytest.raises(ValueError, match=message):
        sweep([system, other], random_workload(3, 0), HALF)
    with pytest.raises(ValueError, match="expected the same baseline"):
        sweep(
            [find_system("orca_max", random_workload(3, 0), 4096), system],
            random_workload(3, 0),
            HALF,
        )
    with pytest.raises(ValueError, match=r"lists of \{\}"):
        sweep(system, random_workload(3, 0), HALF)


def test_requests_that_do_not_fit_into_the_table_wait_in_order():
    config = EngineConfig(**SIZES | {"max_num_requests": 6})
    few = simulate(EngineSystem(config), random_workload(20, seed=3), HALF)
    many = simulate(
        EngineSystem(EngineConfig(**SIZES)), random_workload(20, seed=3), HALF
    )
    np.testing.assert_array_equal(few.end_times, many.end_times)
    # Requests that wait outside the table are counted too.
    assert few.mean("num_waiting") == many.mean("num_waiting") > 1


def test_the_prefix_cache_finds_prompts_with_equal_contents():
    # One request after the other; the first two blocks of 4 prompt tokens are equal.
    workload = Workload(
        np.arange(5) * 100.0,
        [10] * 5,
        [2] * 5,
        contents=np.array([[7, 8]] * 4 + [[7, 9]]),
        content_size=4,
    )
    config = EngineConfig(**SIZES, enable_prefix_caching=True)
    system = EngineSystem(config, content_size=4)
    outcome = simulate(system, workload, HALF)
    assert outcome.counters["num_cached_tokens"] == 8 * 3 + 4
    assert outcome.summary()["prefix_hit_ratio"] == 28 / 50


def test_beams_end_together_and_share_blocks():
    workload = at_once([9, 9], [20, 12], beam_widths=np.array([3, 3]))
    system = make_engine_system(workload, 4096, block_size=4, max_num_seqs=8)
    outcome = simulate(system, workload, HALF, warmup=0.0)
    # A step for the prompt without its last token, and a step for each output token.
    np.testing.assert_array_equal(outcome.end_times, [10.5, 6.5])
    assert 0.3 < outcome.saved_share < 2 / 3


def test_the_memory_of_a_model_with_windows_is_divided_over_its_groups():
    workload = at_once([9, 90], [20, 12])
    windows = [None, 16, 16, 16, None, 16, 16]  # seven layers in four groups of two
    system = make_engine_system(
        workload,
        1024,
        block_size=4,
        max_num_seqs=8,
        layer_windows=windows,
        preemption="swap",
        num_swap_blocks=64,
    )
    assert system.config.group_windows == (None, 16, 16, 16)
    assert system.config.num_blocks == 1024 // 4 * 7 // 2
    assert system.config.num_swap_blocks == 64 * 7 // 2
    short = at_once([9], [5])  # no window is shorter than the longest request
    system = make_engine_system(short, 1024, max_num_seqs=8, layer_windows=windows)
    assert system.config.group_windows == (None,)


@pytest.mark.slow
def test_the_beam_concentration_changes_what_beams_share():
    workload = at_once([9] * 3, [40] * 3, beam_widths=np.array([4] * 3))
    shares = []
    for concentration in (0.5, 4.0):
        system = make_engine_system(workload, 4096, block_size=4, max_num_seqs=12)
        system = dataclasses.replace(system, beam_concentration=concentration)
        shares.append(simulate(system, workload, HALF, warmup=0.0).saved_share)
    assert shares[0] != shares[1]


@pytest.mark.slow
def test_every_system_finishes_a_workload():
    workload = random_workload(10, seed=0)
    for name in SYSTEMS:
        system = find_system(name, workload, 8192, max_num_seqs=8)
        outcome = simulate(system, workload, HALF)
        assert np.all(outcome.end_times >= outcome.first_times), name
        assert outcome.makespan >= 0.5 * np.max(workload.output_lens), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda: at_once([50], [30]), r"index 0 can never run.*max_model_len \(64\)"),
        (lambda: at_once([5], [5], num_samples=np.array([2])), r"kinds.*\(2, 0\)"),
        (lambda: at_once(np.zeros(0, int), np.zeros(0, int)), "at least one request"),
    ],
)
def test_a_workload_that_can_never_run_raises(change, words):
    with pytest.raises(ValueError, match=words):
        simulate(EngineSystem(EngineConfig(**SIZES)), change(), HALF)


def test_an_unknown_system_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"orca_max.*got 'orca'"):
        find_system("orca", random_workload(1, 0), 4096)


def test_speculation_raises():
    config = EngineConfig(**SIZES)
    with pytest.raises(ValueError, match=r"config\.speculation: expected None"):
        EngineSystem(dataclasses.replace(config, speculation=Speculation()))


def test_a_planted_fault_breaks_the_equality_with_the_engine(monkeypatch):
    # The fault: every row of a step gets a new token, also in the middle of a prompt.
    monkeypatch.setattr(
        synthetic_tokens,
        "computes_last_token",
        lambda state, scheduled: scheduled.plan.num_tokens > 0,
    )
    config = EngineConfig(**SIZES)
    real = real_run_of_twenty_requests(config)
    # Another concentration makes a new program; without beams it changes nothing else.
    system = EngineSystem(config, beam_concentration=2.5)
    simulated = run_to_end(system, random_workload(20, seed=3)).state.engine
    assert simulated.counters.num_steps != real.counters.num_steps
