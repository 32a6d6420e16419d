"""`python -m pipeline.cli`: the command where no script is installed, as in a job of a cluster."""

from __future__ import annotations

import sys

from pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
