"""Searching an index: what is nearest by vectors, then a close look at the first of them.

Scores are those of `megainter evaluate retrieval`: of the first stage the logit, of the second the log-odds, and their sum as the model
learned it (``retrieval/both.py``).
"""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.text.vocabulary import Vocabulary
from megainter.devices import devices_named, torch_device, units_of
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import model_digest, read_config, read_vocabulary
from megainter.precision import Precision, automatic
from megainter.tasks.retrieval.both import Sum, sum_of
from megainter.tasks.retrieval.prefilter.candidates import nearest
from megainter.tasks.retrieval.search.checks import check_options
from megainter.tasks.retrieval.search.closely import CloseLook
from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.options import Order, SearchOptions
from megainter.tasks.retrieval.search.photo import PhotoReader
from megainter.tasks.retrieval.search.vectors import FirstStage, open_first_stage
from megainter.tasks.scoring.models import choose_devices
from megainter.weights import HUB, locate


@dataclass(frozen=True)
class Hit:
    """An image or a caption that was found: its ``number`` in the index, the first stage's logit, and the second stage's log-odds and the
    sum of both where it was looked at closely."""

    number: int
    first: float
    second: float | None = None
    both: float | None = None


@dataclass(frozen=True)
class Found:
    """What one query found, best first, how many milliseconds its vector, the nearest and the close look took, and its vector [D]."""

    hits: list[Hit]
    encode_ms: float
    nearest_ms: float
    second_ms: float
    query: NDArray[np.float32] | None = None


