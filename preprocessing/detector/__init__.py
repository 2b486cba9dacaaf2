"""Detectors: `load_detector` reads the weights of any known layout, and takes those that come along by name.

Imported only when it is asked for, so that settings can be read without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from preprocessing.detector.detector import load_detector as load_detector

__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from preprocessing.detector.detector import load_detector

    return load_detector
