"""update_weights, pause and resume, against the model's forward pass without engine."""

import asyncio
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jpaged.llm import LLM
from jpaged.models.decoder import init_model
from jpaged.models.loading.checkpoint import load_model, save_model
from jpaged.models.loading.sources import bundled_path
from jpaged.params import BeamSearchParams, SamplingParams
from jpaged.serving import batcher
from jpaged.serving.weight_reading import is_finite
from jpaged.serving.weights import named_leaves
from tests.support.tiny_llm import GREEDY, SIZES, is_idle

pytestmark = pytest.mark.long

PROMPT = [5, 9, 13, 200, 77, 31, 8, 45, 99, 3, 17, 60, 61]
PARAMS = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
LONG = dataclasses.replace(GREEDY, max_tokens=40)


def changed(model, seed):
    """A copy of the model whose weights are multiplied by numbers near 1."""
    model = nnx.clone(model)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda leaf: leaf * rng.uniform(0.7, 1.3, leaf.shape).astype(leaf.dtype),
        nnx.state(model),
    )
    nnx.update(model, state)
    return model


def logprobs_of(model, tokens):
    """Log-probabilities of tokens after the first, by the plain forward pass."""
    logits = model(jnp.asarray([tokens]))[0, :-1]
    table = jax.nn.log_softmax(logits)
    return np.asarray(jnp.take_along_axis(table, jnp.asarray(tokens[1:])[:, None], 1))


@pytest.fixture(autouse=True)
def short_slices(monkeypatch):
    """Slices of few steps, so that requests run while a test does something else."""
    for name in ("STREAM_S", "STOP_S", "PROGRESS_S", "QUIET_S"):
        monkeypatch.setattr(batcher, name, 0.0)


@pytest.fixture(scope="module")
def shared_llm(decoder):
    """An LLM that all tests of the module update."""
    llm = LLM(nnx.clone(decoder), **SIZES)
    llm.warm_up(PARAMS)  # otherwise programs are compiled beside the first calls
    return llm


@pytest.fixture
def llm(shared_llm, decoder):
    shared_llm.update_weights(decoder)
    shared_llm.generate([PROMPT], PARAMS)
    yield shared_llm
    shared_llm.resume()
    assert is_idle(shared_llm)


def check_outputs(llm, model, prompt=PROMPT, params=PARAMS):
    """Check that outputs have the log-probabilities that `model` computes."""
    (output,) = llm.generate([prompt], params)
    for sample in output.outputs:
        tokens = [*output.prompt_token_ids, *sample.token_ids]
        expected = logprobs_of(model, tokens)[len(prompt) - 1 :, 0]
        np.testing.assert_allclose(sample.token_logprobs, expected, atol=1e-4)
    return output


FORMS = {
    "decoder": lambda model, path: model,
    "state": lambda model, path: nnx.state(model),
    "params": lambda model, path: nnx.state(model, nnx.Param),
    "pure dict": lambda model, path: nnx.to_pure_dict(nnx.state(model)),
    "flat": lambda model, path: dict(named_leaves(model)),
    "flat state": lambda model, path: dict(nnx.to_flat_state(nnx.state(model))),
    "numpy": lambda model, path: jax.tree.map(np.asarray, named_leaves(model)),
    "folder": lambda model, path: save_model(model, path / "new") or path / "new",
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_weights_is_used_and_nothing_stale_is(llm, form, tmp_path):
    new = changed(llm.model, seed=len(form))
    compiled, old = llm.stats()["num_compilations"], named_leaves(llm.model)
    with llm.pin(PROMPT[:9]) as prefix:
        llm.generate([prefix.prompt([4, 5])], PARAMS)
        update = llm.update_weights(FORMS[form](new, tmp_path))
        assert update.num_arrays == len(jax.tree.leaves(new))
        assert update.num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(new))
        assert llm.weights_version == update.version
        check_outputs(llm, new, prefix.prompt([4, 5]))
        check_outputs(llm, new)
    assert llm.stats()["num_compilations"] == compiled
    assert not any(leaf.is_deleted() for leaf in old.values())


