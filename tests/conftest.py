"""Settings of every test run: the CPU, strict types and ranks, fast compilation.

The environment variables are set before jax is imported, so that processes started by
tests inherit them. Each can be overridden from outside.
"""

import gc
import importlib.metadata
import importlib.util
import os
import pathlib

from tests.support.paths import ROOT

MOST_MAPS = 30_000

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A second run of the suite loads compiled programs from here (`make clean` deletes it).
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Tests spend most of their time compiling programs that then run for milliseconds.
# These flags halve that time. They are not set on a GPU, whose kernels are tested as
# users run them, nor in benchmarks. `XLA_FLAGS= pytest` runs without them.
FAST_COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions lack it
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)
# No test accesses the hub, even if there is a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Implicit broadcasting over ranks and implicit casts hide shape bugs.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first example of a property compiles, so its time says nothing about the property.
hypothesis.settings.register_profile(
    "jpaged",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jpaged")

# This helper imports triton, and collecting it for doctests would import it.
collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore.append("support/attention/triton_interpreter.py")

HUGGINGFACE_MISSING = [
    name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `huggingface`, with the reason, if the extra is missing."""
    for item in items:
        if HUGGINGFACE_MISSING and item.get_closest_marker("huggingface"):
            reason = f"needs {' and '.join(HUGGINGFACE_MISSING)}: extra `huggingface`"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _few_memory_maps():
    """Drop compiled programs before the process has more memory maps than Linux allows.

    Each program on a CPU takes several maps, and at vm.max_map_count (often 65,530) XLA
    ends the process. Programs that are needed again come from the compilation cache.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        gc.collect()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_torch_thread():
    """Run torch on one thread; waiting threads slow down a tiny model a hundredfold."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
