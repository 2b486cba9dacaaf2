"""Caption files that people have, as one manifest of pairs: `prepare` is the door."""

from preprocessing.captions.items import Fields, Report
from preprocessing.captions.writing import normalise, prepare

__all__ = ["Fields", "Report", "normalise", "prepare"]
