"""`python -m moesif_otel` is the command `moesif-otel`."""

from __future__ import annotations

import sys

from moesif_otel.cli import main

if __name__ == "__main__":
    sys.exit(main())
