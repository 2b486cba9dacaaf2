"""Which images of a table a store has regions of: one rule, one message and one rounding for captions, examples and questions."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.image_ids import match
from megainter.data.integers import Int64s
from megainter.data.tables.pairs import Pairs
from megainter.data.tables.parquet import digest_of_kept
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.tolerance import tolerated

log = logging.getLogger("megainter")
SAMPLE = 200  # images without regions that are looked for by other forms of their names,
SCANNED = 1_000_000  # among so many of a store: a few seconds


def rows_in_store(pairs: Pairs, store: FeatureStore) -> NDArray[np.integer]:
    """[images]: the place in the store's ids of each image number, -1 where the store lacks it."""
    if pairs.found is not None and pairs.found.store_digest == store.digest:
        return pairs.found.rows
    return store.find(pairs.image_ids)


def rows_by_storage(pairs: Pairs, store_rows: NDArray[np.integer], store: FeatureStore) -> Int64s:
    """int64 [rows]: rows of the pairs in the order in which their images' records lie in the store; captions of one image as they came."""
    order = store.rows_in_storage_order()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return np.argsort(rank[store_rows][pairs.image_numbers], kind="stable")


def missing_images(pairs: Pairs, store: FeatureStore) -> NDArray[np.bool_]:
    """bool [images]: which image numbers of the pairs are not in the store."""
    return rows_in_store(pairs, store) < 0


def require_images(pairs: Pairs, store: FeatureStore) -> NDArray[np.integer]:
    """``rows_in_store``; a ``UsageError`` where captions have no image in the store: how many, and three examples."""
    rows = rows_in_store(pairs, store)
    if pairs.found is not None and rows is pairs.found.rows:
        return rows  # they were matched, and none is missing
    missing = rows < 0
    if not missing.any():
        return rows
    captions = int(missing[pairs.image_numbers].sum())
    first = ", ".join(pairs.image_ids[i] for i in np.flatnonzero(missing)[:3])
    raise UsageError(
        f"captions without images in {store.path}: {captions:,} of {len(pairs):,}, first {first}: run `megainter extract` on these images, "
        "or leave their captions out of the manifest"
    )


def drop_missing(pairs: Pairs, store: FeatureStore) -> Pairs:
    """The pairs whose image is in the store, with images numbered anew; the digest is that of the pairs and of what was kept."""
    missing = missing_images(pairs, store)
    keep = ~missing[pairs.image_numbers]
    new_numbers = (np.cumsum(~missing) - 1).astype(np.int32)
    image_ids = [image_id for image_id, gone in zip(pairs.image_ids, missing, strict=True) if not gone]
    digest = digest_of_kept(pairs.digest, keep)
    return Pairs(pairs.table.filter(pa.array(keep)), new_numbers[pairs.image_numbers[keep]], image_ids, digest)


def with_regions(pairs: Pairs, store: FeatureStore, limit: float, path: Path, option: str = "--data.max_bad") -> Pairs:
    """The pairs whose images have regions; raises as ``accept_missing`` where more than ``limit`` of the images have none."""
    missing = missing_images(pairs, store)
    captions = int(missing[pairs.image_numbers].sum())
    if not captions:
        return pairs
    images = some(pairs.image_ids[int(number)] for number in np.flatnonzero(missing))
    found = Missing("captions", captions, len(pairs), images, int(missing.sum()), len(missing))
    accept_missing(found, store, limit, path, option)
    return drop_missing(pairs, store)


@dataclass(frozen=True)
class Missing:
    """How many of ``total`` captions, examples or questions (``what``) are of images without regions: ``lacking`` of ``all_images``.

    ``images``: ``some`` of these.
    """

    what: str
    count: int
    total: int
    images: Sequence[str]
    lacking: int
    all_images: int

    def share(self) -> str:
        """The smallest share in thousandths that allows for them: rounded up, so that the advice to give it works."""
        return f"{math.ceil(1000 * self.lacking / self.all_images) / 1000:g}"

    def told(self, path: Path, store: Path) -> str:
        """What lacks what."""
        of = f" ({self.lacking:,} of {self.all_images:,} images)" if self.what != "images" else ""
        return f"{path}: {self.count:,} of {self.total:,} {self.what} are of images without regions in {store}{of}"


def some(image_ids: Iterable[str]) -> tuple[str, ...]:
    """The first ``SAMPLE`` ids, each once."""
    found = dict[str, None]()
    for image_id in image_ids:
        found[image_id] = None
        if len(found) == SAMPLE:
            break
    return tuple(found)


def accept_missing(missing: Missing, store: FeatureStore, limit: float, path: Path, option: str = "--data.max_bad") -> None:
    """Say what is left out, or raise ``TooManyBadInputsError`` where more images than ``tolerated`` by ``limit`` lack regions, or all.

    It is images that count, as in extraction: one that could not be read there is one here, however many captions it has. ``path`` is the
    file that names them, ``option`` the setting that the limit comes from. An error shows an id of each side, and by what form of their
    names the images would meet.
    """
    first = f"{missing.images[0]!r:.200}"
    told = f"{missing.told(path, store.path)}, first {first}"
    if missing.lacking <= tolerated(limit, missing.all_images) and missing.count < missing.total:
        log.warning("%s: left out", told)
        return
    others = f" (the store has {store.ids[0]!r:.200}{' and others' if len(store) > 1 else ''})"
    if form := _other_form(missing, store):
        advice = f"{form}: run `megainter prepare` again with --store {store.path}"
    elif missing.count == missing.total:
        advice = "they meet in no form of their names: extract these images, or name them as the store does (`megainter prepare --ids`)"
    else:
        advice = f"extract these images, or leave their {missing.what} out with {option} {missing.share()}"
    raise TooManyBadInputsError(f"{told}{others}; {advice}")


def _other_form(missing: Missing, store: FeatureStore) -> str:
    """By what other form of their names most of some missing images are in the store, with an example; "" where they are not."""
    found = match(missing.images, store.ids[:SCANNED])
    if not found.names:
        return ""
    wanted = next(image_id for image_id in missing.images if image_id in found.names)
    of = f"{len(found.names):,} of {len(missing.images):,}{' images that were looked at' if len(missing.images) == SAMPLE else ' images'}"
    return f"by their {found.form} {of} would meet ({wanted!r:.80} is there as {found.names[wanted]!r:.80})"
