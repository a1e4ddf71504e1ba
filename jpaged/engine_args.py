"""Engine arguments: the arguments of `LLM` as flags of a command line.

Pipeline: command line -> [engine args] -> llm. Host only.

Flags may be written with dashes or underscores (--max-model-len, --max_model_len), by
our names or by vLLM's.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Sequence
from typing import Any

from jpaged.llm import LLM
from jpaged.serving.vllm_names import LLM_ARGUMENTS, PARALLEL_NAMES

# Arguments that are objects of Python.
_NO_FLAGS = ("self", "mesh")


class FlexibleArgumentParser(argparse.ArgumentParser):
    """A parser whose flags may be written with dashes or underscores."""

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse flags, see `argparse.ArgumentParser`."""
        import sys

        given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_dashed(one) for one in given], namespace)


def _dashed(argument: str) -> str:
    """Return --some_name=value as --some-name=value."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


class EngineArgs:
    """The arguments of an LLM: `LLM(**vars(EngineArgs(model=...)))`.

    Args:
      arguments: arguments of LLM.
    """

    def __init__(self, model: Any = "tiny-python", **arguments: Any):
        self.model = model
        vars(self).update(arguments)

    @staticmethod
    def add_cli_args(parser: Any) -> Any:
        """Add a flag for each argument of LLM to an argparse parser or group.

        Flags that are not given have the default of LLM, and vLLM's names are accepted
        where there is an equal. Returns the parser.
        """
        texts = _help_texts()
        ours: dict[str, list[str]] = {}
        for name, known in LLM_ARGUMENTS.items():
            if known.ours is not None and known.convert is None:
                ours.setdefault(known.ours, []).append(name)
        for name, parameter in inspect.signature(LLM.__init__).parameters.items():
            if name in _NO_FLAGS:
                continue
            default = parameter.default
            if name == "model":
                default = "tiny-python"
            names = [_flag(one) for one in (name, *ours.get(name, ()))]
            options = _options(str(parameter.annotation))
            text = texts.get(name, "see jpaged.LLM").replace("%", "%%")
            parser.add_argument(
                *names, dest=name, default=default, help=text, **options
            )
        for name in PARALLEL_NAMES:
            text = "devices that share the model, or replicas of it"
            parser.add_argument(
                _flag(name), dest=name, type=int, default=1, metavar="N", help=text
            )
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Return the arguments of LLM among those of a parsed command line."""
        names = [*inspect.signature(LLM.__init__).parameters, *PARALLEL_NAMES]
        found = {name: value for name, value in vars(args).items() if name in names}
        return cls(**found)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"EngineArgs({values})"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(annotation: str) -> dict[str, Any]:
    """Return options of `add_argument` for the annotation of an argument."""
    kinds = [kind.strip() for kind in annotation.split("|")]
    if "bool" in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if "int" in kinds:
        return {"type": int, "metavar": "N"}
    if "float" in kinds:
        return {"type": float, "metavar": "X"}
    if annotation.startswith("Mapping"):
        return {"type": json.loads, "metavar": "JSON"}
    if annotation.startswith("Sequence"):
        return {"type": float, "nargs": "*", "metavar": "X"}
    return {"metavar": "NAME"}


def _help_texts() -> dict[str, str]:
    """Return the description of each argument from the docstring of LLM."""
    text = inspect.getdoc(LLM) or ""
    found = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", text, re.MULTILINE)
    return {name: " ".join(lines.split()) for name, lines in found}
