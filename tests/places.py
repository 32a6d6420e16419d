"""Where things lie in the checkout: one home for every test's paths."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
TINY_CODEC = ROOT / "pipeline" / "assets" / "tiny_codec"