class Searcher:
    """An index with everything that searching it takes. Not for several threads at once."""

    def __init__(self, index: Index, options: SearchOptions) -> None:
        """``UsageError`` where model, first stage, store or device are not those of the index or not there."""
        check_options(options)
        self.index, self.options = index, options
        facts = index.facts
        self.device = torch_device(options.device)
        model = options.model or _still_there(index, facts.model, "model", "--model")
        self.model_folder = locate(model, option="--model").path
        self.config: InterBertConfig = read_config(self.model_folder)
        self.vocabulary: Vocabulary = read_vocabulary(self.model_folder, self.config)
        self.store = FeatureStore(options.store or _still_there(index, facts.store, "store", "--store"))
        own = self.model_folder if facts.prefilter == facts.model else None
        prefilter = options.prefilter_model or own or _still_there(index, facts.prefilter, "first stage", "--prefilter-model")
        self.stage: FirstStage = open_first_stage(prefilter, self.vocabulary, self.store, self.device, other_detector=True)  # as indexed
        self._require_the_same()
        self.both: Sum = sum_of(self.model_folder, self.stage.digest)[0]
        self.precision, self.precision_note = _precision(options)
        choose_devices(options.device, self.precision, 1, 1, 1)  # refuses what the device does not compute
        self._image_vectors, self._caption_vectors = (self._on_device(vectors) for vectors in (index.image_vectors, index.caption_vectors))
        self._store_rows = self.store.rows_of(index.image_ids.to_pylist())
        self._look: CloseLook | None = None
        self._photos: PhotoReader | None = None

    @property
    def look(self) -> CloseLook:
        """The second stage, loaded when it is needed first."""
        if self._look is None:
            self._look = CloseLook(self.model_folder, self.config, self.vocabulary, self.device, self.precision)
        return self._look

    @property
    def photos(self) -> PhotoReader:
        """The store's detector, loaded when it is needed first; ``UsageError`` where it is not known."""
        if self._photos is None:
            noted = self.index.facts.weights
            weights = self.options.weights or (Path(noted) if noted is not None else None)
            self._photos = PhotoReader(self.store, weights, self.device)
        return self._photos

    def images_of(self, texts: list[str], top: int, order: Order | None = None) -> list[Found]:
        """The ``top`` best images for each text; texts that are asked together are looked at together."""
        start = time.monotonic()
        queries = self.stage.encode_texts(texts)
        encoded = time.monotonic()
        numbers, firsts = self._nearest(queries, self._image_vectors, top, order)
        found = time.monotonic()
        pictures, image_S = np.unique(numbers, return_inverse=True)
        text_S = np.repeat(np.arange(len(texts)), numbers.shape[1])

        def look() -> NDArray[np.float32]:
            return self.look.score(texts, self.regions(pictures, self.look.most), text_S, image_S.ravel())

        return self._ordered(numbers, firsts, top, order, look, (start, encoded, found), queries)

    def captions_of(self, image: RegionRecord | RegionViews, top: int, order: Order | None = None) -> Found:
        """The ``top`` best captions for one image; none where the index has none."""
        if not self.index.facts.caption_count:
            return Found([], 0.0, 0.0, 0.0)
        start = time.monotonic()
        query = self.stage.encode_images([image])
        encoded = time.monotonic()
        numbers, firsts = self._nearest(query, self._caption_vectors, top, order)
        found = time.monotonic()
        texts = [self.index.caption(int(number)) for number in numbers[0]]

        def look() -> NDArray[np.float32]:
            return self.look.score(texts, [image], np.arange(len(texts)), np.zeros(len(texts), np.int64))

        return self._ordered(numbers, firsts, top, order, look, (start, encoded, found), query)[0]

    def similar_to(self, image: RegionRecord | RegionViews, top: int) -> Found:
        """The ``top`` images nearest to an image by their vectors; their scores are cosines."""
        start = time.monotonic()
        query = self.stage.encode_images([image])
        return self._similar(query, top, start)

    def similar_to_row(self, row: int, top: int) -> Found:
        """The ``top`` images nearest to one of the index, itself left out."""
        found = self._similar(self.index.image_vectors[row : row + 1], top + 1, time.monotonic())
        return replace(found, hits=[hit for hit in found.hits if hit.number != row][:top])

    def regions(self, rows: NDArray[np.integer], most: int | None = None) -> list[RegionViews]:
        """The first ``most`` regions of images of the index."""
        regions = self.store.first_regions(self._store_rows[rows], most)
        return [regions.views(i) for i in range(len(regions))]

    def record(self, row: int) -> RegionRecord:
        """All that the store has of an image of the index."""
        return self.store[self.index.image_id(row)]

    def pair_scores(self, texts: list[str], rows: NDArray[np.int64]) -> list[Hit]:
        """All three scores of each text with the image of the index beside it: ``rows`` int64 [n], as many as texts."""
        distinct = list(dict.fromkeys(texts))
        place = {text: number for number, text in enumerate(distinct)}
        text_S = np.array([place[text] for text in texts], np.int64)
        pictures, image_S = np.unique(rows, return_inverse=True)
        dots = (self.stage.encode_texts(distinct)[text_S] * self.index.image_vectors[rows]).sum(1)
        seconds = self.look.score(distinct, self.regions(pictures, self.look.most), text_S, image_S)
        firsts = self._logits(dots)
        scores = zip(rows, firsts, seconds, self.both.of(seconds, firsts), strict=True)
        return [Hit(int(row), float(first), float(second), float(both)) for row, first, second, both in scores]

    def unknown(self, text: str) -> Literal["all", "some", "none"]:
        """How much of a text the model's vocabulary has nothing of."""
        ids = self.vocabulary.encode([text], max(1, len(text)))[0]
        unknown = ids == self.vocabulary.facts.unk_id
        return "all" if unknown.all() else "some" if unknown.any() else "none"

    def _similar(self, query: NDArray[np.float32], top: int, start: float) -> Found:
        encoded = time.monotonic()
        near = nearest(self._on_device(query), self._image_vectors, top)
        order = np.argsort(-near.scores[0], kind="stable")
        hits = [Hit(int(near.numbers[0, i]), float(near.scores[0, i])) for i in order]
        return Found(hits, 1e3 * (encoded - start), 1e3 * (time.monotonic() - encoded), 0.0, query[0])

    def _nearest(
        self, queries: NDArray[np.float32], vectors: torch.Tensor, top: int, order: Order | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Numbers [Q, K] and logits [Q, K] of what is nearest to each query: as many as are shown, or looked at closely."""
        keep = top if (order or self.options.order) == "first" else max(top, self.options.candidates)
        near = nearest(self._on_device(queries), vectors, keep)
        return near.numbers, self._logits(near.scores)

    def _on_device(self, vectors: NDArray[np.float32]) -> torch.Tensor:
        with warnings.catch_warnings():  # mapped vectors are read-only, and nothing here writes
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(vectors).to(self.device)

    def _logits(self, dots: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.float32(self.stage.scale) * dots

    def _ordered(
        self,
        numbers: NDArray[np.int32],
        firsts: NDArray[np.float32],
        top: int,
        order: Order | None,
        look: Callable[[], NDArray[np.float32]],
        times: tuple[float, float, float],
        queries: NDArray[np.float32],
    ) -> list[Found]:
        order = order or self.options.order
        seconds = look().reshape(numbers.shape) if order != "first" else None
        start, encoded, found = times
        spent = 1e3 * (encoded - start), 1e3 * (found - encoded), 1e3 * (time.monotonic() - found) if seconds is not None else 0.0
        both = self.both.of(seconds, firsts) if seconds is not None else None
        values = firsts if seconds is None or both is None else seconds if order == "second" else both
        best = np.argsort(-values, axis=1, kind="stable")[:, :top]

        def hit(place: tuple[int, int]) -> Hit:
            looked = (float(seconds[place]), float(both[place])) if seconds is not None and both is not None else (None, None)
            return Hit(int(numbers[place]), float(firsts[place]), *looked)

        return [Found([hit((q, int(i))) for i in best[q]], *spent, queries[q]) for q in range(len(numbers))]

    def _require_the_same(self) -> None:
        """``UsageError`` where model, first stage or store are others than those the index was made with."""
        facts = self.index.facts
        for what, noted, here in (
            ("model", facts.model_digest, model_digest(self.model_folder)),
            ("first stage", facts.prefilter_digest, self.stage.digest),
            ("store", facts.store_digest, self.store.digest),
        ):
            if noted != here:
                another = f"the {what} is another than {self.index.path} was made with"
                raise UsageError(f"{another}; run `megainter index` again, to a new folder")


def _still_there(index: Index, noted: str, what: str, option: str) -> Path:
    """A path or name that the index notes; ``UsageError`` that names the option where what was there was moved."""
    if not noted.startswith(HUB) and not Path(noted).exists():
        raise UsageError(f"{noted}, the {what} that {index.path} was made with, is not there any more; say with {option} where it is")
    return Path(noted)


def take_threads(options: SearchOptions) -> None:
    """Give PyTorch the threads that searching may use, in all of this process."""
    torch.set_num_threads(options.threads or max(1, len(os.sched_getaffinity(0)) - 1))


def _precision(options: SearchOptions) -> tuple[Precision, str]:
    if options.precision != "auto":
        return options.precision, f"precision {options.precision}"
    return automatic([units_of(each) for each in devices_named(options.device)])