def test_the_llm_has_copies_unless_told_otherwise(llm, decoder):
    new = changed(decoder, 1)
    llm.update_weights(new)
    copied = named_leaves(llm.model)
    for name, leaf in named_leaves(new).items():
        assert copied[name].unsafe_buffer_pointer() != leaf.unsafe_buffer_pointer()
        leaf.delete()  # as a trainer that donates does
    check_outputs(llm, changed(decoder, 1))
    shared = changed(decoder, 2)
    llm.update_weights(shared, copy=False)
    for name, leaf in named_leaves(llm.model).items():
        assert leaf is named_leaves(shared)[name]
    check_outputs(llm, shared)
    named_leaves(shared)["layers.0.mlp.up.weight"].delete()
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.up.weight was deleted"):
        llm.generate([PROMPT], PARAMS)
    llm.update_weights(decoder)
    check_outputs(llm, decoder)


def test_recomputed_requests_are_the_new_models_from_here_on(llm, decoder):
    new = changed(decoder, 3)
    beams, live = BeamSearchParams(2, 20, ignore_eos=True), llm.submit(PROMPT, LONG)
    next(live)
    search = llm.submit(PROMPT[:7], beams)
    next(live)
    llm.update_weights(new)
    num_known = len(live._state.outputs[0].token_ids)
    assert 0 < num_known < 35
    output = live.output().outputs[0]
    tokens = [*PROMPT, *output.token_ids]
    found, start = output.token_logprobs, len(PROMPT) - 1
    before, after = (logprobs_of(m, tokens)[start:, 0] for m in (decoder, new))
    np.testing.assert_allclose(found[:num_known], before[:num_known], atol=1e-4)
    np.testing.assert_allclose(found[-3:], after[-3:], atol=1e-4)
    assert live.output().metrics["num_preemptions"] > 0
    assert all(len(one.token_ids) == 20 for one in search.output().outputs)
    check_outputs(llm, new)


def test_kept_requests_share_nothing_with_later_ones(llm, decoder):
    new = changed(decoder, 4)
    live = llm.submit(PROMPT, LONG)
    next(live)
    llm.update_weights(new, requests="keep")
    # The same prompt while the old request runs, and its continuation after it.
    check_outputs(llm, new)
    output = live.output()
    assert output.metrics["num_preemptions"] == 0
    assert len(output.outputs[0].token_ids) == 40
    prompt = [*PROMPT, *output.outputs[0].token_ids]
    assert check_outputs(llm, new, prompt[:-2]).metrics["num_cached_tokens"] <= 12


def test_aborted_requests_keep_their_tokens(llm, decoder):
    live = llm.submit(PROMPT, LONG)
    next(live)
    waiting = llm.submit(PROMPT[:5], LONG)
    llm.update_weights(changed(decoder, 5), requests="abort")
    assert live.output().outputs[0].finish_reason == "abort"
    assert live.output().outputs[0].token_ids
    assert waiting.output().outputs[0].finish_reason == "abort"
    check_outputs(llm, changed(decoder, 5))


def test_the_prefix_cache_is_kept_on_request(llm, decoder):
    new = changed(decoder, 6)
    llm.update_weights(new, prefix_cache="keep")
    (output,) = llm.generate([PROMPT], PARAMS)
    assert output.metrics["num_cached_tokens"] == 12  # of the old weights
    llm.reset_prefix_cache()
    check_outputs(llm, new)


