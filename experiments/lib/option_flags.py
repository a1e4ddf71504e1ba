"""Option flags: flags of a runner from the options of the simulator's registries.

Pipeline: registries -> [option_flags] -> flags of `simulate`, `predict` and `paper`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from absl import flags

from jpaged.simulator.options import Option


def define_option_flags(options: Iterable[Option]) -> None:
    """Define a flag for each option, once for options of the same name.

    A flag that is not given has the value None, or [] for "floats".
    """
    for option in {one.name: one for one in options}.values():
        name, text, minimum = option.name, option.help, option.minimum
        if option.kind == "floats":
            flags.DEFINE_multi_float(name, [], text)
        elif option.kind == "float":
            flags.DEFINE_float(name, None, text, lower_bound=minimum)
        elif option.kind == "int":
            least = None if minimum is None else int(minimum)
            flags.DEFINE_integer(name, None, text, lower_bound=least)
        elif option.kind == "bool":
            flags.DEFINE_bool(name, None, text)
        elif option.choices:
            flags.DEFINE_enum(name, None, list(option.choices), text)
        else:
            flags.DEFINE_string(name, None, text)


def given_options(
    flag: str, chosen: str, entries: Mapping[str, Iterable[Option]]
) -> dict[str, Any]:
    """Return the values of the options of an entry that are given as flags.

    Args:
      flag: name of the flag that chooses the entry.
      chosen: name of the chosen entry.
      entries: the options of each entry, by name.

    Raises:
      ValueError: an option of another entry is given.
    """
    allowed = {option.name for option in entries[chosen]}
    owners: dict[str, list[str]] = {}
    for entry, options in entries.items():
        for option in options:
            owners.setdefault(option.name, []).append(entry)
    given = {name: flags.FLAGS[name].value for name in owners}
    given = {name: value for name, value in given.items() if value not in (None, [])}
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(
                f"--{name}: expected none with --{flag} {chosen}, as it is an option "
                f"of {', '.join(owners[name])}; got {value!r}"
            )
    return given
