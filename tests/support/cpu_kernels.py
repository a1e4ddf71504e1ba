"""A mark for tests that need the C++ kernels of CPUs."""

import pytest

from jpaged.cpu import library

needs_compiler = pytest.mark.skipif(
    library.problem() is not None, reason="needs a C++ compiler"
)
