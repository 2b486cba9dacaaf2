"""Requests that come while others are computed are computed together next, in the one thread that has the model."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from megainter.tasks.retrieval.search.options import Order
from megainter.tasks.retrieval.search.searching import Found, Hit, Searcher

MOST_TOGETHER = 16  # searches of one batch
MOST_PAIRS = 1024  # scored in one batch
MOST_WAITING = 256  # requests; further ones are told to come again


class BusyError(Exception):
    """Too many requests wait already."""


@dataclass(frozen=True)
class Search:
    """A sentence, and how many images are wanted."""

    text: str
    top: int
    order: Order


@dataclass(frozen=True)
class Scoring:
    """Pairs of a text and an image's row."""

    texts: list[str]
    rows: list[int]


@dataclass(frozen=True)
class Call:
    """Anything else that needs the model; it is computed by itself."""

    compute: Callable[[], Any]


Work = Search | Scoring | Call


@dataclass(frozen=True, eq=False)
class _Asked:
    work: Work
    answer: asyncio.Future[Any]


class Batcher:
    """Takes work from any number of requests; ``run`` must be running."""

    def __init__(self, searcher: Searcher) -> None:
        self.searcher = searcher
        self.batches, self.answered = 0, 0
        self._waiting: asyncio.Queue[_Asked] = asyncio.Queue(MOST_WAITING)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="search")

    async def ask(self, work: Work) -> Any:
        """The answer to some work: ``Found`` to a search, hits to a scoring, what a call returns. ``BusyError`` where too many wait."""
        asked = _Asked(work, asyncio.get_running_loop().create_future())
        try:
            self._waiting.put_nowait(asked)
        except asyncio.QueueFull:
            raise BusyError from None
        return await asked.answer

    async def run(self) -> None:
        """Compute what waits, batch by batch, until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                batch = [await self._waiting.get()]
                while len(batch) < MOST_TOGETHER and not self._waiting.empty():
                    batch.append(self._waiting.get_nowait())
                batch = [asked for asked in batch if not asked.answer.cancelled()]
                answers = await loop.run_in_executor(self._thread, self._compute, [asked.work for asked in batch])
                self.batches, self.answered = self.batches + 1, self.answered + len(batch)
                for asked, answer in zip(batch, answers, strict=True):
                    _give(asked.answer, answer)
        finally:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _compute(self, works: Sequence[Work]) -> list[Any]:
        """An answer or an exception for each."""
        answers: list[Any] = [None] * len(works)
        for order in get_args(Order):
            of_order = [i for i, work in enumerate(works) if isinstance(work, Search) and work.order == order]
            _fill(answers, works, of_order, self._search)
        _fill(answers, works, [i for i, work in enumerate(works) if isinstance(work, Scoring)], self._score)
        for i in (i for i, work in enumerate(works) if isinstance(work, Call)):
            _fill(answers, works, [i], lambda calls: [calls[0].compute()])
        return answers

    def _search(self, searches: list[Search]) -> list[Found]:
        """Searches of one order. What takes time is shared, so that each one's milliseconds are those of all."""
        top = max(each.top for each in searches)
        found = self.searcher.images_of([each.text for each in searches], top, searches[0].order)
        return [replace(one, hits=one.hits[: each.top]) for one, each in zip(found, searches, strict=True)]

    def _score(self, scorings: list[Scoring]) -> list[list[Hit]]:
        texts = [text for each in scorings for text in each.texts]
        rows = np.array([row for each in scorings for row in each.rows], np.int64)
        parts = [slice(start, start + MOST_PAIRS) for start in range(0, len(texts), MOST_PAIRS)]
        hits = [hit for part in parts for hit in self.searcher.pair_scores(texts[part], rows[part])]
        ends = np.cumsum([len(each.texts) for each in scorings])
        return [hits[end - len(each.texts) : end] for end, each in zip(ends, scorings, strict=True)]


def _fill(answers: list[Any], works: Sequence[Work], places: list[int], compute: Callable[[list[Any]], Sequence[Any]]) -> None:
    """Put what ``compute`` gives for the works at ``places``, or its exception, where it belongs.

    Of several that fail together each is tried by itself: only the one at fault is told.
    """
    if not places:
        return
    try:
        found = compute([works[place] for place in places])
    except Exception as error:  # whatever it is, the request that asked is told
        if len(places) > 1:
            for place in places:
                _fill(answers, works, [place], compute)
            return
        found = [error]
    for place, answer in zip(places, found, strict=True):
        answers[place] = answer


def _give(future: asyncio.Future[Any], answer: Any) -> None:
    if future.cancelled():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)
