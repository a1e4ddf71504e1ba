"""The throughput benchmark at tiny sizes, its baseline and its limits."""

import jax
import numpy as np
import pytest

from experiments.lib import baseline, limits
from experiments.lib.bursts import lognormal_burst
from experiments.lib.timing import Contender, time_in_turn
from tests.support.models.tiny_llama import tiny_llama
from tests.support.runners import call_experiment, last_json

SIZES = dict(
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=128,
    vocab_size=256,
    batches="1,2",
    context=24,
    steps=4,
    overhead_rows=2,
    max_model_len=64,
    block_size=4,
    num_blocks=32,
    max_num_batched_tokens=16,
    requests=2,
    mean_len=8,
    least_len=2,
    most_len=16,
    repeats=1,
    w32_repeats=1,
    read_gb=0.01,
    gemm_size=64,
)


@pytest.mark.long
def test_the_runner_reports_all_figures():
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    status, stdout, stderr = call_experiment("bench_throughput", *sizes)
    assert status == 0, stderr[-4000:]
    report = last_json(stdout)
    sides = ("jpaged", "baseline")
    assert set(report["tokens_per_s"]) == {
        f"{side}_{batch}" for side in (*sides, "products") for batch in (1, 2)
    } | {f"w32_{side}" for side in sides}
    assert set(report["roofline_share"]) == {"step_1", "step_2", "w32"}
    assert set(report["ratios"]) == {
        "step_over_products_1",
        "step_over_products_2",
        "jpaged_over_baseline_1",
        "jpaged_over_baseline_2",
        "paged_attention_share_of_step",
        "paging_cost_share_of_step",
        "bookkeeping_share_of_step",
        "w32_jpaged_over_baseline",
    }
    figures = [*report["tokens_per_s"].values(), *report["roofline_share"].values()]
    assert np.isfinite(figures).all()
    assert min(figures) > 0
    w32 = report["details"]["w32"]
    assert w32["prompt_tokens"] == w32["output_tokens"] == 2 * SIZES["mean_len"]
    assert w32["equal_tokens_share"] == 1.0  # the engine's and the baseline's
    assert w32["kv_bytes"]["jpaged"] <= w32["kv_bytes"]["baseline"]
    assert set(report["versions"]) >= {"python", "jax", "jaxlib"}
    assert report["device"].startswith("cpu")


def test_both_forms_of_the_baseline_equal_a_loop_that_recomputes_everything():
    model = tiny_llama()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size=n).tolist() for n in (7, 1, 12)]
    weights, shape = baseline.weights_of(model)
    tokens, starts = baseline.pad_left(prompts)
    found = []
    for decode in (baseline.decode_calls, baseline.decode_loop):
        state = baseline.prefill(weights, tokens, starts, shape=shape, max_len=32)
        found.append(np.asarray(decode(weights, state, 9, shape=shape)[1]))

    forward = jax.jit(lambda model, tokens: model(tokens))
    for row, prompt in enumerate(prompts):
        known = list(prompt)
        for _ in range(10):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(known)] = known
            logits = np.asarray(forward(model, padded))[0, len(known) - 1]
            known.append(int(np.argmax(logits)))
        expected = known[len(prompt) :]
        assert len(set(expected)) > 3  # the model does not repeat one token
        for got in found:
            np.testing.assert_array_equal(got[row], expected)


def test_both_timed_attentions_depend_on_all_their_inputs():
    # XLA removes inputs from a program if no result depends on them.
    config = tiny_llama().config
    contenders = (
        limits.paged_attention_layers(config, 3, 12, block_size=4, max_blocks=5),
        limits.contiguous_attention_layers(config, 3, 12),
    )
    for contender in contenders:
        leaves, tree = jax.tree.flatten(jax.device_get(contender.prepare()))
        out = contender.run(*jax.tree.unflatten(tree, leaves))
        assert out.shape == (3, 4, 16)
        for index, leaf in enumerate(leaves):
            if np.issubdtype(leaf.dtype, np.floating):
                others = [*leaves[:index], leaf * np.float32(2), *leaves[index + 1 :]]
                changed = contender.run(*jax.tree.unflatten(tree, others))
                assert not np.array_equal(changed, out), index


def test_the_matrix_products_use_every_matrix():
    model = tiny_llama()
    contender = limits.matrix_products(model, 2)
    compiled = contender.run.lower(*contender.prepare()).compile()
    in_layers, in_output = limits.num_matrix_weights(model.config)
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    flops = (
        2 * 2 * (in_layers + in_output)
    )  # for 2 rows; XLA counts the body of a loop once
    # There are a few additions between the products.
    assert flops <= cost["flops"] < 1.1 * flops


def test_the_lengths_of_a_burst_have_their_mean_and_limits():
    burst = lognormal_burst(
        num_requests=32,
        mean=64,
        sigma=0.6,
        least=8,
        most=256,
        vocab_size=100,
        seed=0,
    )
    for lengths in (list(map(len, burst.prompts)), burst.output_lens):
        assert abs(np.mean(lengths) - 64) < 0.5
        assert 8 <= min(lengths) < 40
        assert 100 < max(lengths) <= 256
    assert list(map(len, burst.prompts)) != burst.output_lens


def test_contenders_run_in_turn_after_an_untimed_round():
    order = []

    def contender(name):
        return Contender(
            run=lambda x: order.append((name, x)), prepare=lambda: (len(order),)
        )

    times = time_in_turn({"a": contender("a"), "b": contender("b")}, 2)
    assert order == [(name, i) for i, name in enumerate("ababab")]
    assert all(len(t.seconds) == 2 for t in times.values())
