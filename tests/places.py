"""Where things lie in the checkout: one home for every test's paths."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
REFERENCE = FIXTURES / "reference"
"""Small cases of the reference implementation; see the README there."""
TRAINED_SMALL = FIXTURES / "trained_small"
"""A small trained video model in the released format, and its exact samples."""
TINY_CODEC = ROOT / "pipeline" / "assets" / "tiny_codec"
