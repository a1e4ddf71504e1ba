"""jpaged.rl against plain loops over numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import rl
from jpaged.models.decoder import init_model
from jpaged.rl.packing import Rollout
from jpaged.serving.weights import named_leaves
from tests.support.models.tiny_llama import tiny_llama

LLAMA = tiny_llama().config
RNG = np.random.default_rng(0)
B, T = 5, 7


@pytest.fixture(scope="module")
def arrays():
    """logprobs, old logprobs, reference f32[B, T], advantages f32[B], mask."""
    rng = np.random.default_rng(1)
    logprobs, old, reference = (
        jnp.asarray(-rng.gamma(1.0, 1.0, (B, T)), jnp.float32) for _ in range(3)
    )
    advantages = jnp.asarray(rng.normal(size=B), jnp.float32)
    lens = np.array([7, 3, 1, 5, 0])
    return logprobs, old, reference, advantages, jnp.arange(T)[None] < lens[:, None]


def test_advantages_are_those_of_the_papers():
    rewards = RNG.normal(size=(3, 4)).astype(np.float32)
    rewards[1] = 0.5
    grpo, rloo, dr = (
        np.asarray(function(rewards))
        for function in (rl.grpo_advantages, rl.rloo_advantages, rl.dr_grpo_advantages)
    )
    for i, group in enumerate(rewards):
        for j, reward in enumerate(group):
            others = [r for k, r in enumerate(group) if k != j]
            assert rloo[i, j] == pytest.approx(reward - np.mean(others), abs=1e-6)
            assert dr[i, j] == pytest.approx(reward - np.mean(group), abs=1e-6)
            expected = (reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
            assert grpo[i, j] == pytest.approx(expected, abs=1e-5)
    assert not grpo[1].any()
    with pytest.raises(ValueError, match="rewards: expected shape"):
        rl.grpo_advantages(np.ones((3, 1)))


def loop_mean(values, mask, how, length):
    kept = [
        [v for v, m in zip(*row, strict=True) if m]
        for row in zip(values, mask, strict=True)
    ]
    if how == "token":
        return sum(map(sum, kept)) / sum(map(len, kept))
    if how == "sequence":
        means = [sum(row) / len(row) for row in kept if row]
        return sum(means) / len(means)
    return sum(map(sum, kept)) / (len(kept) * length)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_ppo_and_grpo_losses_equal_loops(arrays, how):
    logprobs, old, reference, advantages, mask = arrays
    weights = rl.token_weights(logprobs, reference, mask, cap=1.5)
    got = rl.ppo_clip_loss(
        logprobs,
        old,
        advantages,
        mask,
        clip_low=0.2,
        clip_high=0.3,
        weights=weights,
        reference=reference,
        kl_coefficient=0.1,
        how=how,
        length=9,
    )
    gains, kls = np.zeros((B, T)), np.zeros((B, T))
    cut = 0
    for i, j in np.ndindex(B, T):
        ratio = np.exp(logprobs[i, j] - old[i, j])
        clipped = min(max(ratio, 0.8), 1.3)
        a = advantages[i]
        gains[i, j] = min(ratio * a, clipped * a) * weights[i, j]
        r = reference[i, j] - logprobs[i, j]
        kls[i, j] = np.exp(r) - 1 - r
        cut += int(bool(mask[i, j]) and bool(clipped * a < ratio * a))
    kl = loop_mean(kls, np.asarray(mask), how, 9)
    expected = -loop_mean(gains, np.asarray(mask), how, 9) + 0.1 * kl
    assert float(got.loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(got.kl) == pytest.approx(float(kl), rel=1e-4)
    assert float(got.clip_share) == pytest.approx(cut / int(mask.sum()), rel=1e-5)
    plain = rl.grpo_loss(logprobs, old, advantages, mask)
    same = rl.ppo_clip_loss(logprobs, old, advantages, mask, how="sequence")
    assert plain.loss == same.loss


def test_the_first_gradient_is_the_policy_gradient(arrays):
    logprobs, _, _, advantages, mask = arrays

    def clipped(x):
        return rl.grpo_loss(x, logprobs, advantages, mask, how="token").loss

    expected = jax.grad(lambda x: rl.policy_gradient_loss(x, advantages, mask))(
        logprobs
    )
    np.testing.assert_allclose(jax.grad(clipped)(logprobs), expected, atol=1e-6)
    by_hand = -np.asarray(advantages)[:, None] * np.asarray(mask) / int(mask.sum())
    np.testing.assert_allclose(expected, by_hand, atol=1e-6)


def test_weights_are_truncated_ratios_without_gradient(arrays):
    logprobs, old, _, _, mask = arrays
    ratios = np.exp(np.asarray(logprobs - old)) * np.asarray(mask)
    capped = rl.token_weights(logprobs, old, mask, cap=2.0)
    np.testing.assert_allclose(capped, np.minimum(ratios, 2.0), rtol=1e-5)
    masked = rl.token_weights(logprobs, old, mask, cap=2.0, beyond="mask")
    np.testing.assert_allclose(masked, np.where(ratios > 2.0, 0, ratios), rtol=1e-5)
    sums = np.where(mask, logprobs - old, 0).sum(1)
    np.testing.assert_allclose(
        rl.sequence_weights(logprobs, old, mask, cap=3.0),
        np.minimum(np.exp(sums), 3.0),
        rtol=1e-5,
    )
    lens = np.maximum(np.asarray(mask).sum(1), 1)
    np.testing.assert_allclose(
        rl.sequence_weights(logprobs, old, mask, cap=3.0, is_geometric=True),
        np.minimum(np.exp(sums / lens), 3.0),
        rtol=1e-5,
    )
    gradient = jax.grad(lambda x: rl.token_weights(x, old, mask).sum())(logprobs)
    assert not gradient.any()
    found = rl.mismatch(logprobs, logprobs, mask)
    assert (found.max_abs, found.kl) == (0, 0)
    assert float(found.effective_share) == pytest.approx(1)
    with pytest.raises(ValueError, match="cap: expected"):
        rl.token_weights(logprobs, old, mask, cap=0)
    with pytest.raises(ValueError, match="beyond: expected"):
        rl.token_weights(logprobs, old, mask, beyond="clip")  # type: ignore[arg-type]


def test_kl_estimators_have_the_divergence_as_mean():
    rng = np.random.default_rng(3)
    p_logits, q_logits = rng.normal(size=(2, 8))
    q_logits = p_logits + 0.3 * q_logits
    p, q = (
        np.asarray(jax.nn.log_softmax(jnp.asarray(x))) for x in (p_logits, q_logits)
    )
    exact = float((np.exp(p) * (p - q)).sum())
    # The mean over the exact distribution, instead of samples.
    for kind in ("k1", "k3"):
        estimate = np.asarray(rl.kl_estimate(p, q, kind))
        assert (np.exp(p) * estimate).sum() == pytest.approx(exact, abs=1e-5)
    assert (np.asarray(rl.kl_estimate(p, q, "k3")) >= 0).all()
    k2 = (np.exp(p) * np.asarray(rl.kl_estimate(p, q, "k2"))).sum()
    assert k2 == pytest.approx(exact, rel=0.3)
    expected = -(np.exp(p) * p).sum()
    found = float(rl.entropy(jnp.asarray(p_logits)))
    assert found == pytest.approx(float(expected), abs=1e-5)
    masked = jnp.asarray([0.0, 0.0, -jnp.inf])
    assert float(rl.entropy(masked)) == pytest.approx(np.log(2), abs=1e-6)


def random_rollouts(count, vocab_size=64, seed=4):
    rng = np.random.default_rng(seed)
    return [
        Rollout(
            rng.integers(1, vocab_size, rng.integers(1, 6)).tolist(),
            rng.integers(1, vocab_size, rng.integers(1, 9)).tolist(),
            [],
        )
        for _ in range(count)
    ]


def test_packed_rows_score_as_padded_ones():
    model = init_model(LLAMA, seed=1)
    rollouts = [
        r._replace(logprobs=-np.arange(len(r.tokens), dtype=np.float32) - 1)
        for r in random_rollouts(9, LLAMA.vocab_size)
    ]
    padded, packed = rl.pad(rollouts, 20), rl.pack(rollouts, 20)
    assert len(packed.tokens) < len(padded.tokens)
    values = np.arange(9, dtype=np.float32) + 1
    rows = {}
    for batch in (padded, packed):
        scores = rl.token_logprobs(
            model, jnp.asarray(batch.tokens), jnp.asarray(batch.segment_ids), chunk=16
        )
        per_token = batch.per_token(values)
        for i, rollout in enumerate(rollouts):
            where = (batch.rollouts == i) & batch.mask
            assert batch.tokens[where].tolist() == list(rollout.tokens)
            assert batch.logprobs[where].tolist() == list(rollout.logprobs)
            assert set(per_token[where].tolist()) == {values[i]}
            rows.setdefault(i, []).append(np.asarray(scores)[where])
        assert not per_token[~batch.mask].any()
    for i, (first, second) in rows.items():
        np.testing.assert_allclose(first, second, atol=1e-5)
        tokens = [*rollouts[i].prompt, *rollouts[i].tokens]
        table = jax.nn.log_softmax(model(jnp.asarray([tokens]))[0])
        expected = [
            table[j - 1, tokens[j]] for j in range(len(rollouts[i].prompt), len(tokens))
        ]
        np.testing.assert_allclose(first, expected, atol=1e-5)
    assert len(rl.pack(rollouts, 20, num_rows=12).tokens) == 12
    for wrong in (dict(length=5), dict(length=20, num_rows=2)):
        with pytest.raises(ValueError, match=next(reversed(wrong))):
            rl.pack(rollouts, **wrong)


def test_chunked_scores_have_the_gradient_of_whole_logits():
    model = init_model(LLAMA, seed=2)
    tokens = jnp.asarray(RNG.integers(1, LLAMA.vocab_size, (2, 9)))

    def whole(model):
        table = jax.nn.log_softmax(model(tokens)[:, :-1] / 0.7)
        return jnp.take_along_axis(table, tokens[:, 1:, None], 2).sum()

    def chunked(model):
        return rl.token_logprobs(model, tokens, temperature=0.7, chunk=5).sum()

    expected, got = (jax.grad(f)(model) for f in (whole, chunked))
    assert float(chunked(model)) == pytest.approx(float(whole(model)), rel=1e-5)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_adapters_change_the_weights_they_name():
    model = init_model(LLAMA, seed=3)
    adapters = rl.init_adapters(model, jax.random.key(0), 2, ["*.query.weight"])
    assert len(adapters) == 2 * LLAMA.num_layers
    tokens = jnp.asarray([[1, 2, 3, 4]])
    same = rl.add_adapters(model, adapters, 4.0)
    np.testing.assert_array_equal(same(tokens), model(tokens))
    name = "layers.1.attention.query.weight"
    adapters[f"{name}_lora_b"] = jnp.ones_like(adapters[f"{name}_lora_b"])
    added = named_leaves(rl.add_adapters(model, adapters, 4.0))
    a, b = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
    for other, leaf in named_leaves(model).items():
        expected = leaf + 2.0 * (a @ b) if other == name else leaf
        np.testing.assert_allclose(added[other], expected, atol=1e-5)
    with pytest.raises(ValueError, match="patterns: expected names"):
        rl.init_adapters(model, jax.random.key(0), 2, ["*.nothing"])
