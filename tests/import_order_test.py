"""Imports point one way: the map of the project, checked.

The imports are read from the syntax trees, so nothing is imported here. Imports inside
functions or under `if TYPE_CHECKING` count like any other.
"""

import ast
import graphlib
import pathlib
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The map, lowest layer first: each folder (or module) of `jpaged/`, and the layers
# below it that it may import. `jpaged/__init__.py` may import all.
# fmt: off
LAYERS = {
    # layer:             what it may import, besides these two
    "arithmetic":        [],
    "indexing":          [],
    "compat":            [],
    "compilation_cache": ["compat"],
    # headers of GGUF files; host only
    "gguf_file":         [],
    # messages and progress bars on stderr; host only
    "log":               [],
    "progress":          [],
    # names of arguments, and those of other libraries; host only
    "names":             [],
    "foreign_params":    ["names"],
    # checks of argument values; host only
    "validation":        [],
    # scores of arrays: who is admitted first
    "policies":          [],
    # logits in, tokens and parents out: never sees a block
    "decoding":          ["compat", "validation"],
    # which blocks of a sequence stay: scores of blocks
    "retention":         [],
    "config":            ["compat", "policies", "decoding", "retention"],
    "param_checks":      ["validation", "decoding"],
    "params":            ["compat", "config", "validation", "param_checks", "names",
                          "foreign_params", "decoding"],
    "outputs":           [],
    "prompts":           [],
    # meshes and processes
    "parallel":          ["compat", "config"],
    # tokenizers and chat templates; host only
    "text":              ["compat", "gguf_file", "validation", "config", "params"],
    # which tokens live where: block tables and lengths, no activations
    "kv":                ["compat", "policies", "config"],
    # the public name of kv.block_manager
    "block_manager":     ["kv"],
    # which requests run in a step, with how many tokens
    "scheduler":         ["compat", "config", "policies", "kv"],
    # what attention backends share: record, operands, page layouts, tile sizes
    "pages":             ["kv"],
    # backends: kernels, and a record of each in its `backend.py`
    "xla":               ["compat", "kv", "pages"],
    "cpu":               ["compilation_cache", "log", "pages", "xla"],
    "pallas":            ["compat", "pages", "xla"],
    "triton":            ["compat", "pages"],
    # the public attention functions over all kernels
    "attention":         ["compat", "config", "kv", "pages", "xla", "cpu",
                          "pallas", "triton"],
    "models":            ["compat", "gguf_file", "progress", "config", "parallel", "kv",
                          "pages", "attention"],
    # regexes and schemas as automata over tokens; host only
    "structured":        ["compat", "config", "params", "text", "decoding"],
    # the engine's state, its step and its loop: pure functions
    "engine":            ["compat", "validation", "policies", "retention", "config",
                          "params",
                          "parallel", "kv", "scheduler", "attention", "models",
                          "decoding"],
    # trees of texts in the engine's pool: pure functions
    "search":            ["compat", "names", "validation", "param_checks", "config",
                          "kv", "attention", "models", "decoding", "engine"],
    # the host side: requests of all callers, clock, statistics
    "serving":           ["compat", "log", "progress", "names", "validation",
                          "param_checks", "policies", "retention", "config", "params",
                          "prompts",
                          "outputs", "parallel", "text", "kv", "scheduler",
                          "pages", "cpu", "attention", "models", "decoding",
                          "structured", "engine", "search"],
    "llm":               ["progress", "names", "validation", "config", "policies",
                          "retention",
                          "params", "prompts", "outputs", "compilation_cache", "text",
                          "parallel", "models", "engine", "search", "serving"],
    # around rollouts: pure functions, and tunix's interface
    "rl":                ["decoding", "params", "outputs", "models", "serving", "llm"],
    # vLLM's names of modules, and its arguments as flags of a command line
    "sampling_params":   ["params"],
    "inputs":            ["prompts"],
    "engine_args":       ["llm", "serving"],
    "utils":             ["engine_args"],
    # figures, with the extra `plot`
    "plot":              ["kv", "outputs", "serving"],
    # `python -m jpaged`
    "cli":               ["log", "progress", "names", "engine", "params", "outputs",
                          "serving", "llm", "engine_args"],
    "__main__":          ["cli"],
    # HTTP in front of an LLM; needs the extra `server`
    "server":            ["validation", "params", "outputs", "parallel", "text",
                          "structured", "serving", "llm"],
    # harnesses that evaluate an LLM; `lm_eval` needs the extra of that name
    "evals":             ["validation", "params", "outputs", "text", "models",
                          "engine", "llm"],
    # the engine's step on a virtual clock: no model, no pages
    "simulator":         ["compat", "policies", "config", "params", "parallel", "kv",
                          "scheduler", "attention", "models", "decoding", "engine"],
}
# fmt: on

# The Python names of packages whose name on PyPI differs.
IMPORT_NAMES = {
    "absl-py": "absl",
    "google-tunix": "tunix",
    "orbax-checkpoint": "orbax",
}


