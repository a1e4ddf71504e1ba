"""Views of the state, and growing it: nothing of the sequences is lost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import engine, load_model
from jpaged.config import EngineConfig
from jpaged.decoding import contrib
from jpaged.engine import features, limits
from jpaged.engine.features import Features
from jpaged.params import SamplingParams
from tests.support.models import checkpoints

pytestmark = pytest.mark.long

PLAIN = EngineConfig(
    num_blocks=14,
    block_size=4,
    max_num_seqs=4,
    max_model_len=32,
    max_num_batched_tokens=16,
    max_num_requests=12,
)
RULES = SamplingParams(bad_words=[[5, 6]], logit_bias={7: 1.0}, min_tokens=2)
MIROSTAT = contrib.mirostat(3.0, 0.5)
CHAINS = ((MIROSTAT.kind,), (contrib.xtc().kind, MIROSTAT.kind))
DOLA = contrib.dola((0,))
KINDS = [
    Features(),
    Features(sampling=2),
    Features(rules=True),
    Features(logprobs=True),
    Features(logprobs=True, prompt_logprobs=True),
    Features(algorithms=True),
    Features(processors=True),
    Features(algorithms=True, seen=True),
    Features(2, rules=True, logprobs=True, prompt_logprobs=True, algorithms=True),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    return load_model(checkpoints.write_tiny_llama(folder, num_hidden_layers=1))


@pytest.fixture(scope="module")
def grown(model):
    return dataclasses.replace(
        PLAIN,
        rules=limits.rule_sizes(RULES, model.config.vocab_size),
        num_logprobs=3,
        prompt_logprobs=True,
        max_beam_width=2,
        algorithms=((DOLA, 2),),
        seen_layers=(0,),
        processors=CHAINS,
    )


def arrays(state):
    """The state's arrays by name."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_equal(ours, theirs):
    assert ours.config == theirs.config
    ours, theirs = arrays(ours), arrays(theirs)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)


def numbered(state):
    """The state with other numbers in each array."""
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(0)
    leaves = [
        jnp.asarray(rng.integers(0, 2, leaf.shape)).astype(leaf.dtype)
        for leaf in leaves
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.mark.parametrize("used", KINDS, ids=str)
def test_merge_puts_the_arrays_of_a_view_back_and_keeps_all_others(model, grown, used):
    state = engine.init(model, grown)
    view = features.view(state, used)
    assert_equal(features.merge(state, view), state)
    changed = features.merge(state, numbered(view))
    assert_equal(features.view(changed, used), numbered(view))
    # What the view has not is as before.
    after, before, seen = arrays(changed), arrays(state), arrays(view)
    rest = after.keys() - seen.keys()
    assert rest
    for name in rest:
        np.testing.assert_array_equal(after[name], before[name], name)


def test_a_view_does_not_change_when_other_features_grow(model, grown):
    state = engine.init(model, PLAIN)
    state, _ = engine.submit(state, [[5, 6, 7], [8]], SamplingParams(seed=1, n=2))
    used = Features(sampling=1)
    larger = features.grow(state, grown)
    assert larger.config == grown
    # Algorithm -1 is none; beam search became algorithm 0.
    assert_equal(features.view(larger, used), features.view(state, used))
    assert_equal(features.grow(larger, grown), larger)


def test_grown_arrays_keep_what_sequences_have(model, grown):
    state = engine.init(model, dataclasses.replace(grown, num_logprobs=2))
    table = dataclasses.replace(
        state.requests,
        top_ids=state.requests.top_ids + 9,
        ranks=state.requests.ranks + 4,
    )
    state = dataclasses.replace(state, requests=table)
    larger = features.grow(state, grown).requests
    assert larger.top_ids.shape[-1] > table.top_ids.shape[-1]
    corner = larger.top_ids[tuple(map(slice, table.top_ids.shape))]
    np.testing.assert_array_equal(corner, table.top_ids)
    np.testing.assert_array_equal(larger.ranks, table.ranks)


def test_a_new_chain_keeps_the_parameters_and_states_of_the_others(model, grown):
    state = engine.init(model, dataclasses.replace(PLAIN, processors=CHAINS[:1]))
    params = SamplingParams(seed=1, n=2, logits_processors=[MIROSTAT])
    state, ((one, other),) = engine.submit(state, [[5, 6]], params)
    table = features.grow(state, grown).requests
    assert table.params.processors.chains[jnp.array([one, other])].tolist() == [0, 0]
    (values,), later = table.params.processors.values
    assert float(values["tau"][other]) == 3.0
    assert [sorted(each) for each in later] == [
        ["probability", "threshold"],
        ["eta", "tau"],
    ]
    (mu,), (_, fresh) = table.processor_states
    assert (float(mu[one]), float(fresh[one])) == (6.0, 0.0)
    unknown = SamplingParams(logits_processors=[contrib.dry()])
    with pytest.raises(ValueError, match="expected a chain of the config's"):
        engine.submit(engine.init(model, grown), [[5]], unknown)


def test_beams_in_the_table_cannot_become_wider(model, grown):
    state = engine.init(model, grown)
    with pytest.raises(ValueError, match="max_beam_width: expected 2 while"):
        features.grow(state, dataclasses.replace(grown, max_beam_width=3))
