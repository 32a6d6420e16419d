"""What every test needs: Ray as the product starts it."""

from __future__ import annotations

import os

# By default Ray gives its workers the lowest priority, so that any other busy process starves them.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
