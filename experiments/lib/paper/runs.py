"""Runs: the simulations behind the paper's figures.

Pipeline: flags -> case -> [runs] -> rows and drawings of figures.

A `PaperCase` is a system on a model's machine with one kind of requests. `run_case`
simulates it at each rate and seed with `jpaged.simulator`.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jpaged import compilation_cache
from jpaged.simulator.costs.adjusted import SeparatePrompts
from jpaged.simulator.costs.base import Machine
from jpaged.simulator.costs.load import CostModel
from jpaged.simulator.costs.registry import find_cost_model
from jpaged.simulator.costs.roofline import VLLM_2023_STEP_S, Roofline
from jpaged.simulator.costs.served_models import paper_setting
from jpaged.simulator.simulate import Outcome, simulate
from jpaged.simulator.systems.base import System
from jpaged.simulator.systems.registry import SYSTEMS, find_system
from jpaged.simulator.workloads import traces
from jpaged.simulator.workloads.lengths import PREFIX_TOKENS, Lengths
from jpaged.simulator.workloads.workload import Workload, chat_rounds, paper_trace

ENGINES = tuple(name for name, entry in SYSTEMS.items() if entry.is_engine)
WARMUP = 0.1  # share of a run that means over time leave out
MAX_EXTRA_RATES = 6  # below the authors' rates, and also above
CHAT = "chat"
# Batch rows of the engine and running sequences of a baseline: more than ever run.
# Smaller where memory holds few, so that smaller programs are compiled.
_MAX_NUM_SEQS = {"sharegpt": 64, CHAT: 64}
_MOST_NUM_SEQS = 256


@dataclasses.dataclass(frozen=True)
class CostChoice:
    """The cost model of all systems.

    Attributes:
      step_fit: JSON file of an engine's measured steps (`step_fits.read_step_fit`, of
        its "vllm"); None: a roofline.
      decoding: factor of the measured decoding steps, without their host time, for
        other chips than the measured ones.
      is_separate: a step with prompts and decoding rows takes as long as two steps, as
        in the code that made the paper's figures. Otherwise a step has both, as in
        section 4.3 of the paper.
    """

    step_fit: str | None = None
    decoding: float = 1.0
    is_separate: bool = True


PAPER_COST = CostChoice()


@dataclasses.dataclass(frozen=True)
class PaperCase:
    """A system, a model and a kind of requests, simulated at some rates and seeds.

    Attributes:
      system: a name of `registry.SYSTEMS`.
      model: a name of `served_models.PAPER_SETTINGS`, with its chips and memory.
      requests: "sharegpt", "alpaca", "wmt16-1shot", "wmt16-5shot" or "chat".
      rates: requests per second.
      duration: seconds of arrivals.
      seeds: of arrivals, lengths and their order.
      num_samples, beam_width: of each request; a width of 0 is sampling.
      block_size, preemption: of the engine.
      lengths_file: CSV file of the lengths; None: the built-in ones.
      levels: normalised latencies (least, most) that the curve must cross. Further
        rates are simulated until it does, each 1.25 times the previous one.
      cost: the cost model, the same for all systems.
    """

    system: str
    model: str
    requests: str
    rates: tuple[float, ...]
    duration: float
    seeds: tuple[int, ...]
    num_samples: int = 1
    beam_width: int = 0
    block_size: int = 16
    preemption: str = "recompute"
    lengths_file: str | None = None
    levels: tuple[float, float] | None = None
    cost: CostChoice = PAPER_COST


@dataclasses.dataclass(frozen=True)
class PaperRun:
    """The result of one simulation; fields as in `Outcome.summary`."""

    system: str
    model: str
    requests: str
    num_samples: int
    beam_width: int
    block_size: int
    preemption: str
    rate: float
    seed: int
    duration_s: float
    num_requests: int
    num_skipped: int
    normalized_latency_s: float
    mean_batched_requests: float
    mean_waiting_requests: float
    token_states: float
    reservation: float
    internal: float
    external: float
    saved_share: float
    num_preemptions: int
    makespan_s: float


def max_running_seqs(case: PaperCase) -> int:
    """Return the most running sequences of a case."""
    most = _MAX_NUM_SEQS.get(case.requests, _MOST_NUM_SEQS)
    if case.model == "opt-175b":  # its memory holds four times as many
        most *= 4 if most < _MOST_NUM_SEQS else 2
    if max(case.num_samples, case.beam_width) > 1:
        most = max(most, _MOST_NUM_SEQS)
    return most


@functools.lru_cache(maxsize=4)
def _lengths_of(path: str) -> Lengths:
    # Alpaca has empty answers, which no system can serve; they are counted.
    return traces.read_lengths(path, skip_empty=True)


def workload_of(case: PaperCase, rate: float, seed: int) -> Workload:
    """Return the requests of one run."""
    is_chat = case.requests == CHAT
    lengths: Lengths | str = "sharegpt" if is_chat else case.requests
    if case.lengths_file is not None:
        lengths = _lengths_of(case.lengths_file)
    if is_chat:
        return chat_rounds(lengths, rate, case.duration, seed)
    workload = paper_trace(lengths, rate, case.duration, seed)
    if case.requests in PREFIX_TOKENS and case.system in ENGINES:
        workload = workload.with_shared_prefix(PREFIX_TOKENS[case.requests])
    if case.beam_width:
        return workload.with_beams(case.beam_width)
    return workload.with_samples(case.num_samples)


def system_of(case: PaperCase, workload: Workload) -> System:
    """Return the system of a case, with shapes that all its runs share."""
    slots = paper_setting(case.model).kv_slots
    sizes = {"max_num_seqs": max_running_seqs(case)}
    if case.system not in ENGINES:
        return find_system(case.system, workload, slots, **sizes)
    longest = int(np.max(workload.prompt_lens + workload.output_lens))
    sizes |= {
        "block_size": case.block_size,
        "max_model_len": 1024 if longest <= 1024 else 2048,
        "enable_prefix_caching": workload.contents is not None,
        "preemption": case.preemption,
    }
    if case.preemption == "swap":
        sizes["num_swap_blocks"] = slots // case.block_size
    return find_system(case.system, workload, slots, **sizes)


def roofline_of(model: str) -> Roofline:
    """Return the roofline of a model on the paper's machine."""
    setting = paper_setting(model)
    return Roofline.of(*setting.sizes(), setting.num_chips, step_s=VLLM_2023_STEP_S)


