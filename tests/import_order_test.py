"""Layers import downwards only: the map of the project, kept true.

Read from the syntax tree, so nothing is imported here. A module in a function or under
`if TYPE_CHECKING` counts like any other.
"""

import ast
import graphlib
import pathlib
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The map, from the ground up: each room, and the rooms below it whose doors it may
# open. A package (models, decoding, ...) is one room. `jpaged/__init__.py` may import
# all.
# fmt: off
ROOMS = {
    # room:              what it may import
    "compat":            [],
    # who is admitted first: scores of arrays, no room below
    "policies":          [],
    "config":            ["compat", "policies"],
    "requests":          ["compat", "config"],
    "compilation_cache": ["compat"],
    "bundled":           ["compat"],
    "text":              ["compat", "config", "requests"],
    "chat":              [],
    "conversations":     ["text", "chat"],
    "parallel":          ["compat", "config"],
    # the processes of several hosts
    "distributed":       [],
    # which tokens live where, and who runs: lengths and tables, no activations
    "block_manager":     ["compat", "config"],
    "prefix_cache":      ["compat", "block_manager"],
    # rows that go to the host's memory and come back
    "swap":              ["compat", "block_manager"],
    "scheduler":         ["compat", "config", "policies", "block_manager", "swap"],
    # which rows begin with the same blocks, by the tables alone
    "shared_prefix":     [],
    # the whole contract between that half and the next
    "step_inputs":       ["compat", "config", "block_manager", "shared_prefix"],
    # memory and arithmetic: pages and activations, no requests
    "quantised_pages":   [],
    "packed_pages":      [],
    # which of the three serves a call
    "implementations":   ["packed_pages", "quantised_pages"],
    # what kernels take in place of None
    "defaults":          [],
    # tile sizes by device and shape
    "tuned":             [],
    "xla":               ["compat", "quantised_pages", "shared_prefix", "tuned"],
    "pallas":            ["compat", "defaults", "implementations", "packed_pages",
                          "tuned"],
    "triton":            ["compat", "defaults", "quantised_pages", "tuned"],
    # shared beginnings read once, by any kernel's plain attention
    "cascade":           ["compat", "shared_prefix", "xla"],
    "reference":         ["quantised_pages", "xla"],
    "attention_checks":  ["packed_pages"],
    "attention":         ["compat", "config", "xla", "pallas", "triton", "cascade",
                          "reference", "attention_checks", "implementations",
                          "packed_pages", "quantised_pages", "shared_prefix"],
    "kv_cache":          ["compat", "config", "block_manager", "implementations",
                          "quantised_pages", "attention"],
    "models":            ["compat", "config", "bundled", "parallel", "step_inputs",
                          "attention", "kv_cache"],
    # logits in, tokens and parents out: never sees a block
    "decoding":          ["compat"],
    # what a text must be, as a table that the decoder reads; host only
    "structured":        ["compat", "config", "requests", "text", "decoding"],
    # the halves meet: sequences as arrays, a step's arithmetic, the step and its loop
    "request_table":     ["compat", "config", "block_manager", "scheduler", "decoding"],
    "groups":            ["compat", "config", "block_manager", "scheduler", "decoding",
                          "request_table"],
    "request_limits":    ["config", "requests", "scheduler", "decoding",
                          "request_table", "groups"],
    "submission":        ["config", "requests", "scheduler", "decoding",
                          "request_table", "groups", "request_limits"],
    "forward":           ["compat", "config", "parallel", "block_manager",
                          "shared_prefix", "step_inputs", "attention", "kv_cache",
                          "models", "request_table"],
    "next_tokens":       ["compat", "config", "models", "decoding", "request_table",
                          "forward"],
    "speculation":       ["compat", "config", "block_manager", "scheduler", "kv_cache",
                          "models", "decoding", "request_table", "forward",
                          "next_tokens"],
    "timeline":          ["compat", "config", "block_manager", "scheduler",
                          "request_table"],
    "sharded":           ["parallel", "kv_cache", "models"],
    "engine_state":      ["compat", "policies", "config", "parallel", "sharded",
                          "block_manager", "prefix_cache", "scheduler", "kv_cache",
                          "models", "request_table", "groups", "speculation",
                          "timeline"],
    "iteration":         ["compat", "config", "parallel", "block_manager",
                          "prefix_cache", "swap", "scheduler", "kv_cache", "models",
                          "request_table", "groups", "forward", "next_tokens",
                          "speculation", "timeline", "engine_state"],
    "engine":            ["config", "parallel", "sharded", "block_manager",
                          "prefix_cache", "scheduler", "request_table", "groups",
                          "request_limits", "submission", "speculation",
                          "engine_state", "iteration"],
    "snapshots":         ["config", "parallel", "distributed", "scheduler", "models",
                          "decoding", "request_table", "request_limits", "speculation",
                          "engine_state"],
    # the host shell: what users hand in, the clock, text; below the engine, then above
    "memory":            ["config", "parallel", "distributed", "kv_cache", "models"],
    "scoring":           ["models"],
    "options":           ["config", "parallel", "distributed", "sharded", "text",
                          "attention", "models", "quantised_pages"],
    "intake":            ["config", "requests", "text", "models", "decoding", "groups",
                          "request_limits", "structured", "engine"],
    "metrics":           [],
    # what the host sees of the state, and keeps of its timelines
    "readout":           ["parallel", "sharded", "block_manager", "prefix_cache",
                          "timeline", "engine"],
    "step_log":          ["timeline", "metrics"],
    "serving":           ["config", "parallel", "distributed", "sharded", "models",
                          "scheduler", "request_table", "groups", "request_limits",
                          "submission", "engine_state", "engine", "metrics",
                          "readout", "step_log"],
    "routing":           [],
    "prefix":            ["text", "serving"],
    "jobs":              ["requests", "text", "request_table", "request_limits",
                          "metrics", "readout"],
    "batch":             ["config", "requests", "scheduler", "request_table",
                          "request_limits", "submission", "metrics", "routing",
                          "readout", "serving", "jobs"],
    "live":              ["requests", "jobs", "batch"],
    "llm":               ["config", "policies", "requests", "compilation_cache",
                          "bundled", "text", "parallel", "models", "conversations",
                          "scoring", "request_limits", "engine", "memory", "options",
                          "intake", "metrics", "serving", "prefix", "jobs", "batch",
                          "live"],
    # the same scheduler and block manager on a simulated clock: no model, no pages
    "simulator":         ["compat", "policies", "config", "requests", "block_manager",
                          "scheduler",
                          "kv_cache", "models", "decoding", "request_table", "groups",
                          "submission", "timeline", "engine_state", "iteration",
                          "engine"],
}
# fmt: on

