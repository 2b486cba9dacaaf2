"""``python examples/flickr8k/boxes.py``: boxes of Flickr8k's human phrase annotations, with head nouns as classes, for detector training.

Reads JSON Lines with ``image``, ``orig_width``, ``orig_height``, ``split`` and ``objects`` (``box`` xyxy in original pixels, ``phrases``).
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from PIL import Image

from megainter.data.tables.boxes import ImageBoxes, write_boxes
from megainter.errors import MegainterError, UsageError
from megainter.files import inside

# Words after which a phrase's head noun has been said ("the edge of a lake": edge).
PREPOSITIONS = frozenset({"of", "in", "on", "with", "at", "by", "near", "from", "under", "over", "behind", "beside", "wearing", "holding",
                          "to", "and", "that", "who", "which"})  # fmt: skip
# Heads that name no kind of thing.
EMPTY_HEADS = frozenset({"one", "ones", "other", "others", "something", "someone", "object", "objects", "it", "them", "they", "he", "she",
                         "him", "her", "black", "white", "red", "blue", "green", "yellow", "top", "area", "another", "each", "two", "three",
                         "four", "front", "back", "side", "edge", "piece"})  # fmt: skip
IRREGULAR = {
    "people": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "kids": "child",
    "kid": "child",
    "leaves": "leaf",
    "feet": "foot",
    "guys": "man",
    "guy": "man",
    "bike": "bicycle",
    "bikes": "bicycle",
    "puppies": "dog",
    "puppy": "dog",
    "lady": "woman",
    "ladies": "woman",
    "doggy": "dog",
    "toddler": "child",
    "adults": "person",
    "adult": "person",
}
PLURAL_FORMS = frozenset(
    ["grass", "glasses", "sunglasses", "shorts", "pants", "jeans", "dress", "clothes", "tennis", "bus", "goggles", "stairs", "scissors"]
)

app = App(name="flickr8k", help=__doc__)


def head_noun(phrase: str) -> str:
    """The singular head noun of a short noun phrase: the last word before the first preposition.

    >>> head_noun("A little girl"), head_noun("the edge of a lake"), head_noun("Two dogs")
    ('girl', 'edge', 'dog')
    """
    words = [word.strip(".,'\"") for word in phrase.lower().split()]
    stop = next((place for place, word in enumerate(words) if place and word in PREPOSITIONS), len(words))
    return singular(words[stop - 1]) if words else ""


def singular(word: str) -> str:
    """A plain English singular: enough to join the forms that annotators wrote."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if word in PLURAL_FORMS or word.endswith("ss") or not word.endswith("s") or len(word) < 4:
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("ches", "shes", "xes", "sses")) else word[:-1]


@app.default
def main(source: Path, /, *, images: Path, output: Path, classes: int = 150, vocabulary_from: Path | None = None) -> None:
    """Write a boxes manifest in the pixels of the image files.

    Parameters
    ----------
    source
        JSON Lines annotations of one split.
    images
        Folder of the images; a file of another size than annotated has its boxes scaled.
    output
        Parquet file to write.
    classes
        Keep the most frequent head nouns, so many.
    vocabulary_from
        Count head nouns in these annotations instead (the training split's).
    """
    rows = list(_rows(source))
    counted = _rows(vocabulary_from) if vocabulary_from else rows
    counts = Counter(noun for row in counted for thing in row["objects"] for noun in {*_heads(thing)})
    kept = {noun for noun, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:classes]}
    rank = {noun: counts[noun] for noun in kept}
    written = write_boxes(output, [found for row in rows if (found := _boxes(row, images, rank)) is not None])
    print(f"{output}: {written:,} images, {len(kept)} classes")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise UsageError(f"{path} line {number} is not valid JSON: {error}") from None
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None


def _heads(thing: dict[str, Any]) -> list[str]:
    return [noun for noun in map(head_noun, thing["phrases"]) if noun and noun not in EMPTY_HEADS]


def _boxes(row: dict[str, Any], images: Path, rank: dict[str, int]) -> ImageBoxes | None:
    """The boxes of one image whose most agreed head noun is a class; ties go to the more frequent class."""
    path = inside(images, row["image"])
    with Image.open(path) as image:
        width, height = image.size
    scale = np.array([width / row["orig_width"], height / row["orig_height"]] * 2)
    boxes, labels = [], []
    for thing in row["objects"]:
        votes = Counter(noun for noun in _heads(thing) if noun in rank)
        box = np.clip(np.array(thing["box"], dtype=np.float64) * scale, 0, [width, height] * 2)
        if votes and (box[2:] - box[:2] >= 2).all():
            boxes.append(box)
            labels.append(max(votes, key=lambda noun: (votes[noun], rank[noun], noun)))
    if not boxes:
        return None
    return ImageBoxes(
        image_id=Path(row["image"]).stem,
        image=row["image"],
        width=width,
        height=height,
        boxes=np.array(boxes, dtype=np.float32),
        labels=labels,
        split=row["split"],
    )


if __name__ == "__main__":
    try:
        app()
    except MegainterError as error:
        print(f"flickr8k: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
