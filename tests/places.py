"""Where things are: the checkout, and the shared inputs beside it (absent for a stranger: tests that need them say so and skip)."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