def test_adapters_alone_are_added_to_the_weights(llm, decoder):
    rng = np.random.default_rng(7)
    names = ["layers.0.attention.query.weight", "layers.1.mlp.down.weight"]

    def adapters(scale):
        found = {}
        for name in names:
            rows, columns = named_leaves(decoder)[name].shape
            a, b = rng.normal(size=(rows, 3)), rng.normal(size=(3, columns))
            found[f"{name}_lora_a"] = nnx.LoRAParam(jnp.asarray(a * scale, jnp.float32))
            found[f"{name}_lora_b"] = nnx.LoRAParam(jnp.asarray(b, jnp.float32))
        return found

    for scale in (0.02, 0.03):  # the second ones replace the first
        given = adapters(scale)
        update = llm.update_weights(given, lora_alpha=6)
        assert update.num_arrays == 2
        expected = dict(named_leaves(decoder))
        for name in names:
            a, b = given[f"{name}_lora_a"][...], given[f"{name}_lora_b"][...]
            expected[name] = expected[name] + 2.0 * (a @ b)
        for name, leaf in named_leaves(llm.model).items():
            np.testing.assert_allclose(leaf, expected[name], rtol=1e-5, atol=1e-6)
    nested = {}
    for name, array in given.items():
        *path, last = name.split(".")
        node = nested
        for step in path:
            node = node.setdefault(step, {})
        node[last] = array
    before = dict(named_leaves(llm.model))
    llm.update_weights(nested, lora_alpha=6)
    for name, leaf in named_leaves(llm.model).items():
        np.testing.assert_array_equal(leaf, before[name])
    check_outputs(llm, llm.model)
    with pytest.raises(ValueError, match="lora_alpha: expected the alpha"):
        llm.update_weights(given)
    del given[f"{names[0]}_lora_b"]
    with pytest.raises(ValueError, match=r"query.weight_lora_a: expected both"):
        llm.update_weights(given, lora_alpha=6)


def with_leaf(model, name, value):
    found = dict(named_leaves(model))
    found[name] = value
    return found


