"""`megainter search`, from the index to what is printed."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from megainter.data.feature_store.record import RegionRecord
from megainter.tasks.retrieval.search.answers import captions_answer, images_answer, table
from megainter.tasks.retrieval.search.checks import check_search
from megainter.tasks.retrieval.search.index import Index, open_index
from megainter.tasks.retrieval.search.options import Order, SearchOptions
from megainter.tasks.retrieval.search.pictures import Pictures, images_folder
from megainter.tasks.retrieval.search.searching import Searcher, take_threads

UNKNOWN = {
    "all": "the model's vocabulary has no word of this query, so that what it found is chance",
    "some": "the model's vocabulary lacks a part of this query, and the rest was searched for",
}


def run_search(
    path: Path, queries: tuple[str, ...], options: SearchOptions, *, image: Path | None, top: int, as_json: bool, page: Path | None
) -> None:
    """Answer all queries, print tables or JSON, and write the page. ``UsageError`` for what cannot be searched."""
    check_search(path, queries, options, image, top, page)
    index = open_index(path)
    folder = images_folder(index, options) if page is not None else None  # refuses before long work

    take_threads(options)
    start = time.monotonic()
    searcher = Searcher(index, options)
    if options.order != "first":
        _ = searcher.look  # loaded here, and not in the first query's time
    loaded = time.monotonic() - start
    answers = [_text_answer(searcher, query, top) for query in queries]
    if image is not None:
        answers.append(photo_answer(searcher, image, image.name, top)[0])

    facts = {"index": str(path), "images": index.facts.image_count, "captions": index.facts.caption_count}
    if as_json:
        print(json.dumps({**facts, **_settings(searcher), "load_seconds": round(loaded, 3), "answers": answers}, ensure_ascii=False))
    else:
        print("\n\n".join(table(answer) for answer in answers))
        print(f"{_closing(searcher, index, loaded)}", file=sys.stderr)
    if page is not None and folder is not None:
        Pictures(searcher, folder).write_page(page, answers, image)
        print(page, file=sys.stderr)


def _text_answer(searcher: Searcher, query: str, top: int) -> dict[str, Any]:
    return images_answer(query, searcher.images_of([query], top)[0], searcher.index, notes_on(searcher, query))


def notes_on(searcher: Searcher, query: str) -> list[str]:
    """What is to be said of a query beside what it found."""
    unknown, spelled = searcher.unknown(query), searcher.vocabulary.spelled_out(query)
    notes = [] if unknown == "none" else [UNKNOWN[unknown]]
    if spelled:
        notes.append(f"the model reads {', '.join(spelled)} letter by letter: its vocabulary was made without such words")
    return notes


def photo_answer(searcher: Searcher, photo: Path, name: str, top: int, order: Order | None = None) -> tuple[dict[str, Any], RegionRecord]:
    """Captions and similar images for a photo in a file, and its regions; ``detect`` among the milliseconds is the detector's time."""
    reader = searcher.photos
    start = time.monotonic()
    record = reader.read(photo)
    detect = 1e3 * (time.monotonic() - start)
    answer = captions_answer(name, searcher.captions_of(record, top, order), searcher.similar_to(record, top), searcher.index)
    answer["milliseconds"] = {"detect": round(detect, 3), **answer["milliseconds"]}
    return answer, record


def _settings(searcher: Searcher) -> dict[str, Any]:
    options = searcher.options
    return {"order": options.order, "candidates": options.candidates, "precision": searcher.precision, "device": str(searcher.device)}


def _closing(searcher: Searcher, index: Index, loaded: float) -> str:
    facts, options = index.facts, searcher.options
    closely = f"{min(options.candidates, facts.image_count):,} for each query looked at closely"
    looked = "by their vectors alone" if options.order == "first" else closely
    return f"{facts.image_count:,} images, {facts.caption_count:,} captions, {looked}; {searcher.precision_note}; loaded in {loaded:.1f} s"
