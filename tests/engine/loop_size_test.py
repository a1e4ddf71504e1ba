"""The size of the decode loop's program, which decides how long it compiles."""

import jax
import pytest

from jpaged import LLM
from jpaged.serving.program_specs import GREEDY, ProgramSpecs, program_key

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def loop():
    """The decode loop of 8 rows of the bundled model."""
    llm = LLM("tiny-python", max_num_seqs=8, max_model_len=256)
    state = llm._host.runner.state
    key = program_key("loop", 8, GREEDY, llm.config)
    return ProgramSpecs(llm.model, None).program(key, state)


def test_the_optimised_text_is_short(loop):
    lowered = jax.jit(loop.function, donate_argnums=loop.donated).lower(*loop.args)
    compiled = lowered.compile({"xla_backend_optimization_level": 3})
    assert 500 < len(compiled.as_text().splitlines()) < 8_000
