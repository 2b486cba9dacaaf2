"""`megainter prepare negatives`: for each caption the most similar captions of other images, by TF-IDF, as hard negatives.

The paper (arXiv 2003.13198, v4) takes the 30 captions most similar to a caption among those whose cosine similarity to it is below 0.5:
above that they may well describe the image. The search is exact. Captions are compared a rectangle at a time, some rows by some columns,
with sparse products; only what enters a row's list outlives its rectangle, so that memory grows with the captions and not with their pairs.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from megainter.data.stream.negatives import plain_text, require_two_images, write_hard_negatives
from megainter.data.tables.pairs import Pairs, read_pairs
from megainter.data.text.chinese import CHINESE, chinese_segmenter
from megainter.errors import UsageError
from megainter.progress import Progress

TOP, BELOW = 30, 0.5  # the paper's
FREQUENT, FREQUENT_SHARE = 10_000, 0.05  # a word in more captions than both is left out: it says little, and costs its count squared
ROWS, FIRST_COLUMNS, COLUMNS = 1024, 256, 65_536  # of a rectangle; the first are narrow: full lists keep most of the others out
WORD = re.compile(r"\w+")

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Apart = tuple[NDArray[Any], ...]  # numbers [N] in which a caption and its negative must differ


@dataclass(frozen=True)
class Mined:
    """What was found: captions, those with no similar caption, hard negatives in all, words compared and words left out as frequent."""

    captions: int
    without: int
    negatives: int
    words: int
    frequent: int


def mine(
    path: Path,
    output: Path,
    *,
    split: str | None = "train",
    top: int = TOP,
    below: float = BELOW,
    threads: int = 1,
    replace_table: bool = True,
) -> Mined:
    """Find the hard negatives of the pairs in ``path`` (of one split, or of all where None) and write them to ``output``.

    Captions that read the same (``plain_text``) are no negatives of one another, however high ``below`` is. Without
    ``replace_table`` others that are there stay.
    Raises ``UsageError`` for pairs that cannot be read, of one image only, or without words.
    """
    if top < 1 or not 0 < below <= 1 or threads < 1:
        raise UsageError(f"negatives need top >= 1, 0 < below <= 1 and threads >= 1, got {top}, {below}, {threads}")
    pairs = read_pairs(path, split)
    require_two_images(pairs.image_numbers, str(path))
    vectors, frequent = tfidf(pairs)
    counts: list[Ints] = []
    facts: dict[str, Any] = {"pairs_digest": pairs.digest, "split": split, "captions": len(pairs), "top": top, "below": below}

    def counted() -> Iterator[tuple[Ints, Ints]]:
        with Progress("hard negatives", len(pairs), "captions") as progress:
            for lengths, rows in similar(vectors, pairs.image_numbers, top, below, threads, text_hashes(pairs)):
                counts.append(lengths)
                progress.update(len(lengths))
                yield lengths, rows

    write_hard_negatives(output, counted(), facts, replace_table)
    lengths = np.concatenate(counts)
    mined = Mined(len(pairs), int((lengths == 0).sum()), int(lengths.sum()), vectors.shape[1], frequent)
    print(f"{path} -> {output}", *_lines(mined, top), sep="\n  ", flush=True)
    return mined


def _lines(mined: Mined, top: int) -> list[str]:
    """The report for people."""
    lines = [
        f"{mined.negatives:,} hard negatives of {mined.captions:,} captions, {mined.negatives / mined.captions:.1f} each (at most {top})"
    ]
    if mined.without:
        lines.append(f"{mined.without:,} captions have none: no other image has a caption that shares a word; they get random negatives")
    lines.append(f"compared by {mined.words:,} words" + (f"; {mined.frequent:,} frequent ones left out" if mined.frequent else ""))
    return lines


def tfidf(pairs: Pairs) -> tuple[sparse.csr_array, int]:
    """Unit TF-IDF vectors of the captions, float32 [captions, words], and how many frequent words were left out of them."""
    limit = max(FREQUENT, int(FREQUENT_SHARE * len(pairs)))
    try:
        vectoriser = TfidfVectorizer(analyzer=words_of(pairs), dtype=np.float32).fit_transform(_captions(pairs))
    except ValueError:
        raise UsageError("the captions have no words: no hard negatives can be found") from None
    vectors = sparse.csr_array(vectoriser)
    kept = np.flatnonzero(np.bincount(vectors.indices, minlength=vectors.shape[1]) <= limit)
    return _unit_rows(vectors[:, kept]), vectors.shape[1] - len(kept)


def _captions(pairs: Pairs) -> Iterator[str]:
    for chunk in pairs.table.column("caption").chunks:
        for start in range(0, len(chunk), 4096):
            yield from chunk[start : start + 4096].to_pylist()


def text_hashes(pairs: Pairs) -> Hashes:
    """uint64 [captions]: equal where captions read the same."""
    digests = (hashlib.blake2b(plain_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in _captions(pairs))
    return np.frombuffer(b"".join(digests), np.uint64)


def _unit_rows(vectors: sparse.csr_array) -> sparse.csr_array:
    lengths = np.sqrt(vectors.multiply(vectors).sum(axis=1))
    vectors.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(vectors.indptr))
    vectors.sort_indices()
    return vectors


def words_of(pairs: Pairs) -> Callable[[str], list[str]]:
    """What splits a caption into words: runs of letters and digits in lower case; jieba's words where a caption has Chinese."""
    if not any(CHINESE.search(text) for text in _captions(pairs)):
        return lambda caption: WORD.findall(caption.lower())
    cut = chinese_segmenter()
    return lambda caption: [
        word for run in WORD.findall(caption.lower()) for word in (cut(run) if CHINESE.search(run) else (run,)) if not word.isspace()
    ]


