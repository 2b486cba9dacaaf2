"""Answers of a search as other programs take them, and as a table for people."""

import shutil
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.searching import Found, Hit
from megainter.view.pages import plain

WIDEST_COLUMN = 60  # letters of a caption in a table that no terminal limits


def images_answer(query: str, found: Found, index: Index, notes: list[str]) -> dict[str, Any]:
    """What a text found, ready for JSON; scores are rounded nowhere."""
    images = [image_item(hit, rank, index, found.query) for rank, hit in enumerate(found.hits, 1)]
    return {"query": query, "images": images, **_rest(found, notes)}


def captions_answer(image: str, found: Found, similar: Found, index: Index) -> dict[str, Any]:
    """What a photo found: captions, and similar images with the cosines of their vectors."""
    captions = [caption_item(hit, rank, index) for rank, hit in enumerate(found.hits, 1)]
    return {"image": image, "captions": captions, "similar": similar_items(similar, index), **_rest(found, [])}


def similar_items(similar: Found, index: Index) -> list[dict[str, Any]]:
    """Images nearest to an image, each with the cosine."""
    return [_image(hit.number, rank, index, similar.query) | {"cosine": hit.first} for rank, hit in enumerate(similar.hits, 1)]


def image_item(hit: Hit, rank: int, index: Index, query: NDArray[np.float32] | None = None) -> dict[str, Any]:
    """An image that was found; its captions that are nearest to the query's vector [D] first, where there is one."""
    return _image(hit.number, rank, index, query) | _scores(hit)


def caption_item(hit: Hit, rank: int, index: Index) -> dict[str, Any]:
    """A caption that was found, and the image that it was written for."""
    row = int(index.image_of_caption[hit.number])
    caption = {"rank": rank, "pair_id": str(index.pair_ids[hit.number].as_py()), "caption": index.caption(hit.number)}
    return caption | {"row": row, "image_id": index.image_id(row)} | _scores(hit)


def _image(row: int, rank: int, index: Index, query: NDArray[np.float32] | None) -> dict[str, Any]:
    return {"rank": rank, "row": row, "image_id": index.image_id(row), "captions": index.captions_of(row, query)}


def _scores(hit: Hit) -> dict[str, float]:
    values = {"first_stage": hit.first, "second_stage": hit.second, "both_stages": hit.both}
    return {name: value for name, value in values.items() if value is not None}


def _rest(found: Found, notes: list[str]) -> dict[str, Any]:
    spent = {"encode": found.encode_ms, "nearest": found.nearest_ms, "second_stage": found.second_ms}
    return {"milliseconds": {name: round(value, 3) for name, value in spent.items()}, "notes": notes}


def table(answer: dict[str, Any]) -> str:
    """An answer as lines for a terminal, whatever the captions hold."""
    heading = plain(answer.get("query") or f"photo {answer['image']}")
    lines = [heading, *(f"note: {plain(note)}" for note in answer["notes"])]
    if "images" in answer:
        lines += _lines(answer["images"])
    else:
        lines += ["captions", *_lines(answer["captions"])] if answer["captions"] else []
        lines += ["similar images", *_lines(answer["similar"])]
    spent = answer["milliseconds"]
    parts = ", ".join(f"{name.replace('_', ' ')} {value:,.1f}" for name, value in spent.items())
    return "\n".join([*lines, f"{sum(spent.values()):,.1f} ms: {parts}"])


def _lines(items: list[dict[str, Any]]) -> list[str]:
    """One line for each item: rank, scores, image, and the caption where any has one."""
    names = [name for name in ("both_stages", "second_stage", "first_stage", "cosine") if items and name in items[0]]
    head = ["", *(name.removesuffix("_stages").removesuffix("_stage") for name in names), "image"]
    rows = [[str(item["rank"]), *(f"{item[name]:.3f}" for name in names), plain(item["image_id"])] for item in items]
    captions = [plain(item.get("caption") or _first(item)) for item in items]
    widths = [max(shown_width(row[column]) for row in [head, *rows]) for column in range(len(head))]
    taken = sum(widths) + 2 * len(widths)
    room = max(20, shutil.get_terminal_size((taken + WIDEST_COLUMN, 0)).columns - taken)
    shown = [shortened(text, room) for text in ["caption", *captions]] if any(captions) else [""] * (1 + len(items))
    rights = [True] * (len(names) + 1) + [False]
    return ["  ".join([*map(_padded, row, widths, rights), text]).rstrip() for row, text in zip([head, *rows], shown, strict=True)]


def _first(item: dict[str, Any]) -> str:
    captions = item.get("captions") or [""]
    return str(captions[0])


def shown_width(text: str) -> int:
    """Columns of a terminal that a text takes: two for a Chinese character, none for an accent of its own."""
    return sum(0 if unicodedata.combining(letter) else 1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def shortened(text: str, width: int) -> str:
    """As much of a text as fits, with three dots where something is left out."""
    if shown_width(text) <= width:
        return text
    while text and shown_width(text) > width - 3:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - shown_width(text))
    return space + text if right else text + space
