"""Pairs for a run: a split of a manifest, matched with a feature store once, and mapped into memory by every process of the run.

`tables.pairs.read_pairs` holds a whole manifest in memory, which is right for thousands of captions and for looking at them. A run over
hundreds of millions reads the manifest once, in parts, and leaves beside its other cached files what training asks for: pair ids, captions,
the number of each row's image and that image's place in the store. Pairs, their order and their digest are the same either way.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.lookup import string_hashes
from megainter.data.mapped import ArrayWriter, open_arrays
from megainter.data.matching import SAMPLE, require_images, rows_by_storage, some
from megainter.data.tables.pairs import PAIRS_SCHEMA, FoundImages, Pairs, refuse_contradictions
from megainter.data.tables.parquet import (
    ContentDigest,
    digest_of_kept,
    open_parquet,
    read_in_parts,
    refuse_absent_split,
    refuse_escaping_paths,
    rows_of_split,
    split_counts,
)
from megainter.data.text.chinese import count_chinese
from megainter.errors import DamagedError, UsageError
from megainter.progress import Progress

FACTS = 3  # counts up where other facts are noted
_STRINGS = ("pair_id", "caption")
_DTYPES = {"image_numbers": "int32", "store_rows": "int32"}
_FOOTER_END = 8  # bytes: the length of a Parquet footer and the magic after it


@dataclass(frozen=True)
class IndexFacts:
    """What is noted of the pairs: ``rows`` with regions, of ``manifest_rows`` of the split; ``missing``: some of the ``lacking`` images."""

    rows: int
    images: int
    manifest_rows: int
    lacking: int
    missing: list[str]
    chinese_captions: int
    digest: str


class StoreIds(Sequence[str]):
    """The ids of images by their number, read from the store's own when asked for. ``rows`` int32 [images] are places in ``ids``."""

    def __init__(self, ids: Sequence[str], rows: NDArray[np.int32]) -> None:
        self.ids, self.rows = ids, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.ids[int(row)] for row in self.rows[number]]
        return self.ids[int(self.rows[number])]


def index_key(manifest: Path, split: str, store: FeatureStore) -> str:
    """What an index depends on, as text: the manifest (size, time of change, and the digest of its footer), split and store.

    The captions themselves are not read: a file that was changed in place and given its old time again goes unnoticed.
    """
    open_parquet(manifest)
    state = manifest.stat()
    facts = {"bytes": state.st_size, "modified_ns": state.st_mtime_ns, "footer": _footer_digest(manifest)}
    return json.dumps({"manifest": facts, "split": split, "store": store.digest, "facts": FACTS}, sort_keys=True)


def _footer_digest(manifest: Path) -> str:
    with open(manifest, "rb") as file:
        file.seek(-_FOOTER_END, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-_FOOTER_END - length, 2)
        return hashlib.sha256(file.read(length)).hexdigest()


def build_pairs_index(manifest: Path, split: str, store: FeatureStore, folder: Path, progress: bool = True) -> tuple[str, IndexFacts]:
    """Write the index of the pairs of ``split`` whose images are in ``store`` to ``folder``; one of the same key is reused.

    Returns its key and facts. Takes memory for 9 bytes a row of the manifest and 36 an image of the store while it runs. ``UsageError``
    as for `tables.pairs.read_pairs` (paths of images that the store lacks are not compared), ``NoSpaceError`` where the disk is full.
    """
    key = index_key(manifest, split, store)
    try:
        return key, IndexFacts(**open_arrays(folder, key, verify=True).facts)
    except (UsageError, DamagedError):
        pass  # none there, or of other data
    with ArrayWriter(folder, _DTYPES, _STRINGS) as writer:
        facts = _write(manifest, split, store, writer, progress)
        writer.publish(key, asdict(facts))
    return key, facts


def open_pairs_index(folder: Path, key: str, store: FeatureStore) -> Pairs:
    """The pairs of an index, mapped. ``UsageError`` where it is of another key, ``DamagedError`` where it is not whole."""
    mapped = open_arrays(folder, key)
    facts, arrays = IndexFacts(**mapped.facts), mapped.arrays
    table = pa.table({name: mapped.strings(name) for name in _STRINGS})
    rows = arrays["store_rows"]
    share = facts.chinese_captions / max(facts.rows, 1)
    return Pairs(
        table=table,
        image_numbers=arrays["image_numbers"],
        image_ids=StoreIds(store.ids, rows),
        digest=facts.digest,
        found=FoundImages(store.digest, rows),
        chinese_share=share,
    )


