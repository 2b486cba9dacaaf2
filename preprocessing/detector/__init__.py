"""Faster R-CNN detectors: `load_detector` reads the weights of any known layout."""

from preprocessing.detector.detector import load_detector

__all__ = ["load_detector"]
