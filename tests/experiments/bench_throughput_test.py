"""The throughput benchmark at tiny sizes, and the baseline that it compares with."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.lib import baseline, limits
from experiments.lib.engine_loads import lognormal_workload
from experiments.lib.timing import Contender, time_in_turn
from jpaged.models import ModelConfig, init_model

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


def tiny_model():
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=256,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        # Larger than a Llama's, so that the tokens depend on what came before.
        initializer_range=0.3,
    )
    return init_model(config, seed=3)


def test_the_throughput_benchmark_ends_with_one_json_object():
    command = [sys.executable, "-m", "experiments.bench_throughput"]
    command += [f"--{name}={value}" for name, value in SIZES.items()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
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
    assert w32["equal_tokens_share"] == 1.0  # the baseline's with the engine's
    assert w32["kv_bytes"]["jpaged"] <= w32["kv_bytes"]["baseline"]
    assert set(report["versions"]) >= {"python", "jax", "jaxlib"}
    assert report["device"].startswith("cpu")


@pytest.mark.parametrize("decode", [baseline.decode_calls, baseline.decode_loop])
def test_the_baseline_gives_the_tokens_of_a_loop_that_recomputes_everything(decode):
    model = tiny_model()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size=n).tolist() for n in (7, 1, 12)]
    weights, shape = baseline.weights_of(model)
    tokens, starts = baseline.pad_left(prompts)
    state = baseline.prefill(weights, tokens, starts, shape=shape, max_len=32)
    _, got = decode(weights, state, 9, shape=shape)

    forward = jax.jit(lambda model, tokens: model(tokens))
    for row, prompt in enumerate(prompts):
        known = list(prompt)
        for _ in range(10):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(known)] = known
            logits = np.asarray(forward(model, padded))[0, len(known) - 1]
            known.append(int(np.argmax(logits)))
        wanted = known[len(prompt) :]
        assert len(set(wanted)) > 3  # no model that repeats itself
        np.testing.assert_array_equal(np.asarray(got)[row], wanted)


def test_both_attentions_that_are_timed_have_all_their_work_to_do():
    # An array that no result depends on would be dropped from the program.
    config = tiny_model().config
    contenders = (
        limits.paged_attention(config, 3, 12, block_size=4, max_blocks=5),
        limits.contiguous_attention(config, 3, 12),
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
    model = tiny_model()
    contender = limits.matrix_products(model, 2)
    compiled = contender.run.lower(*contender.prepare()).compile()
    in_layers, in_output = limits.num_matrix_weights(model.config)
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    flops = 2 * 2 * (in_layers + in_output)  # 2 rows; XLA counts a loop's body once
    # The few additions between the products come on top.
    assert flops <= cost["flops"] < 1.1 * flops


def test_the_workloads_lengths_have_their_mean_and_their_limits():
    load = lognormal_workload(
        num_requests=32,
        mean=64,
        sigma=0.6,
        least=8,
        most=256,
        vocab_size=100,
        seed=0,
    )
    for lengths in (list(map(len, load.prompts)), load.output_lens):
        assert abs(np.mean(lengths) - 64) < 0.5
        assert 8 <= min(lengths) < 40
        assert 100 < max(lengths) <= 256
    assert list(map(len, load.prompts)) != load.output_lens


def test_contenders_run_in_turn_and_the_first_round_does_not_count():
    order = []

    def contender(name):
        return Contender(
            run=lambda x: order.append((name, x)), prepare=lambda: (len(order),)
        )

    times = time_in_turn({"a": contender("a"), "b": contender("b")}, 2)
    assert order == [(name, i) for i, name in enumerate("ababab")]
    assert all(len(t.seconds) == 2 for t in times.values())
