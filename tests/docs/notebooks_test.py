"""Notebooks as files: in step with their texts, with the cells that Colab needs."""

import importlib.util
import json
import pathlib
import re
import sys
import types

import pytest

from tests.support.paths import ROOT

FOLDER = pathlib.Path(ROOT) / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name):
    """The cells of a .ipynb file: kind, text and tags."""
    content = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    return [
        (cell["cell_type"], "".join(cell["source"]), cell["metadata"].get("tags", []))
        for cell in content["cells"]
    ]


def test_there_is_a_notebook_for_every_text():
    assert NAMES == sorted(path.stem for path in FOLDER.glob("[!_]*.md"))
    assert len(NAMES) >= 6


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_start_with_badge_pip_line_and_check(name):
    kind, text, _ = cells(name)[0]
    assert kind == "markdown"
    assert text.startswith("[![Open in Colab](")
    assert f"blob/main/docs/notebooks/{name}.ipynb)" in text.splitlines()[0]
    code = [(text, tags) for kind, text, tags in cells(name) if kind == "code"]
    pip, check = code[0], code[1]
    assert pip[1] == ["install", "skip-execution"]
    assert len(pip[0].splitlines()) == 1
    # Plug-ins for CUDA 12 are removed before jax is replaced.
    assert re.match(r"!pip uninstall -qy jax-cuda12-plugin jax-cuda12-pjrt; ", pip[0])
    assert "jpaged[cuda," in pip[0]
    assert "import jax" not in pip[0]
    assert check[1] == ["check-jax"]
    for runtime in ("T4", "L4", "A100", "TPU v5e"):
        assert runtime in text
    commands = "\n".join(text for text, _ in code)
    assert not re.search(r"git clone|^!make|experiments\.", commands, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_have_no_outputs_and_their_code_compiles(name):
    content = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            source = "".join(cell["source"])
            if not source.startswith("!"):
                compile(source, name, "exec")


@pytest.mark.parametrize(
    ("version", "message"),
    [("0.7.2", "jax 0.7.2 is loaded, but jpaged needs jax 0.10 or newer"), (None, "")],
)
def test_an_older_jax_that_is_loaded_gets_a_clear_message(
    monkeypatch, capsys, version, message
):
    check = next(text for _, text, tags in cells("quickstart") if "check-jax" in tags)
    if version is None:
        exec(check, {})
        assert "is ready" in capsys.readouterr().out
        return
    old = types.ModuleType("jax")
    old.__version__ = version
    old.__version_info__ = tuple(map(int, version.split(".")))
    monkeypatch.setitem(sys.modules, "jax", old)
    with pytest.raises(RuntimeError, match=message) as error:
        exec(check, {})
    assert "Runtime > Restart session" in str(error.value)


def build_module():
    """The module docs/notebooks/build.py."""
    spec = importlib.util.spec_from_file_location("build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebooks_are_in_step_with_their_texts():
    pytest.importorskip("jupytext", reason="needs the extra `docs`")
    build = build_module()
    for path, text in build.files().items():
        assert path.read_text("utf-8") == text, f"{path}: run {FOLDER / 'build.py'}"


def test_a_changed_text_is_noticed(monkeypatch, tmp_path):
    pytest.importorskip("jupytext", reason="needs the extra `docs`")
    build = build_module()
    for path in (FOLDER / "_parts.md", FOLDER / "paper.md", FOLDER / "paper.ipynb"):
        (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.main(["--check"]) == 0
    text = tmp_path / "paper.md"
    text.write_text(text.read_text("utf-8").replace("num_blocks=10", "num_blocks=11"))
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert "num_blocks=11" in (tmp_path / "paper.ipynb").read_text("utf-8")


def test_the_picture_of_the_readme_is_what_its_script_draws():
    path = FOLDER.parent / "images" / "draw_engine.py"
    spec = importlib.util.spec_from_file_location("draw_engine", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.FILE.read_text("utf-8") == module.draw()
    blocks = module.example()
    assert blocks.block_tables.tolist() == [[0, 2, 4], [0, 3, -1], [0, 1, -1]]