def similar(
    vectors: sparse.csr_array, images: Ints, top: int, below: float, threads: int = 1, texts: Hashes | None = None
) -> Iterator[tuple[Ints, Ints]]:
    """For each row of ``vectors`` [N, words] the ``top`` most similar rows of other ``images`` int32 [N], as parts ``(counts, rows)``.

    Rows with the same ``texts`` uint64 [N] are left out like those of the same image. Similar means a cosine above 0 and below ``below``;
    ties go to the lower row. Parts come in order; within one, ``rows`` lists those of its first caption, most similar first, then of its
    second. Memory: the vectors twice, and ``threads`` rectangles.
    """
    size = vectors.shape[0]
    edges = _edges(size)
    columns = [vectors[start:stop].T.tocsr() for start, stop in edges]
    parts = range(0, size, ROWS)

    def part(start: int) -> tuple[Ints, Ints]:
        return _part(vectors[start : start + ROWS], start, columns, edges, (images,) if texts is None else (images, texts), top, below)

    with ThreadPoolExecutor(threads) as pool:  # scipy and numpy let go of the interpreter's lock
        starts = iter(parts)
        running = [pool.submit(part, start) for start in islice(starts, 2 * threads)]
        while running:
            yield running.pop(0).result()
            running.extend(pool.submit(part, start) for start in islice(starts, 1))


def _edges(size: int) -> list[tuple[int, int]]:
    """Columns of the rectangles: from ``FIRST_COLUMNS`` growing to ``COLUMNS``."""
    edges, start, width = [], 0, FIRST_COLUMNS
    while start < size:
        edges.append((start, min(start + width, size)))
        start, width = start + width, min(2 * width, COLUMNS)
    return edges


def _part(
    rows: sparse.csr_array, start: int, columns: list[sparse.csr_array], edges: list[tuple[int, int]], apart: Apart, top: int, below: float
) -> tuple[Ints, Ints]:
    """``(counts, rows)`` of the captions from ``start`` on."""
    count = rows.shape[0]
    best: tuple[Ints, Ints, Floats] = (np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    least = np.zeros(count, np.float32)  # what a similarity must exceed to enter a row's list
    for (first, _), column in zip(edges, columns, strict=True):
        found = _candidates(rows @ column, start, first, apart, least, below)
        best = _best((np.concatenate([best[0], found[0]]), np.concatenate([best[1], found[1]]), np.concatenate([best[2], found[2]])), top)
        counts = np.bincount(best[0], minlength=count)
        full = np.flatnonzero(counts == top)
        least[full] = best[2][np.cumsum(counts)[full] - 1]
    return np.bincount(best[0], minlength=count).astype(np.int32), best[1]


def _candidates(products: sparse.csr_array, start: int, first: int, apart: Apart, least: Floats, below: float) -> tuple[Ints, Ints, Floats]:
    """Row within the part, row of the other caption and similarity of what may enter the lists; both must differ in all of ``apart``."""
    data = products.data
    near = np.flatnonzero((data > np.repeat(least, np.diff(products.indptr))) & (data < below))
    row = (np.searchsorted(products.indptr, near, side="right") - 1).astype(np.int32)
    other = products.indices[near].astype(np.int32) + np.int32(first)
    kept = np.logical_and.reduce([numbers[row + start] != numbers[other] for numbers in apart])
    return row[kept], other[kept], data[near[kept]]


def _best(found: tuple[Ints, Ints, Floats], top: int) -> tuple[Ints, Ints, Floats]:
    """The ``top`` of each row, rows ascending, most similar first."""
    row, other, similarity = found
    order = np.lexsort((other, -similarity, row))
    row = row[order]
    place = np.arange(len(row)) - np.searchsorted(row, row, side="left")
    kept = order[place < top]
    return found[0][kept], found[1][kept], found[2][kept]
