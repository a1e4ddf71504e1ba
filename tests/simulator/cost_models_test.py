"""Chips, sizes, roofline and step fits match arithmetic in plain Python."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jpaged.simulator.costs.adjusted import SeparatePrompts, scale
from jpaged.simulator.costs.base import Machine
from jpaged.simulator.costs.chips import CHIPS, find_chip
from jpaged.simulator.costs.registry import COST_MODELS, find_cost_model
from jpaged.simulator.costs.roofline import VLLM_2023_STEP_S, Roofline
from jpaged.simulator.costs.served_models import (
    PAPER_SETTINGS,
    kv_slots,
    paper_setting,
    served_model,
)
from jpaged.simulator.costs.step_fits import read_step_fit
from jpaged.simulator.costs.transfers import Transfers
from tests.models.shapes_test import PUBLISHED
from tests.support.step_loads import shared_profile, step_load

OPT = served_model("opt-13b")
A100 = find_chip("a100-40g")
PLAIN = Roofline.of(OPT, A100)
JITTED = jax.jit(lambda model, load: model(load))


def test_chips_are_found_by_name_in_any_case():
    assert find_chip("A100_40G") is CHIPS["a100-40g"]
    assert find_chip("h100").memory_bytes_per_s == 3.35e12
    with pytest.raises(ValueError, match=r"gpu: .*a100-40g, .*tpu7x, got 'b300'"):
        find_chip("b300")


def test_every_chip_has_sources_and_shares_of_at_most_one():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.efficiency.source
        for field in dataclasses.fields(chip.efficiency):
            if field.name.endswith("_share"):
                assert 0 < getattr(chip.efficiency, field.name) <= 1, (
                    chip.name,
                    field.name,
                )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_served_model_has_the_published_number_of_parameters(name):
    assert served_model(name).num_params == PUBLISHED[name]


def test_the_sizes_of_opt_13b_match_the_paper():
    assert OPT.kv_bytes_per_token == 800 * 1024  # 2 x 5120 x 40 x 2
    assert OPT.param_bytes / 1e9 == pytest.approx(26, rel=0.02)
    assert OPT.flops_per_token == pytest.approx(2 * 12.59e9, rel=1e-3)
    assert OPT.flops_per_pair == 4 * 40 * 128 * 40
    # A byte per number, and a float32 scale for each head of a token.
    quantised = served_model("opt-13b", kv_dtype="int8")
    assert quantised.kv_bytes_per_token == 2 * 40 * 40 * (128 + 4)


def test_only_config_json_of_a_folder_is_read(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 12,
        "vocab_size": 20,
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = served_model(tmp_path)
    # Attention 8 x (8 + 4 + 4) + 8 x 8, MLP 3 x 8 x 12, two norms of 8.
    assert model.layer_params == 3 * (128 + 64 + 288 + 16)
    assert model.num_params == model.layer_params + 2 * 20 * 8 + 8
    assert model.kv_bytes_per_token == 2 * 3 * 4 * 4
    with pytest.raises(
        FileNotFoundError, match="model: expected a folder or GGUF file"
    ):
        served_model(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="opt-13b"):
        served_model("opt-14b")


def test_the_kv_slots_of_the_paper_follow_from_its_table():
    assert paper_setting("OPT-13B").kv_slots == 12 * 2**30 // OPT.kv_bytes_per_token
    large, _ = PAPER_SETTINGS["opt-175b"].sizes()
    assert PAPER_SETTINGS["opt-175b"].kv_slots == 264 * 2**30 // (
        large.kv_bytes_per_token
    )
    for setting in PAPER_SETTINGS.values():
        model, chip = setting.sizes()
        here = kv_slots(model, chip, setting.num_chips)
        assert here == pytest.approx(setting.kv_slots, rel=0.06), setting.model
    with pytest.raises(ValueError, match="expected one of the paper's, opt-13b"):
        paper_setting("gpt2")


def test_kv_slots_are_whole_blocks_of_the_free_memory():
    free = 0.9 * 40 * 2**30 - OPT.param_bytes
    assert kv_slots(OPT, A100) == int(free // (16 * 800 * 1024)) * 16
    one = kv_slots(OPT, A100, block_size=1, reserved_bytes=2**30)
    assert one == int((free - 2**30) // (800 * 1024))
    # Eight key heads on sixteen chips: each chip holds a whole head.
    small = served_model("llama-3-8b")
    share = small.kv_bytes_per_token / 8
    free = 0.9 * 40 * 2**30 - small.param_bytes / 16
    assert kv_slots(small, A100, 16, block_size=1) == int(free // share)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory_fraction": 0.0}, "memory_fraction: expected more than 0"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"num_chips": 0}, "num_chips: expected at least 1"),
        ({"reserved_bytes": 2**40}, "use more chips"),
    ],
)
def test_invalid_arguments_of_kv_slots_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        kv_slots(OPT, A100, **arguments)


def by_hand(model, chip, num_chips, rows, num_logits):
    """Return the seconds of a step, in plain Python, one query at a time."""
    efficiency, layers = chip.efficiency, model.num_layers
    reads = num_chips * chip.memory_bytes_per_s
    flops = num_chips * chip.flops_per_s
    tokens = sum(query for query, _ in rows)
    weights = model.layer_params * 2
    compute = 2 * model.layer_params * tokens
    if model.num_experts:
        left = 1 - model.num_experts_per_token / model.num_experts
        weights += model.expert_params * 2 * (1 - left**tokens)
        compute += 2 * model.expert_params * (1 - left) * tokens
    head = 2 * model.head_params if num_logits else 0
    between = tokens * model.activation_bytes_per_token
    total = max(
        weights / reads / efficiency.read_share,
        compute / flops / efficiency.matmul_share,
    )
    total += max(
        head / reads / efficiency.read_share,
        head * num_logits / flops / efficiency.matmul_share,
    )
    total += between / reads / efficiency.read_share
    slides = model.num_sliding_layers
    for query, context in rows:
        for count, window in (
            (layers - slides, 10**9),
            (slides, model.sliding_window or 10**9),
        ):
            pairs = sum(min(context - j, window) for j in range(query))
            read = min(context, window + query - 1) * model.kv_bytes_per_token
            work = pairs * 4 * model.num_heads * model.head_dim * layers
            slower = max(
                read / reads / efficiency.attention_read_share,
                work / flops / efficiency.attention_matmul_share,
            )
            total += slower * count / layers
    total += layers * efficiency.layer_s
    if num_chips > 1:
        sent = 2 * (num_chips - 1) / num_chips * tokens * model.hidden_size * 2
        each = efficiency.all_reduce_s + sent / (
            chip.link_bytes_per_s * efficiency.link_share
        )
        total += 2 * layers * each
    return total


@pytest.mark.parametrize(
    ("name", "chip", "num_chips"),
    [
        ("opt-13b", "a100-40g", 1),
        ("opt-66b", "a100-40g", 4),
        ("llama-3-70b", "tpu-v6e", 8),
        ("mixtral-8x7b", "h100", 2),  # experts
        ("mistral-7b", "l4", 1),  # every layer slides
        ("gpt-oss-20b", "h200", 1),  # experts, and every other layer slides
    ],
)
@pytest.mark.parametrize(
    "rows", [[(1, 1)], [(1, 300)] * 7, [(512, 512), (1, 6000)], [(700, 4500), (9, 9)]]
)
def test_the_roofline_matches_plain_arithmetic(name, chip, num_chips, rows):
    model, chip = served_model(name), find_chip(chip)
    roofline = Roofline.of(model, chip, num_chips)
    load = step_load(*rows, num_logits=1)
    expected = by_hand(model, chip, num_chips, rows, 1)
    assert float(JITTED(roofline, load)) == pytest.approx(expected, rel=1e-4)
    assert float(roofline(load)) == pytest.approx(expected, rel=1e-4)


def test_a_decoded_token_of_opt_13b_takes_the_time_of_reading_its_weights():
    # 25.7 GB at 77 % of 1,555 GB/s: 21.5 ms; launches of 40 layers: 1.9 ms.
    seconds = float(PLAIN(step_load((1, 1))))
    assert seconds == pytest.approx(25.7e9 / (0.77 * 1555e9) + 40 * 48e-6, rel=0.005)


def test_an_idle_step_takes_no_time_and_swapping_computes_no_layers():
    engine = Roofline.of(OPT, A100, step_s=0.005)
    assert float(engine(step_load())) == 0
    # Contexts of rows that are not in the step do not count.
    assert float(engine(step_load((0, 900), num_logits=0))) == 0
    swapped = float(engine(step_load(swapped=16, pieces=1)))
    expected = 0.005 + 16 * 819200 / 32e9 + 80 * 6e-6
    assert swapped == pytest.approx(expected, rel=1e-5)


def test_small_pieces_swap_slowly_and_copies_read_and_write():
    moves = Transfers.of(OPT, A100)
    engine = dataclasses.replace(PLAIN, transfers=moves)
    small, large = (
        float(engine(step_load(swapped=1024, pieces=1024 // block)))
        for block in (1, 64)
    )
    # 26 ms for the bytes, and 80 copies of 6 us per piece: 492 ms and 8 ms.
    assert small == pytest.approx(0.0262 + 0.4915, rel=0.01)
    assert large == pytest.approx(0.0262 + 0.0077, rel=0.01)
    copied = float(engine(step_load(copied=1000)))
    assert copied == pytest.approx(2 * 1000 * 819200 / (0.77 * 1555e9), rel=1e-4)
    whole = Transfers.of(OPT, A100, copies_per_piece=1)
    assert whole.piece_s == A100.host_copy_s
    with pytest.raises(ValueError, match="copies_per_piece: expected at least 1"):
        Transfers.of(OPT, A100, copies_per_piece=0)


rows_of = st.lists(
    st.integers(1, 600).flatmap(
        lambda query: st.tuples(st.just(query), st.integers(query, query + 3000))
    ),
    max_size=6,
)


@settings(max_examples=60)
@given(
    rows=rows_of,
    more=rows_of.filter(bool),
    numbers=st.tuples(*[st.integers(0, 99)] * 4),
)
@pytest.mark.parametrize("name", ["opt-13b", "gpt-oss-20b"])
def test_more_work_never_takes_less_time(name, rows, more, numbers):
    roofline = Roofline.of(served_model(name), A100, step_s=0.001)
    load = step_load(*rows, size=14)
    before = float(JITTED(roofline, load)) * (1 - 1e-5)
    assert before >= 0
    assert float(JITTED(roofline, step_load(*rows, *more, size=14))) >= before
    longer = [(query, context + 1) for query, context in rows]
    assert float(JITTED(roofline, step_load(*longer, size=14))) >= before
    wider = [(query + 1, context + 1) for query, context in rows]
    assert float(JITTED(roofline, step_load(*wider, size=14))) >= before
    names = ("num_logits", "num_copied_tokens", "num_swapped_tokens", "num_swap_copies")
    for field, number in zip(names, numbers, strict=True):
        value = getattr(load, field) + jnp.int32(number)
        changed = dataclasses.replace(load, **{field: value})
        assert float(JITTED(roofline, changed)) >= before


def test_vmap_works_over_a_leaf_and_over_loads():
    load = step_load((1, 300))
    speeds = jnp.array([1e12, 2e12, 4e12])

    def at(speed):
        return dataclasses.replace(PLAIN, memory_bytes_per_s=speed)(load)

    swept = jax.vmap(at)(speeds)
    np.testing.assert_allclose(swept, [float(at(speed)) for speed in speeds], rtol=1e-6)
    assert swept[0] > swept[1] > swept[2]
    loads = jax.tree.map(lambda *leaves: jnp.stack(leaves), load, step_load((9, 9)))
    each = [float(PLAIN(load)), float(PLAIN(step_load((9, 9))))]
    np.testing.assert_allclose(jax.vmap(PLAIN)(loads), each, rtol=1e-6)


def test_a_roofline_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_chips: expected a divisor of opt-13b's"):
        Roofline.of(OPT, A100, 3)
    with pytest.raises(ValueError, match="step_s: expected at least 0"):
        Roofline.of(OPT, A100, step_s=-1.0)


def test_a_scaled_model_multiplies_the_seconds():
    load = step_load((5, 50))
    twice = JITTED(scale(PLAIN, 2.0), load)
    assert float(twice) == pytest.approx(2 * float(PLAIN(load)), rel=1e-6)
    with pytest.raises(ValueError, match="factor: expected a finite number"):
        scale(PLAIN, 0.0)


FITS = {
    "vllm": {
        "opt": {
            "1": {
                "prefill": [20.0, 0.1, 1e-5],
                "decoding_smallbs": [24.0, 1e-3, 0.5],
                "decoding_largebs": [15.0, 2e-3, 0.6],
                "decoding_large_small_bs_threshold": 3,
            }
        }
    }
}


@pytest.fixture
def fits(tmp_path):
    path = tmp_path / "fits.json"
    path.write_text(json.dumps(FITS))
    return path


def read(path, **more):
    return read_step_fit(path, model="opt", transfers=Transfers.none(), **more)


@pytest.mark.parametrize(
    ("rows", "expected_ms"),
    [
        ([(1, 10), (1, 20)], 24 + 30e-3 + 1.0),
        ([(1, 10), (1, 20), (1, 30)], 15 + 120e-3 + 1.8),  # the threshold is 3 rows
        ([(100, 100), (50, 50)], 20 + 15 + 12500e-5),
        ([(40, 100)], 20 + 4 + (100**2 - 60**2) * 1e-5),  # the end of a prompt
        ([(100, 100), (1, 10)], 24 + 10 + 0.1 + 10e-3 + 0.5),  # the larger base counts
        ([], 0),
    ],
)
def test_a_step_fit_matches_the_published_formula(fits, rows, expected_ms):
    assert float(JITTED(read(fits), step_load(*rows))) * 1e3 == pytest.approx(
        expected_ms, rel=1e-5
    )


def test_the_phases_of_a_step_fit_have_separate_factors(fits):
    fit = read(fits)
    scaled = fit.scaled(decoding=2.0)
    decoding, prompt = step_load((1, 10)), step_load((9, 9))
    assert float(scaled(decoding)) == pytest.approx(2 * float(fit(decoding)))
    assert float(scaled(prompt)) == pytest.approx(float(fit(prompt)))
    with pytest.raises(ValueError, match="prompts: expected more than 0"):
        fit.scaled(prompts=-1.0)


def test_the_host_time_of_a_decoding_step_is_not_scaled(fits):
    scaled = read(fits).scaled(decoding=2.0, host_s=4e-3)
    for rows, ms in (([(1, 10)], 24 + 10e-3 + 0.5), ([(1, 10)] * 3, 15 + 60e-3 + 1.8)):
        assert float(scaled(step_load(*rows))) * 1e3 == pytest.approx(2 * ms - 4)
    with pytest.raises(ValueError, match=r"host_s: expected from 0 to 0\.015, got"):
        read(fits).scaled(host_s=0.016)


MOVES = ("num_copied_tokens", "num_swapped_tokens", "num_swap_copies")


@pytest.mark.parametrize("kind", ["fit", "roofline"])
def test_separate_prompts_take_as_long_as_two_steps(kind, fits):
    model = Roofline.of(OPT, find_chip("a100-80g"), step_s=2e-3)
    if kind == "fit":
        model = read_step_fit(fits, model="opt", transfers=model.transfers)
    separate = SeparatePrompts(model)
    prompts, decodes = [(100, 300), (2, 2)], [(1, 10), (1, 20)]
    moved = dict.fromkeys(MOVES, jnp.int32(7))

    def load(*rows, logits, **moves):
        moves = {name: moves.get(name, jnp.int32(0)) for name in MOVES}
        return dataclasses.replace(
            step_load(*rows), num_logits=jnp.int32(logits), **moves
        )

    both = load(*prompts, *decodes, logits=3, **moved)
    two = float(model(load(*prompts, logits=1)))
    two += float(model(load(*decodes, logits=2, **moved)))
    assert float(separate(both)) == pytest.approx(two, rel=1e-6)
    assert float(separate(both)) > 1.2 * float(model(both))
    for rows, logits in ((prompts, 2), (decodes, 2), (decodes, 1), ([], 0)):
        one = load(*rows, logits=logits, **moved)
        assert float(separate(one)) == pytest.approx(float(model(one)), rel=1e-6)


def test_a_missing_fit_lists_the_available_ones(fits, tmp_path):
    with pytest.raises(ValueError, match=r"engine: .* one of vllm in .*, got 'orca'"):
        read(fits, engine="orca")
    with pytest.raises(ValueError, match=r"tensor_parallel: .* one of 1 in .* got '2'"):
        read(fits, tensor_parallel=2)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        read(bad)
    short = json.loads(json.dumps(FITS))
    short["vllm"]["opt"]["1"]["prefill"] = [1.0]
    bad.write_text(json.dumps(short))
    with pytest.raises(ValueError, match="expected three numbers as prefill"):
        read(bad)


def test_the_host_time_of_the_papers_engine_is_its_fit_minus_the_roofline():
    path = shared_profile("a100_80g_opt_fitted_step_times.json")
    none = Transfers.none()
    fit = read_step_fit(path, model="facebook/opt-13b", transfers=none)
    device = Roofline.of(OPT, find_chip("a100-80g"))
    load = step_load((1, 1))
    host = float(fit(load)) - float(device(load))
    assert host == pytest.approx(VLLM_2023_STEP_S, abs=1e-4)


@pytest.mark.parametrize("window", [1, 3, 7, 2**30])
def test_the_pairs_of_a_prompt_are_counted_exactly(window):
    zeros = jax.tree.map(lambda _: 0.0, PLAIN)
    ones = ("memory_bytes_per_s", "flops_per_s", "link_bytes_per_s", "read_share")
    ones += ("matmul_share", "attention_read_share", "attention_matmul_share")
    ones += ("pair_flops", "sliding_share")
    only = dict.fromkeys(ones, 1.0) | {"window": float(window)}
    pairs = dataclasses.replace(zeros, **only)
    for query, context in ((1, 1), (1, 9), (2, 2), (4, 9), (9, 9)):
        expected = sum(min(context - j, window) for j in range(query))
        assert float(JITTED(pairs, step_load((query, context)))) == expected


def test_every_cost_model_of_the_registry_builds_from_its_options(fits):
    machine = Machine(OPT, A100)
    load = step_load((1, 300))
    plain = find_cost_model("roofline", machine, step_s=0.0)
    assert float(plain(load)) == float(PLAIN(load))
    published = {"vllm": {"facebook/opt-13b": FITS["vllm"]["opt"]}}
    fits.write_text(json.dumps(published))
    fit = find_cost_model("step_fit", machine, step_fit=str(fits), decoding_factor=2.0)
    host = VLLM_2023_STEP_S * 1e3
    expected_ms = (24 - host) * 2 + host + 2 * (0.3 + 0.5)
    assert float(fit(load)) * 1e3 == pytest.approx(expected_ms, rel=1e-5)
    with pytest.raises(ValueError, match="dense, attention: expected a CSV file each"):
        find_cost_model("profile", machine)
    with pytest.raises(ValueError, match="cost_model: expected one of roofline, "):
        find_cost_model("guess", machine)
    assert list(COST_MODELS) == ["roofline", "step_fit", "profile"]
