"""The index: a folder with the vectors, ids and captions of all images, mapped into memory and never changed once it is there.

Shape letters: I images, C captions, D width of a vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from megainter.config.settings import STRICT
from megainter.data.mapped import DESCRIPTION, open_arrays
from megainter.errors import UsageError
from megainter.tasks.retrieval.search.checks import require_index

KEY = "megainter search index 1"
DTYPES: Mapping[str, str] = MappingProxyType(
    {"image_vectors": "float32", "caption_vectors": "float32", "caption_starts": "int64", "image_of_caption": "int32"}
)
STRINGS = ("image_ids", "files", "pair_ids", "captions")


@checked(frozen=True, config=STRICT)
class IndexFacts:
    """What an index was made from, as its index.json says.

    Paths are absolute, digests those of what lay there; ``detector`` is the fingerprint that the store names. ``missing`` captions were
    left out because their images have no regions. Without ``pairs`` all images of the store are there, and no captions. ``images`` and
    ``weights``: where pictures and the detector's weights are, if that was said.
    """

    model: str
    model_digest: str
    prefilter: str
    prefilter_digest: str
    store: str
    store_digest: str
    detector: str
    pairs: str | None
    pairs_digest: str | None
    split: str | None
    image_count: int
    caption_count: int
    missing: int
    vector_size: int
    scale: float
    images: str | None
    weights: str | None


@dataclass(frozen=True, eq=False)
class Index:
    """``image_vectors`` float32 [I, D], ``caption_vectors`` float32 [C, D], both mapped; captions stand image by image, those of image i
    from ``caption_starts[i]`` to ``caption_starts[i + 1]``; ``image_of_caption`` int32 [C]."""

    path: Path
    facts: IndexFacts
    image_vectors: NDArray[np.float32]
    caption_vectors: NDArray[np.float32]
    caption_starts: NDArray[np.int64]
    image_of_caption: NDArray[np.int32]
    image_ids: pa.LargeStringArray
    files: pa.LargeStringArray
    pair_ids: pa.LargeStringArray
    captions: pa.LargeStringArray

    def image_id(self, row: int) -> str:
        return str(self.image_ids[row].as_py())

    def file(self, row: int) -> str:
        """Path of an image below the images folder; "" where there are no captions, whose table would say (``pictures.ImageFiles``)."""
        return str(self.files[row].as_py())

    def caption(self, number: int) -> str:
        return str(self.captions[number].as_py())

    def captions_of(self, row: int, query: NDArray[np.float32] | None = None) -> list[str]:
        """All captions of an image; with ``query`` float32 [D], a vector, the nearest to it first."""
        rows = slice(int(self.caption_starts[row]), int(self.caption_starts[row + 1]))
        found: list[str] = self.captions[rows].to_pylist()
        if query is None:
            return found
        return [found[place] for place in np.argsort(-(self.caption_vectors[rows] @ query), kind="stable")]


def open_index(path: Path) -> Index:
    """Map an index; ``UsageError`` where there is none, ``DamagedError`` where a file of it is missing or has another length."""
    require_index(path)
    mapped = open_arrays(path, KEY)
    facts = _facts(path, mapped.facts)
    vectors = {name: mapped.arrays[name].reshape(-1, facts.vector_size) for name in ("image_vectors", "caption_vectors")}
    numbers = {name: mapped.arrays[name] for name in ("caption_starts", "image_of_caption")}
    return Index(path=path, facts=facts, **vectors, **numbers, **{name: mapped.strings(name) for name in STRINGS})


def _facts(path: Path, values: dict[str, Any]) -> IndexFacts:
    try:
        return TypeAdapter(IndexFacts).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path / DESCRIPTION}: {'.'.join(map(str, first['loc']))}"
        raise UsageError(f"{where}: {first['msg']}; delete the folder and run `megainter index` again") from None