UP = "layers.1.mlp.up.weight"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: w[:, 1:], r"up.weight: expected shape \(.*\), got shape"),
        (lambda w: w.astype("bfloat16"), "up.weight: expected dtype float32, got bf"),
        (lambda w: w.at[3, 4].set(jnp.nan), "up.weight: expected finite numbers"),
        (lambda w: w.at[3, 4].set(-jnp.inf), "up.weight: expected finite numbers"),
        (lambda w: None, "expected all 21 arrays.*none for 'layers.1.mlp.up.weight'"),
        (lambda w: "x", "up.weight: expected an array, got str"),
        (lambda w: w.astype(int), "up.weight: expected dtype float32, got int32"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(llm, decoder, wrong, message):
    live = llm.submit(PROMPT, LONG)
    next(live)
    new = changed(decoder, 8)
    given = with_leaf(new, UP, wrong(named_leaves(new)[UP]))
    with pytest.raises(ValueError, match=message):
        llm.update_weights(given)
    tokens = [*PROMPT, *live.output().outputs[0].token_ids]
    expected = logprobs_of(decoder, tokens)[len(PROMPT) - 1 :, 0]
    found = live.output().outputs[0].token_logprobs
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert check_outputs(llm, decoder).metrics["num_cached_tokens"] > 0


def test_other_models_and_options_are_refused(llm, decoder):
    other = load_model(bundled_path("tiny-python"), "float32")
    with pytest.raises(ValueError, match="weights: expected a model with"):
        llm.update_weights(other)
    with pytest.raises(ValueError, match="that it does not have"):
        llm.update_weights(nnx.state(other))
    with pytest.raises(ValueError, match=r"got 'layers.0.mlp.new'"):
        llm.update_weights(with_leaf(decoder, "layers.0.mlp.new", jnp.zeros(3)))
    with pytest.raises(ValueError, match="weights: expected a Decoder"):
        llm.update_weights(None)
    with pytest.raises(FileNotFoundError):
        llm.update_weights("no/such/folder")
    for options in (
        dict(prefix_cache="drop"),
        dict(requests="drop"),
        dict(prefix_cache="keep", requests="recompute"),
        dict(copy=None),
        dict(lora_alpha=-1),
        dict(lora_alpha=8.0),  # without adapters
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            llm.update_weights(decoder, **options)
    with pytest.raises(ValueError, match="call it outside of jit"):
        jax.jit(lambda state: llm.update_weights(state).version)(nnx.state(decoder))
    with llm._updater._exclusive():
        with pytest.raises(RuntimeError, match="no other update"):
            llm.update_weights(decoder)
    check_outputs(llm, decoder)


def test_an_update_that_fails_in_the_middle_is_noticed(llm, decoder, monkeypatch):
    live = llm.submit(PROMPT, LONG)
    next(live)
    place = llm._updater._new_array
    calls = iter(range(100))

    def failing(*args):
        if next(calls) == 5:
            raise MemoryError("no memory")
        return place(*args)

    monkeypatch.setattr(llm._updater, "_new_array", failing)
    with pytest.raises(MemoryError):
        llm.update_weights(changed(decoder, 9))
    assert live.output().outputs[0].finish_reason == "abort"
    with pytest.raises(RuntimeError, match="weights of two versions"):
        llm.generate([PROMPT], PARAMS)
    llm.update_weights(decoder)
    check_outputs(llm, decoder)


def test_other_dtypes_are_converted_on_request(llm, decoder):
    half = jax.tree.map(
        lambda x: x.astype("bfloat16"), named_leaves(changed(decoder, 1))
    )
    llm.update_weights(half, cast=True)
    for name, leaf in named_leaves(llm.model).items():
        np.testing.assert_array_equal(leaf, half[name].astype("float32"))
    small = LLM(changed(decoder, 2), **SIZES)
    wide = init_model(decoder.config, seed=3)
    small.update_weights(wide, cast=True)
    check_outputs(small, wide)


def test_pause_freezes_requests_until_resume(llm, decoder):
    live = llm.submit(PROMPT, LONG)
    next(live)
    llm.pause()
    assert llm.is_paused
    late = llm.submit(PROMPT[:4], PARAMS)
    steps = llm.stats()["num_steps"]
    with pytest.raises(RuntimeError, match="is paused"):
        llm.generate([PROMPT], PARAMS)
    with pytest.raises(RuntimeError, match="is paused"):
        live.output()
    waiter = threading.Thread(target=late.output)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive()
    assert llm.stats()["num_steps"] == steps
    llm.update_weights(changed(decoder, 1))
    llm.resume()
    waiter.join(60)
    assert not waiter.is_alive()
    assert late.output().outputs[0].finish_reason == "length"
    assert len(live.output().outputs[0].token_ids) == 40


def test_pause_can_wait_for_requests_or_end_them(llm):
    live = llm.submit(PROMPT, LONG)
    llm.pause("wait")
    assert live.finished
    assert live.output().outputs[0].finish_reason == "length"
    frozen = llm.submit(PROMPT[:3], LONG)
    llm.pause("abort")
    assert frozen.output().outputs[0].finish_reason == "abort"
    llm.resume()
    llm.resume()
    assert not llm.is_paused
    with pytest.raises(ValueError, match="mode: expected one of"):
        llm.pause("stop")


def test_coroutines_sleep_during_a_pause(llm):
    async def main():
        request = llm.submit(PROMPT, LONG)
        await request.__anext__()
        llm.pause()
        waiting = asyncio.ensure_future(request._wait())
        await asyncio.sleep(0.1)
        assert not waiting.done()
        llm.resume()
        return await waiting

    assert len(asyncio.run(main()).outputs[0].token_ids) == 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_finite_values_are_told_from_others(dtype):
    values = jnp.asarray(np.random.default_rng(0).normal(size=200_001), dtype)
    assert is_finite(values)
    assert is_finite(values * jnp.asarray(1e30 if dtype != "float16" else 1e3, dtype))
    for at, wrong in ((0, jnp.nan), (200_000, jnp.inf), (70_000, -jnp.inf)):
        assert not is_finite(values.at[at].set(wrong))
        assert not is_finite(np.asarray(values.at[at].set(wrong)))