# What a package from PyPI is called in Python, where the two names differ.
IMPORT_NAMES = {"absl-py": "absl", "orbax-checkpoint": "orbax"}


# Modules of an extra, which nothing imports before the extra is used.
OF_EXTRAS = {"jpaged.triton.kernels": {"triton"}}


def module_name(path: pathlib.Path) -> str:
    """jpaged/models/config.py -> "jpaged.models.config"; an __init__ is its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "jpaged").rglob("*.py"))}


def imported(
    module: str, path: pathlib.Path, source: str, modules: set[str]
) -> set[str]:
    """Every module that a file imports, absolute; `from a import b` gives a.b if a
    module has that name, else a."""
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


def room(module: str) -> str | None:
    """ "jpaged.models.config" -> "models"; None for `jpaged` itself."""
    return module.split(".")[1] if "." in module else None


def complaints(imports: dict[str, set[str]]) -> list[str]:
    """One sentence for each import that the map does not allow."""
    wrong = []
    for module, targets in imports.items():
        here = room(module)
        if here is not None and here not in ROOMS:
            wrong.append(
                f"{module}: not on the map. Add a row `{here!r}: [rooms below it]` "
                "to ROOMS in tests/import_order_test.py, at its height."
            )
        for target in sorted(targets):
            top, there = target.split(".")[0], room(target)
            if top in ("experiments", "tests"):
                wrong.append(f"{module} imports {target}: jpaged stands on its own")
            if top != "jpaged" or here is None or here not in ROOMS:
                continue
            if there is None:
                wrong.append(
                    f"{module} imports the package jpaged, which imports everything: "
                    "import the module that defines the name"
                )
            elif there != here and there not in ROOMS[here]:
                wrong.append(
                    f"{module} imports {target}, but {here!r} may import only "
                    f"{ROOMS[here]}"
                )
    return wrong


def test_every_module_imports_only_what_lies_below_it():
    assert complaints(IMPORTS) == []


def test_each_room_on_the_map_opens_only_doors_of_rooms_above_it_in_the_list():
    order = list(ROOMS)
    for here, below in ROOMS.items():
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
        ("jpaged.decoding.beam", "from jpaged import LLM", "imports everything"),
        ("jpaged.engine", "import experiments.generate", "stands on its own"),
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
    """Top-level names that a file imports as soon as it is itself imported."""
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


def test_modules_of_extras_are_imported_by_no_module_of_the_product():
    assert not set(OF_EXTRAS) & set().union(*IMPORTS.values())


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
        extra -= OF_EXTRAS.get(module, set())
        assert not extra, (
            f"{module} imports {sorted(extra)}, not among the dependencies in "
            "pyproject.toml: import it inside the function that needs it"
        )
