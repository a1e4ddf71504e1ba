"""For pytest: modules of an extra have no doctests to collect where it is missing."""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore.append("jpaged/triton/kernels.py")
