"""What all runners share: start, help, messages, tables, figures and the JSON line.

A runner is a module `experiments.NAME` with two functions: `define_flags()` defines its
absl flags, and `main(argv)` does the work. Its last lines are

    if __name__ == "__main__":
        runner.start(main, define_flags)

so that importing a runner defines no flags. Results go to stdout, and the last line of
stdout is one JSON object. Progress and error messages go to stderr.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import logging
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax
import jax
import jaxlib.version
import numpy as np
from absl import app, flags

from jpaged.plot import style

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # flags defined here belong to the runner that asks for them

_SHORT_HELP = {"--help", "-help", "-h", "--helpshort", "-helpshort"}
_FULL_HELP = {"--helpfull", "-helpfull"}


def start(
    main: Callable[[list[str]], int | None],
    define_flags: Callable[[], None],
    *,
    argument_flag: str | None = None,
    takes_arguments: bool = False,
) -> None:
    """Runs a runner: defines and parses its flags, calls `main`, and exits.

    Args:
      main: Does the work. Its result is the exit status; None is 0.
      define_flags: Defines the runner's flags.
      argument_flag: The flag to suggest if a positional argument is given.
      takes_arguments: Whether positional arguments are passed on to `main`.
    """
    os.environ.setdefault("MPLBACKEND", "agg")  # figures are files
    # At a lower level jax reports every accelerator that it does not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    define_flags()
    parser = functools.partial(
        parse, argument_flag=argument_flag, takes_arguments=takes_arguments
    )
    app.run(main, flags_parser=parser)


def parse(
    argv: list[str], *, argument_flag: str | None = None, takes_arguments: bool = False
) -> list[str]:
    """Parses a command line and returns the program's name and positional arguments.

    `--help` prints the runner's docstring and flags and exits with status 0, where absl
    alone exits with 1. See `start` for the other arguments.

    Raises:
      SystemExit: help was requested, a flag is invalid, an argument is unexpected, or a
        file of `check_outputs` cannot be written.
    """
    own = argv[1 : argv.index("--")] if "--" in argv else argv[1:]
    if _FULL_HELP.intersection(own):
        app.usage(writeto_stdout=True, exitcode=0)
    if _SHORT_HELP.intersection(own):
        app.usage(shorthelp=True, writeto_stdout=True, exitcode=0)
    arguments = app.parse_flags_with_usage(argv)
    if len(arguments) > 1 and not takes_arguments:
        hint = f"; pass it as --{argument_flag}" if argument_flag else ""
        name = pathlib.Path(argv[0]).stem
        sys.exit(f"{name}: expected flags only, got {arguments[1]!r}{hint}")
    with user_errors(pathlib.Path(argv[0]).stem, ImportError):
        check_outputs()
    return arguments


def check_outputs() -> None:
    """Checks, before the work, that the files of `--plot` and `--csv` can be written.

    Raises:
      ImportError: A figure was asked for, and matplotlib is missing.
      ValueError: The folder of a file does not exist.
    """
    files = {flag: getattr(FLAGS, flag, None) for flag in ("plot", "csv")}
    if files["plot"] is not None:
        style.pyplot()
    for flag, file in files.items():
        folder = pathlib.Path(file or ".").parent
        if not folder.is_dir():
            raise ValueError(
                f"--{flag}: expected a file in an existing folder, got {file!r}; "
                f"create {str(folder)!r} first"
            )


@contextlib.contextmanager
def user_errors(name: str, *others: type[Exception]) -> Iterator[None]:
    """Turns errors in what the user gave into one line on stderr and exit status 1.

    Args:
      name: The runner's name, which starts the line.
      *others: Exceptions to report beside ValueError and OSError.
    """
    try:
        yield
    except (ValueError, OSError, *others) as error:
        sys.exit(f"{name}: {error}")


def positive_integers(flag: str, default: Sequence[str] = ()) -> list[int]:
    """The values of a list flag as integers.

    Args:
      flag: The flag's name.
      default: Used if the flag is None.

    Raises:
      ValueError: The list is empty, or a value is not an integer of at least 1.
    """
    given = getattr(FLAGS, flag)
    values = default if given is None else given
    if not values or not all(value.isdecimal() and int(value) for value in values):
        raise ValueError(f"--{flag}: expected integers of at least 1, got {values}")
    return [int(value) for value in values]


def some_of(flag: str, given: Sequence[str] | None, names: Sequence[str]) -> list[str]:
    """The names that a list flag selects: all of `names` if it is None.

    Raises:
      ValueError: The flag has a name that does not exist, or is empty.
    """
    if given is None:
        return list(names)
    unknown = [name for name in given if name not in names]
    if unknown or not given:
        got = repr(unknown[0]) if unknown else "none"
        raise ValueError(f"--{flag}: expected some of {', '.join(names)}, got {got}")
    return list(given)


def flag_values(module: str) -> dict[str, Any]:
    """The values of a runner's own flags, for its JSON line.

    Args:
      module: The runner's `__name__`.
    """
    return {flag.name: flag.value for flag in FLAGS.get_key_flags_for_module(module)}


def environment() -> dict[str, Any]:
    """Device, machine and versions: what a reader of a figure must know."""
    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind}",
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.version.__version__,
            "flax": flax.__version__,
            "numpy": np.__version__,
        },
    }


def print_json(record: dict[str, Any]) -> None:
    """Prints a runner's last line: the record and the environment as one object."""
    print(json.dumps(record | environment()), flush=True)


def progress(message: str) -> None:
    """Prints a message on stderr, so that stdout has results only."""
    print(message, file=sys.stderr, flush=True)


def warn_if_small(name: str, flag: str, given: float, least: float) -> None:
    """Warns on stderr if a run is too small for its results to mean anything.

    Args:
      name: The runner's name.
      flag: The flag that sets the size.
      given: The size.
      least: The smallest size whose results mean something.
    """
    if given < least:
        progress(
            f"{name}: warning: --{flag} is {given:g}; with fewer than {least:g} the "
            "results are noise, and show only that the runner works"
        )


class Report:
    """Results of a benchmark: a table for people, and a JSON line for programs.

    The attributes are the keys of the JSON line; a runner fills those that it measures.
    """

    def __init__(self) -> None:
        self.tokens_per_s: dict[str, float] = {}
        self.steps_per_s: dict[str, float] = {}
        self.roofline_share: dict[str, float] = {}
        self.ratios: dict[str, float] = {}
        self.details: dict[str, Any] = {}

    def row(self, name: str, measured: str, beside: str = "", share: str = "") -> None:
        """Prints a line of the table.

        Args:
          name: What was measured.
          measured: The figure.
          beside: A second figure to compare it with.
          share: A ratio of the two, or a remark.
        """
        line = f"{name:<34}{measured:>16}  {beside:<34}{share}"
        print(line.rstrip(), flush=True)

    def last_line(self, flags: dict[str, Any]) -> None:
        """Prints all figures, the flags and the environment as one JSON object."""
        print_json({**vars(self), "flags": flags})


def write_csv(
    path: str | pathlib.Path, names: Sequence[str], rows: Iterable[Iterable[Any]]
) -> None:
    """Writes a CSV file.

    Args:
      path: The file.
      names: Names of the columns.
      rows: The values of each row, in the order of `names`.
    """
    with pathlib.Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])
