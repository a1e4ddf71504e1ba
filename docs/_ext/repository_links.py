"""Sphinx extension: links to files outside of docs/ point to the repository.

The pages are read on GitHub too, where `../jpaged/llm.py` is a link to the file. On the
site it becomes a link to the same file on GitHub. A README lists the other pages of its
folder, which GitHub shows as files. A page in docs/ that the index does not list yet is
listed at its end.
"""

import pathlib
import re

from sphinx.application import Sphinx

REPOSITORY = "https://github.com/jpaged/jpaged/blob/main"
LINK = re.compile(r"\]\((?P<target>\.\./[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")
# Files outside of docs/ that have a page on the site.
PAGES = {"CHANGELOG.md": "changelog.md"}
# The README of a folder is the parent of the folder's other pages.
TOCTREE = "\n```{{toctree}}\n:hidden:\n{}\n```\n"


def with_repository_links(text: str, page: pathlib.PurePosixPath) -> str:
    """Replace relative links that leave docs/ by links to the repository.

    Args:
      text: Markdown.
      page: path of the page below docs/.

    >>> with_repository_links("[a](../jpaged/llm.py)", pathlib.PurePosixPath("x.md"))
    '[a](https://github.com/jpaged/jpaged/blob/main/jpaged/llm.py)'
    >>> with_repository_links("[a](../b.md#c)", pathlib.PurePosixPath("decisions/x.md"))
    '[a](../b.md#c)'
    >>> with_repository_links("[a](../CHANGELOG.md)", pathlib.PurePosixPath("x.md"))
    '[a](changelog.md)'
    """
    depth = len(page.parts) - 1

    def replace(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        ups = len(re.match(r"(?:\.\./)*", target)[0]) // 3
        if ups <= depth:
            return match[0]
        inside = target[3 * ups :]
        if inside in PAGES:
            return f"]({'../' * depth}{PAGES[inside]}{anchor})"
        return f"]({REPOSITORY}/{inside}{anchor})"

    return LINK.sub(replace, text)


def pages_without_place(text: str, folder: pathlib.Path) -> list[str]:
    """List the pages of a folder that the text of its index does not name in a line."""
    names = {path.stem for path in pathlib.Path(folder).glob("*.md")} - {"index"}
    return sorted(names - set(text.splitlines()))


def _on_source_read(app: Sphinx, docname: str, source: list[str]) -> None:
    page = pathlib.PurePosixPath(docname)
    source[0] = with_repository_links(source[0], page)
    if page.name == "README":
        source[0] += TOCTREE.format(":glob:\n\n*")
    if docname == "index" and (others := pages_without_place(source[0], app.srcdir)):
        source[0] += TOCTREE.format(":caption: More\n\n" + "\n".join(others))


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the extension."""
    app.connect("source-read", _on_source_read)
    return {"parallel_read_safe": True}
