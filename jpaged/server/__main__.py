"""Command line of the server.

    python -m jpaged.server --model tiny-python --port 8000

Pipeline: command line -> [__main__] -> LLM, app and uvicorn.
"""

from __future__ import annotations

import sys

MISSING = """\
jpaged.server needs packages that are not installed ({error}).
Install them with: pip install "jpaged[server]"
"""

try:
    import prometheus_client as _prometheus_client  # noqa: F401
    import starlette as _starlette  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as error:
    sys.exit(MISSING.format(error=error))

from jpaged.server.command import main  # noqa: E402

if __name__ == "__main__":
    main()
