"""`python -m jpaged`; see `jpaged.cli.main`."""

import sys

from jpaged.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
