"""Writes the notebooks: shared parts into the texts, and the .ipynb files from them.

    python docs/notebooks/build.py          # after a change of a .md file here
    python docs/notebooks/build.py --check  # only says what is not in step

The text, MyST Markdown, is the source. The .ipynb file, without outputs, is what Colab
opens. `_parts.md` has the parts that all notebooks share.
"""

import pathlib
import re
import sys

import jupytext
import nbformat

FOLDER = pathlib.Path(__file__).resolve().parent
BADGE = re.compile(r"^\[!\[Open in Colab\].*$", re.MULTILINE)
INSTALL = re.compile(
    r"<!-- install: (?P<extras>[\w,]+)(?P<more>;[^\n]*)? -->\n.*?(?=<!-- /install)",
    re.DOTALL,
)
CELL = r"```\{{code-cell\}} ipython3\n:tags: \[{tags}\]\n\n(?P<code>.*?)```$"
TAGS = {"pip": "install, skip-execution", "check": "check-jax"}


def parts() -> dict[str, str]:
    """Return the sections of `_parts.md`, by heading; of a fence only the code."""
    text = (FOLDER / "_parts.md").read_text("utf-8")
    found = {}
    pieces = re.split(r"^## (badge|install|pip|check)\n\n", text, flags=re.MULTILINE)
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        fence = re.search(r"```python\n(.*?)```", body, re.DOTALL)
        found[name] = fence[1] if fence else body.strip() + "\n"
    return found


def with_parts(text: str, name: str) -> str:
    """Return the text of a notebook with the shared parts in their places.

    Raises:
      ValueError: the text has no place for a part.
    """
    shared = parts()
    extras = INSTALL.search(text)
    if extras is None:
        raise ValueError(f"{name}: expected <!-- install: EXTRAS -->, got none")
    text, found = BADGE.subn(shared["badge"].strip().replace("NAME", name), text, 1)
    counts = {"badge": found}
    first = extras[0].partition("\n")[0]
    install = f"{first}\n\n{shared['install']}\n"
    text, counts["install"] = INSTALL.subn(lambda _: install, text, 1)
    for part, tags in TAGS.items():
        cell = re.compile(CELL.format(tags=tags), re.DOTALL | re.MULTILINE)
        code = shared[part].replace("EXTRAS", extras["extras"])
        code = code.replace("MORE", extras["more"] or "")
        whole = f"```{{code-cell}} ipython3\n:tags: [{tags}]\n\n{code}```"
        text, counts[part] = cell.subn(lambda _, whole=whole: whole, text, 1)
    for part, count in counts.items():
        if not count:
            raise ValueError(f"{name}: expected a place for the part {part}, got none")
    return text


def notebook_of(text: str) -> str:
    """Return the .ipynb file of a text."""
    notebook = jupytext.reads(text, fmt="md:myst")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata = {
        "colab": {"provenance": []},
        "kernelspec": {"display_name": "Python 3", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def files() -> dict[pathlib.Path, str]:
    """Return what each file of the folder should contain."""
    wanted = {}
    for path in sorted(FOLDER.glob("[!_]*.md")):
        text = with_parts(path.read_text("utf-8"), path.stem)
        wanted[path] = text
        wanted[path.with_suffix(".ipynb")] = notebook_of(text)
    return wanted


def main(arguments: list[str]) -> int:
    """Write the files that differ, or only name them."""
    changed = [
        (path, text)
        for path, text in files().items()
        if not path.exists() or path.read_text("utf-8") != text
    ]
    for path, text in changed:
        print(path.name)
        if "--check" not in arguments:
            path.write_text(text, "utf-8")
    return int(bool(changed) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