def build_storage_order(pairs: Pairs, store: FeatureStore, folder: Path) -> str:
    """Write the pairs' ``sampling.rows_by_storage`` to ``folder``, for ``open_storage_order``; returns its key. One there is reused."""
    key = json.dumps({"pairs": pairs.digest, "store": store.digest})
    try:
        open_arrays(folder, key, verify=True)
        return key
    except (UsageError, DamagedError):
        pass  # none there, or of other data
    rows = rows_by_storage(pairs, require_images(pairs, store), store)
    with ArrayWriter(folder, {"rows": "int32" if len(rows) < 2**31 else "int64"}) as writer:
        writer.append("rows", rows)
        writer.publish(key, {"sha256": hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()})
    return key


def open_storage_order(folder: Path, key: str) -> tuple[Int64s, str]:
    """Rows of the pairs by storage, mapped, and their SHA-256. Errors as for ``open_pairs_index``.

    The digest of a store does not tell in what order its records lie: a merged copy has the same one.
    """
    mapped = open_arrays(folder, key)
    return mapped.arrays["rows"], mapped.facts["sha256"]


def _write(manifest: Path, split: str, store: FeatureStore, writer: ArrayWriter, progress: bool) -> IndexFacts:
    total = open_parquet(manifest).metadata.num_rows
    hashes, keep = np.empty(total, np.uint64), np.empty(total, np.bool_)  # of the rows of the split, so far ``digest.rows``
    counts, digest, images, lookup = Counter[str](), ContentDigest(PAIRS_SCHEMA.names), _Images(len(store)), store.lookup()
    missing, lacking, chinese = list[str](), np.empty(0, np.uint64), 0
    with Progress("reading captions", total, "captions", enabled=progress) as bar:
        for part in read_in_parts(manifest, PAIRS_SCHEMA):
            counts.update(split_counts(manifest, part))
            table = rows_of_split(part, split)
            refuse_escaping_paths(manifest, table, digest.rows)
            here = slice(digest.rows, digest.rows + len(table))
            digest.update(table)
            hashes[here] = string_hashes(_column(table, "pair_id"))
            rows = lookup.find(_column(table, "image_id"))
            keep[here] = rows >= 0
            if not keep[here].all():
                without = table.column("image_id").filter(pa.array(~keep[here])).unique()
                missing = [*some([*missing, *without[:SAMPLE].to_pylist()])]
                lacking = np.union1d(lacking, string_hashes(without))
            chinese += _append(writer, table.filter(pa.array(keep[here])), rows[keep[here]], images)
            bar.update(len(part))
    refuse_absent_split(manifest, counts, split)
    hashes, keep = hashes[: digest.rows], keep[: digest.rows]
    if images.contradicted or _any_twice(hashes):
        refuse_contradictions(manifest, split)  # hashes may agree by chance: the columns themselves decide, and name the rows
    kept_digest = digest.hexdigest() if keep.all() else digest_of_kept(digest.hexdigest(), keep)
    return IndexFacts(
        rows=int(keep.sum()),
        images=images.count,
        manifest_rows=len(keep),
        lacking=len(lacking),
        missing=missing,
        chinese_captions=chinese,
        digest=kept_digest,
    )


def _append(writer: ArrayWriter, table: pa.Table, store_rows: Int64s, images: "_Images") -> int:
    """Write the rows of a part that have regions; returns how many captions have Chinese."""
    if not len(table):
        return 0
    numbers, fresh = images.numbered(store_rows, string_hashes(_column(table, "image")))
    writer.append("image_numbers", numbers)
    writer.append("store_rows", fresh)
    for name in _STRINGS:
        writer.append_strings(name, _column(table, name))
    return count_chinese(table.column("caption"))


class _Images:
    """Numbers images in order of first appearance, and notices one with two paths. An image is its row in the store."""

    def __init__(self, store_size: int) -> None:
        self.count, self.contradicted = 0, False
        self._numbers = np.full(store_size, -1, np.int32)
        self._path_hashes = np.zeros(store_size, np.uint64)

    def numbered(self, store_rows: Int64s, path_hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int32], Int64s]:
        """int32 [n] image numbers of ``store_rows`` int64 [n], and the rows of those seen for the first time, in their order."""
        unseen = np.flatnonzero(self._numbers[store_rows] < 0)
        first = unseen[np.sort(np.unique(store_rows[unseen], return_index=True)[1])]
        fresh = store_rows[first]
        self._numbers[fresh] = np.arange(self.count, self.count + len(fresh))
        self._path_hashes[fresh] = path_hashes[first]
        self.count += len(fresh)
        self.contradicted |= bool((self._path_hashes[store_rows] != path_hashes).any())
        return self._numbers[store_rows], fresh


def _any_twice(hashes: NDArray[np.uint64]) -> bool:
    hashes.sort()
    return bool((hashes[1:] == hashes[:-1]).any())


def _column(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