# Modules, or packages of them, that need an extra. Only they import each other.
OF_EXTRAS = {
    "jpaged.triton.kernels": {"triton"},
    "jpaged.server": {"starlette", "uvicorn", "prometheus_client"},
    "jpaged.evals.lm_eval": {"lm_eval"},
    "jpaged.rl.tunix": {"tunix"},
}


def module_name(path: pathlib.Path) -> str:
    """jpaged/models/config.py -> "jpaged.models.config"; an __init__ is its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "jpaged").rglob("*.py"))}


def imported(
    module: str, path: pathlib.Path, source: str, modules: set[str]
) -> set[str]:
    """The absolute names of all modules that a file imports.

    `from a import b` counts as a.b if there is a module of that name, else as a.
    """
    package = module.split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package[: len(package) - node.level + 1]
                base = ".".join([*up, *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in modules else base)
    return found


IMPORTS = {
    module: imported(module, path, path.read_text("utf-8"), set(MODULES))
    for module, path in MODULES.items()
}


def layer(module: str) -> str | None:
    """ "jpaged.models.config" -> "models"; None for `jpaged` itself."""
    return module.split(".")[1] if "." in module else None


def complaints(imports: dict[str, set[str]]) -> list[str]:
    """Describe each import that the map does not allow, in one sentence."""
    wrong = []
    for module, targets in imports.items():
        here = layer(module)
        if here is not None and here not in LAYERS:
            wrong.append(
                f"{module}: not on the map. Add a row `{here!r}: [layers below it]` "
                "to LAYERS in tests/import_order_test.py, above what imports it."
            )
        for target in sorted(targets):
            top, there = target.split(".")[0], layer(target)
            if top in ("experiments", "tests"):
                wrong.append(f"{module} imports {target}: jpaged must not depend on it")
            if top != "jpaged" or here is None or here not in LAYERS:
                continue
            if there is None:
                wrong.append(
                    f"{module} imports the package jpaged, which imports everything: "
                    "import the module that defines the name"
                )
            elif there not in (here, "arithmetic", "indexing", *LAYERS[here]):
                wrong.append(
                    f"{module} imports {target}, but {here!r} may import only "
                    f"{LAYERS[here]}"
                )
    return wrong


def test_every_module_imports_only_lower_layers():
    assert complaints(IMPORTS) == []


def test_each_layer_lists_only_layers_that_come_before_it():
    order = list(LAYERS)
    for here, below in LAYERS.items():
        assert set(below) <= set(order[: order.index(here)]), here


def test_no_two_modules_import_each_other_even_inside_a_package():
    graph = {
        module: {target for target in targets if target in MODULES} - {module}
        for module, targets in IMPORTS.items()
        if module != "jpaged"
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("jpaged.scheduler", "from jpaged import engine", "'scheduler' may import"),
        ("jpaged.scheduler", "from .engine import step", "'scheduler' may import"),
        ("jpaged.models.decoder", "from ..llm import LLM", "'models' may import"),
        ("jpaged.config", "def f():\n    import jpaged.llm", "'config' may import"),
        ("jpaged.kv.swap", "from jpaged.engine import state", "'kv' may import"),
        ("jpaged.decoding.beam", "from jpaged import LLM", "imports everything"),
        ("jpaged.engine", "import experiments.generate", "must not depend on it"),
        ("jpaged.attic", "import jax", "Add a row `'attic'"),
    ],
)
def test_a_planted_import_upwards_is_found(module, source, complaint):
    path = ROOT / (module.replace(".", "/") + ".py")
    known = {*MODULES, "jpaged.engine", "jpaged.llm", "jpaged.scheduler"}
    found = complaints({module: imported(module, path, source, known)})
    assert len(found) == 1
    assert complaint in found[0]


def imported_on_load(tree: ast.Module) -> set[str]:
    """Top-level packages that are imported when a file is imported."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return found


def extra_of(module: str) -> str | None:
    """The entry of OF_EXTRAS that has a module."""
    found = (name for name in OF_EXTRAS if f"{module}.".startswith(f"{name}."))
    return next(found, None)


def test_only_modules_of_an_extra_import_modules_that_need_it():
    for module, targets in IMPORTS.items():
        for target in targets:
            assert extra_of(target) in (None, extra_of(module)), (module, target)


def test_a_plain_installation_can_import_every_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = [
        requirement.split(">=")[0].split("[")[0].strip()
        for requirement in project["dependencies"]
    ]
    declared = {IMPORT_NAMES.get(name, name) for name in names}
    known = declared | set(sys.stdlib_module_names) | {"jpaged"}
    for module, path in MODULES.items():
        extra = imported_on_load(ast.parse(path.read_text("utf-8"))) - known
        extra -= OF_EXTRAS.get(extra_of(module), set())
        assert not extra, (
            f"{module} imports {sorted(extra)}, not among the dependencies in "
            "pyproject.toml: import it inside the function that needs it"
        )
