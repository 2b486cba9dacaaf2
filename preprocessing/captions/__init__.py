"""Caption files that people have, as one manifest of pairs: `prepare` is the door."""

from preprocessing.captions.items import Fields
from preprocessing.captions.report import Report
from preprocessing.captions.splits import Shares
from preprocessing.captions.writing import names_in_store, normalise, prepare

__all__ = ["Fields", "Report", "Shares", "names_in_store", "normalise", "prepare"]
