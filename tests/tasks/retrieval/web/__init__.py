"""Skipped as a whole where the extra is not there."""

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed: pip install 'megainter[serve]'")
