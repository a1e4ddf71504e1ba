"""How every test runs: on CPU unless told otherwise, strictly, with warm compilations.

The environment variables are set before jax is imported, so that processes which
tests start inherit them. Each can be overridden from outside.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib

MOST_MAPS = 30_000
ROOT = pathlib.Path(__file__).resolve().parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A second run of the suite finds its compiled programs here; `make clean` removes them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most of the suite's time goes to compiling programs that then run for milliseconds:
# this halves it. Not on a GPU, whose kernels are tested as users run them, and in no
# benchmark; `XLA_FLAGS= pytest` goes without.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # gone since
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
# No test asks the hub, whatever network there is.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Silent broadcasting over ranks and silent casts are how shape bugs hide.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example of a property compiles, so neither its time nor the slow start of
# generation says anything about the property.
hypothesis.settings.register_profile(
    "jpaged",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jpaged")

# A helper of tests that need triton; collecting it for doctests would import it.
collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore.append("support/attention/triton_interpreter.py")

HUGGINGFACE_MISSING = [
    name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked `huggingface`, with the reason, where the extra is missing."""
    for item in items:
        if HUGGINGFACE_MISSING and item.get_closest_marker("huggingface"):
            reason = f"needs {' and '.join(HUGGINGFACE_MISSING)}: extra `huggingface`"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _few_memory_maps():
    """Forgets compiled programs before the process has more maps than Linux allows.

    Each program on a CPU is several maps, and at vm.max_map_count (often 65,530) XLA
    ends the process. What is needed again comes from the compilation cache.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.collect()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_torch_thread():
    """Threads that wait for each other make a tiny model a hundred times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