def cost_model_of(model: str, cost: CostChoice) -> CostModel:
    """Return the cost model of all systems on the paper's machine for a model.

    Raises:
      FileNotFoundError: the file of step fits does not exist.
      ValueError: the file has no step fits, or not of the model on as many chips.
    """
    setting = paper_setting(model)
    machine = Machine(*setting.sizes(), setting.num_chips)
    if cost.step_fit is None:
        cost_model = find_cost_model("roofline", machine)
    else:
        cost_model = find_cost_model(
            "step_fit",
            machine,
            step_fit=cost.step_fit,
            decoding_factor=cost.decoding,
        )
    return SeparatePrompts(cost_model) if cost.is_separate else cost_model


def simulate_one(case: PaperCase, rate: float, seed: int) -> PaperRun:
    """Run one simulation.

    Raises:
      ValueError: no request arrives, or the system cannot serve a request.
      RuntimeError: waiting requests are never served.
    """
    workload = workload_of(case, rate, seed)
    if not len(workload):
        raise ValueError(
            f"scale: expected a duration in which requests arrive, got {case.duration} "
            f"s at {rate} requests a second; raise --scale"
        )
    system = system_of(case, workload)
    cost_model = cost_model_of(case.model, case.cost)
    outcome = simulate(system, workload, cost_model, warmup=WARMUP)
    return _run_of(case, rate, seed, outcome)


def _run_of(case: PaperCase, rate: float, seed: int, outcome: Outcome) -> PaperRun:
    found = outcome.summary()
    names = {field.name for field in dataclasses.fields(PaperRun)}
    shared = {name: value for name, value in vars(case).items() if name in names}
    return PaperRun(
        **shared,
        **{name: value for name, value in found.items() if name in names},
        **found["kv_composition"],
        rate=rate,
        seed=seed,
        duration_s=case.duration,
        saved_share=found["kv_saved_share"],
    )


def run_case(case: PaperCase) -> list[PaperRun]:
    """Simulate a case at its rates, and at the rates that its levels require."""
    found = [
        simulate_one(case, rate, seed) for rate in case.rates for seed in case.seeds
    ]
    if case.levels is None:
        return found
    least, most = case.levels
    rate, latency = max(case.rates), -1.0
    for _ in range(MAX_EXTRA_RATES):
        latency = min(one.normalized_latency_s for one in found if one.rate == rate)
        if latency > most:
            break
        rate = float(f"{rate * 1.25:.4g}")
        found += [simulate_one(case, rate, seed) for seed in case.seeds]
    rate = min(case.rates)
    for _ in range(MAX_EXTRA_RATES):
        latency = max(one.normalized_latency_s for one in found if one.rate == rate)
        if latency <= least:
            break
        rate = float(f"{rate / 1.25:.4g}")
        if rate * case.duration < 20:  # too few requests for a meaningful latency
            break
        found += [simulate_one(case, rate, seed) for seed in case.seeds]
    return sorted(found, key=lambda one: (one.rate, one.seed))


def _run_and_forget(case: PaperCase) -> list[PaperRun]:
    """Run a case and drop its programs, as few other cases have the same shapes."""
    found = run_case(case)
    jax.clear_caches()
    return found


def run_cases(
    cases: Sequence[PaperCase],
    jobs: int = 1,
    on_done: Callable[[PaperCase], None] | None = None,
) -> dict[PaperCase, list[PaperRun]]:
    """Run cases in `jobs` processes; results do not depend on the number of processes.

    Args:
      cases: the cases; repeated ones are simulated once.
      jobs: number of processes; 1: this process.
      on_done: called with each case that has ended.
    """
    cases = list(dict.fromkeys(cases))
    found: dict[PaperCase, list[PaperRun]] = {}
    for case, runs in _each(cases, jobs):
        found[case] = runs
        if on_done is not None:
            on_done(case)
    return {case: found[case] for case in cases}


def _each(
    cases: Sequence[PaperCase], jobs: int
) -> Iterator[tuple[PaperCase, list[PaperRun]]]:
    if jobs == 1 or len(cases) < 2:
        for case in cases:
            yield case, run_case(case)
        return
    # Spawned, as a fork would copy jax's threads in an undefined state.
    context = multiprocessing.get_context("spawn")
    # The longest cases first: those of the engine.
    order = sorted(cases, key=lambda case: case.system not in ENGINES)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=compilation_cache.turn_on
    ) as pool:
        futures = {pool.submit(_run_and_forget, case): case for case in order}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
