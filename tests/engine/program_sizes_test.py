"""The sizes of the engine's programs, which decide how long they compile."""

import jax
import pytest
from jax.extend import core

from jpaged import LLM
from jpaged.serving.program_specs import GREEDY, ProgramSpecs, program_key

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def program():
    """Returns a greedy program of the bundled model with 8 rows."""
    llm = LLM("tiny-python", max_num_seqs=8, max_model_len=256)

    def find(name, size=0):
        key = program_key(name, size, GREEDY, llm.config)
        state = llm._open_host().runner.state
        return ProgramSpecs(llm.model, None).program(key, state)

    return find


def num_equations(jaxpr):
    inner = (part for one in jaxpr.eqns for part in core.jaxprs_in_params(one.params))
    return len(jaxpr.eqns) + sum(map(num_equations, inner))


# Tracing and lowering take some 0.2 ms for each equation, and XLA about twice that.
@pytest.mark.parametrize(
    ("name", "most"), [("schedule", 1_880), ("settle", 460), ("decode", 320)]
)
def test_the_programs_without_pages_have_few_equations(program, name, most):
    found = program(name)
    jaxpr = jax.make_jaxpr(found.function)(*found.args).jaxpr
    assert most // 2 < num_equations(jaxpr) <= most


def test_the_optimised_text_of_the_decode_loop_is_short(program):
    loop = program("loop", 8)
    lowered = jax.jit(loop.function, donate_argnums=loop.donated).lower(*loop.args)
    text = lowered.compile({"xla_backend_optimization_level": "3"}).as_text() or ""
    assert 500 < len(text.splitlines()) < 6_500
