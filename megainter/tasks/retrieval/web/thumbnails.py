"""Pictures as browsers get them: made anew from an image's pixels, small, without what a camera wrote beside them."""

import threading
from collections import OrderedDict
from pathlib import Path

from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.pictures import ImageFiles
from megainter.view.pictures import small_jpeg
from preprocessing.images.decode import confined, load_image

SIZES = {"small": 480, "large": 1280}  # pixels of the longer side at most
KEPT_BYTES = 64 << 20


class Thumbnails:
    """JPEGs of an index's images; those asked for of late are kept. For several threads."""

    def __init__(self, index: Index, folder: Path) -> None:
        self.files = ImageFiles(index, folder)
        self._kept: OrderedDict[tuple[int, str], bytes] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def get(self, row: int, size: str) -> bytes:
        """``UnreadableImageError`` where the file is no image, is gone, or lies outside the folder, links included."""
        key = row, size
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = small_jpeg(load_image(confined(self.files.folder, self.files.of(row)), draft=True), SIZES[size])
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self._bytes += len(made)
            while self._bytes > KEPT_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return made
