"""Negative captions for image-text matching: uniform over those of other images, or hard ones found by `megainter prepare negatives`.

A file of hard negatives is Parquet with one column, ``negatives`` (list of int32), whose row i lists rows of the same pairs, most similar
first. Its metadata holds the digest of those pairs: rows mean nothing for others.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megainter.data.integers import Int64s
from megainter.data.stream.order import Purpose, uniform
from megainter.data.tables.pairs import Pairs
from megainter.data.tables.parquet import open_parquet, parquet_aside, write_batches
from megainter.errors import UsageError

HARD_SCHEMA = pa.schema([("negatives", pa.list_(pa.int32()))])
HARD_SHARE = 0.2  # of the negatives, as the paper has it
_WORD = re.compile(r"\w+")
_ROWS_AT_ONCE = 1 << 16  # of a mapped column: the first part nearly always answers
_ATTEMPTS = 32  # an image that owns half of all captions still fails all of them only once in 2^32 samples
_AGAIN = "run `megainter prepare negatives` on these pairs again, with --split as in data.split"


SameText = Callable[[Int64s, Int64s], NDArray[np.bool_]]  # rows of captions twice, [S]: which of them read the same


@dataclass(frozen=True, eq=False)
class HardNegatives:
    """Rows of similar captions of other images: those of caption i are ``rows[offsets[i] : offsets[i + 1]]``, most similar first.

    ``offsets`` int64 [captions + 1], ``rows`` int32 [total], ``facts``: how they were found.
    """

    offsets: Int64s
    rows: NDArray[np.int32]
    facts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def write_hard_negatives(
    path: Path, lists: Iterable[tuple[NDArray[np.int32], NDArray[np.int32]]], facts: dict[str, Any], replace: bool = True
) -> None:
    """Write lists of rows as they come, atomically, as ``(counts, rows)``: int32 [captions of the part] and [their sum].

    ``facts`` become the file's metadata; ``facts["pairs_digest"]`` is the digest of the pairs that the rows are rows of; ``replace`` as
    in ``parquet.parquet_aside``.
    """
    schema = HARD_SCHEMA.with_metadata({"megainter": json.dumps(facts)})
    batches = (pa.record_batch([_as_lists(counts, rows)], schema=schema) for counts, rows in lists)
    with parquet_aside(path, schema, replace) as partial:
        write_batches(partial, schema, batches)


def _as_lists(counts: NDArray[np.int32], rows: NDArray[np.int32]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), pa.array(rows, pa.int32()))


def read_hard_negatives(path: Path, pairs: Pairs) -> HardNegatives:
    """Read hard negatives of ``pairs``.

    ``UsageError`` for a missing or other file, one made from other pairs (or another split of them), and rows that are no caption of
    another image.
    """
    file = open_parquet(path, made_by="`megainter prepare negatives` writes it")
    facts = json.loads((file.schema_arrow.metadata or {}).get(b"megainter", b"{}"))
    if file.schema_arrow.names != HARD_SCHEMA.names or "pairs_digest" not in facts:
        raise UsageError(f"{path} holds no hard negatives; `megainter prepare negatives` writes them")
    if facts["pairs_digest"] != pairs.digest or file.metadata.num_rows != len(pairs):
        split = facts.get("split") or "(all)"
        raise UsageError(
            f"{path} was made from other pairs ({file.metadata.num_rows:,} captions of split {split}; these are {len(pairs):,}); {_AGAIN}"
        )
    parts = [_checked(path, batch.column(0), pairs, start) for start, batch in _with_starts(file)]
    counts = np.concatenate([np.zeros(1, np.int64), *(counts for counts, _ in parts)])
    return HardNegatives(np.cumsum(counts), np.concatenate([np.zeros(0, np.int32), *(rows for _, rows in parts)]), facts)


def _with_starts(file: pq.ParquetFile) -> Iterable[tuple[int, pa.RecordBatch]]:
    start = 0
    for batch in file.iter_batches():
        yield start, batch
        start += batch.num_rows


def _checked(path: Path, lists: pa.ListArray, pairs: Pairs, start: int) -> tuple[Int64s, NDArray[np.int32]]:
    """Counts and rows of some captions, from caption ``start`` on."""
    counts = np.diff(lists.offsets.to_numpy()).astype(np.int64)
    rows = lists.flatten().to_numpy()
    if lists.null_count or len(rows) != counts.sum() or (len(rows) and not 0 <= rows.min() <= rows.max() < len(pairs)):
        raise UsageError(f"{path} is damaged: it lists captions that do not exist; {_AGAIN}")
    own = np.repeat(pairs.image_numbers[start : start + len(counts)], counts)
    if (pairs.image_numbers[rows] == own).any():
        raise UsageError(f"{path} is damaged: it lists captions of the same image as negatives; {_AGAIN}")
    return counts, rows


def require_two_images(image_numbers: NDArray[np.int32], where: str) -> None:
    """A ``UsageError`` where all captions belong to one image: no negative caption exists."""
    parts = (image_numbers[start : start + _ROWS_AT_ONCE] for start in range(0, len(image_numbers), _ROWS_AT_ONCE))
    if not any((part != image_numbers[0]).any() for part in parts):
        raise UsageError(f"{where}: matching needs captions of at least two images to draw negative captions from, this data has one")


def plain_text(caption: str) -> str:
    """What captions are compared by: letters and digits, without case, width (Ｔ恤 is T恤), spaces and punctuation; or signs alone."""
    folded = unicodedata.normalize("NFKC", caption).casefold()
    return "".join(_WORD.findall(folded)) or folded.strip()


def same_text(pairs: Pairs, rows: Int64s, others: Int64s) -> NDArray[np.bool_]:
    """bool [S]: whether the captions in ``rows`` int64 [S] and ``others`` int64 [S] read the same, by ``plain_text``.

    Titles of products often do, of different images; such a caption is no mismatch.
    """
    texts = (pairs.captions(some) for some in (rows, others))
    return np.fromiter((a == b or plain_text(a) == plain_text(b) for a, b in zip(*texts, strict=True)), np.bool_, len(rows))


def text_keys(pairs: Pairs, rows: Int64s) -> Int64s:
    """int64 [S]: equal for captions that read the same (``same_text``), and for others in one of 2^64 cases."""
    digests = (hashlib.blake2b(plain_text(caption).encode(), digest_size=8).digest() for caption in pairs.captions(rows))
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)


def choose_captions(
    image_numbers: NDArray[np.int32],
    rows: Int64s,
    seed: int,
    epoch: int,
    n: Int64s,
    probability: float,
    hard: HardNegatives | None = None,
    hard_share: float = HARD_SHARE,
    same: SameText | None = None,
) -> tuple[Int64s, Int64s]:
    """The caption that each sample is shown: its own, or with ``probability`` one of another image.

    ``image_numbers`` int32 [captions] gives the image of every caption; ``rows`` int64 [S] are the captions of samples ``n`` int64 [S] of
    ``epoch``. Of the others, ``hard_share`` are drawn from ``hard`` (where the caption has any there) and the rest from all captions; which
    samples are mismatched, and what the rest is shown, does not depend on ``hard``. What reads the ``same`` is never drawn.
    Returns caption rows int64 [S] and ITM labels int64 [S] (0 = matched, 1 = mismatched).
    """
    mismatched = uniform(seed, epoch, n, Purpose.MISMATCH) < probability
    chosen = np.array(rows, dtype=np.int64)
    own, numbers = chosen[mismatched], np.asarray(n)[mismatched]
    others = negative_rows(image_numbers, own, seed, epoch, numbers, same)
    if hard is not None:
        similar = hard_rows(hard, hard_share, own, seed, epoch, numbers)
        drawn = np.flatnonzero(similar >= 0)
        if same is not None:
            drawn = drawn[~same(own[drawn], similar[drawn])]
        others[drawn] = similar[drawn]
    chosen[mismatched] = others
    return chosen, mismatched.astype(np.int64)


def hard_rows(hard: HardNegatives, share: float, rows: Int64s, seed: int, epoch: int, n: Int64s) -> Int64s:
    """For each caption in ``rows`` a row drawn uniformly from its hard negatives, with probability ``share``; else -1. int64 [S]."""
    first = hard.offsets[rows]
    counts = hard.offsets[rows + 1] - first
    wanted = (uniform(seed, epoch, n, Purpose.HARD_NEGATIVE) < share) & (counts > 0)
    places = first + (uniform(seed, epoch, n, Purpose.HARD_CHOICE) * counts).astype(np.int64)
    found = np.full(len(rows), -1, dtype=np.int64)
    found[wanted] = hard.rows[places[wanted]]
    return found


def negative_rows(image_numbers: NDArray[np.int32], rows: Int64s, seed: int, epoch: int, n: Int64s, same: SameText | None = None) -> Int64s:
    """For each caption in ``rows`` a row drawn uniformly from the captions of all other images that do not read the ``same``: int64 [S].

    Needs at least two images (``require_two_images``). Rejection: attempts are hashes of (seed, epoch, n, attempt); what is left after
    the last attempt draws from the listed candidates, so that the choice stays uniform however unequal the images are. ``UsageError``
    where a caption has none because all others read the same.
    """
    found = np.full(len(rows), -1, dtype=np.int64)
    left = np.arange(len(rows))
    for attempt in range(_ATTEMPTS):
        if not len(left):
            break
        drawn = (uniform(seed, epoch, n[left], Purpose.NEGATIVE + attempt) * len(image_numbers)).astype(np.int64)
        good = image_numbers[drawn] != image_numbers[rows[left]]
        if same is not None:
            good[good] = ~same(rows[left[good]], drawn[good])
        found[left[good]] = drawn[good]
        left = left[~good]
    for i in left:
        candidates = _listed(image_numbers, int(rows[i]), same)
        u = uniform(seed, epoch, n[i : i + 1], Purpose.NEGATIVE + _ATTEMPTS)[0]
        found[i] = candidates[int(u * len(candidates))]
    return found


def _listed(image_numbers: NDArray[np.int32], row: int, same: SameText | None) -> Int64s:
    """All captions that are negatives of ``row``."""
    candidates = np.flatnonzero(image_numbers != image_numbers[row])
    if same is not None:
        candidates = candidates[~same(np.full(len(candidates), row), candidates)]
    if not len(candidates):
        raise UsageError(f"the captions of all other images read the same as caption {row + 1}: matching cannot be learned from this data")
    return candidates
