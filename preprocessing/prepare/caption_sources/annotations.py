"""Caption files that hold one image or one caption an entry: JSON Lines, COCO, Karpathy's splits, Flickr30K, Visual Genome."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ijson

from megainter.errors import UsageError
from megainter.files import read_json
from preprocessing.prepare.coco import images_of
from preprocessing.prepare.reading import (
    Fields,
    Item,
    Reading,
    has_id,
    json_object,
    parsed,
    read_entries,
    read_lines,
    record_item,
    split_in_name,
    split_name,
    text,
    texts,
)


def jsonl(src: Path, fields: Fields, encoding: str | None = None) -> Reading[Item]:
    """``{"image": "a.jpg", "caption": "..."}`` or ``"captions": [...]`` a line, optionally "image_id", "pair_id", "split"."""
    return read_lines(src, lambda number, line: record_item(number, json_object(line), fields), encoding, asks_encoding=True)


def coco(src: Path) -> Reading[Item]:
    """annotations/captions_*.json, or dataset_coco.json of the Karpathy split."""
    if src.suffix != ".json":
        raise UsageError(f"{src} is not a COCO caption file; those are captions_*.json and dataset_coco.json")
    return _json_document(src)


def flickr30k(src: Path) -> Reading[Item]:
    """dataset_flickr30k.json of the Karpathy split, results_20130124.token, or the official code's *.jsonline."""
    if src.suffix == ".json":
        return _json_document(src)
    if src.suffix.startswith(".jsonl"):
        split = split_in_name(src)
        return read_lines(src, lambda number, line: _official_item(number, line, split))
    return read_lines(src, _token_item)


def visual_genome(src: Path) -> Reading[Item]:
    """region_descriptions.json: a list of images with their regions' phrases, 700 MB that are read as they are needed."""
    file = open(src, "rb")  # noqa: SIM115 (closed by the generator)
    return Reading(parsed(_streamed(src, file), _genome_item), src.stat().st_size, "bytes", file.tell, "entry")


def _streamed(src: Path, file: Any) -> Iterator[Any]:
    with file:
        try:
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError as error:
            raise UsageError(f"{src} is not valid JSON: {' '.join(str(error).split())[:200]}") from None


def _genome_item(number: int, entry: dict[str, Any]) -> Item:
    """An image of Visual Genome 1.4 or 1.2, where a region has a "region_id", or of 1.0, where that is its "id"."""
    image = text(entry, "id" if "id" in entry else "image_id")
    paths = tuple(f"{folder}{image}.jpg" for folder in ("", "VG_100K/", "VG_100K_2/"))
    phrases = [text(region, "phrase", "") for region in entry["regions"]]
    return Item(number, paths, phrases, [text(region, "region_id" if "region_id" in region else "id") for region in entry["regions"]])


def _official_item(number: int, line: str, split: str) -> Item:
    """A line of the official code's Flickr30K files: "img_path" and five "sentences"."""
    value = json_object(line)
    path = text(value, "img_path")
    return Item(number, tuple(dict.fromkeys((path, os.path.basename(path)))), texts(value, "sentences"), split=split)


def _token_item(number: int, line: str) -> Item:
    """``1000092795.jpg#0<tab>caption``: Flickr30K's and Flickr8k's own files."""
    name, tab, caption = line.strip().partition("\t")
    image, mark, which = name.rpartition("#")
    if not (tab and mark and which.isdigit()):
        raise ValueError("not 'image.jpg#number<tab>caption'")
    return Item(number, (image,), [caption], [f"{os.path.splitext(image)[0]}#{which}"])


def _json_document(src: Path) -> Reading[Item]:
    """COCO's caption files or a Karpathy split: one JSON document each, which has to be read whole."""
    document = read_json(src)
    if not isinstance(document, dict) or not isinstance(document.get("images"), list):
        raise UsageError(f"{src} is neither a COCO caption file nor a Karpathy split: it has no list of images")
    if isinstance(document.get("annotations"), list):
        return read_entries(document["annotations"], _coco_parser(src, document["images"]))
    if document["images"] and not (isinstance(document["images"][0], dict) and "sentences" in document["images"][0]):
        raise UsageError(f"{src} has images but no captions; COCO's are in captions_*.json")
    return read_entries(document["images"], _karpathy_item)


def _coco_parser(src: Path, images: list[Any]) -> Callable[[int, dict[str, Any]], Item]:
    names = {image["id"]: image["file_name"] for image in images if has_id(image) and "file_name" in image}
    split = split_in_name(src)

    def parse(number: int, entry: dict[str, Any]) -> Item:
        if entry["image_id"] not in names:
            raise ValueError(f"image_id {entry['image_id']!r:.80} is not among the images")
        return Item(number, coco_paths(src, names[entry["image_id"]]), [text(entry, "caption", "")], [text(entry, "id")], split=split)

    return parse


def coco_paths(src: Path, name: str) -> tuple[str, ...]:
    """Where COCO's image may lie: in the images folder, or in the folder below it that the annotation file's name tells."""
    folder = images_of(src.name)
    return (name, f"{folder}/{name}") if folder else (name,)


def _karpathy_item(number: int, entry: dict[str, Any]) -> Item:
    name, sentences = text(entry, "filename"), entry["sentences"]
    paths = (f"{entry['filepath']}/{name}", name) if "filepath" in entry else (name,)
    captions = [text(sentence, "raw", "") for sentence in sentences]
    return Item(number, paths, captions, [text(sentence, "sentid") for sentence in sentences], split=split_name(text(entry, "split", "")))
