"""The pictures of a search: where their files are, and the page that shows them."""

from pathlib import Path
from typing import Any

from megainter.errors import UsageError
from megainter.files import inside
from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.options import SearchOptions
from megainter.tasks.retrieval.search.searching import Searcher
from megainter.view.pages import plain, write_template
from megainter.view.pictures import region_boxes, thumbnail

LARGE = 480  # pixels of a picture's longer side
SCORES = {"both_stages": "both", "second_stage": "second", "first_stage": "first", "cosine": "cosine"}


def images_folder(index: Index, options: SearchOptions) -> Path:
    """The folder that the index's image files are in; ``UsageError`` where nobody said, or it is not there."""
    noted = index.facts.images
    folder = options.images or (Path(noted) if noted is not None else None)
    if folder is None:
        raise UsageError("pictures need the images' folder: give --images")
    if not folder.is_dir():
        raise UsageError(f"images folder {folder} does not exist or is not a folder; give --images")
    return folder


class Pictures:
    """Pictures of an index's images, from their folder."""

    def __init__(self, searcher: Searcher, folder: Path) -> None:
        self.searcher, self.index, self.folder = searcher, searcher.index, folder
        self.names = tuple(plain(name) for name in searcher.store.schema.class_names)

    def write_page(self, output: Path, answers: list[dict[str, Any]], photo: Path | None) -> None:
        """Write answers to one HTML page that needs nothing else. ``UsageError`` where a picture cannot be read."""
        facts = self.index.facts
        values = {
            "title": "megainter search",
            "facts": f"{facts.image_count:,} images, {facts.caption_count:,} captions. Point at a picture to see its regions.",
            "answers": [self._answer(answer, photo) for answer in answers],
        }
        write_template(output, "results.html", values)

    def _answer(self, answer: dict[str, Any], photo: Path | None) -> dict[str, Any]:
        spent = answer["milliseconds"]
        shared = {"spent": f"{sum(spent.values()):,.0f} ms", "notes": [plain(note) for note in answer["notes"]]}
        if "images" in answer:
            heading = plain(answer["query"])
            return shared | {"heading": heading, "photo": None, "captions": [], "images": [self._item(item) for item in answer["images"]]}
        captions = [{"text": plain(item["caption"]), "scores": _scores(item)} for item in answer["captions"]]
        picture = thumbnail(photo, LARGE) if photo is not None else None
        similar = [self._item(item) for item in answer["similar"]]
        return shared | {"heading": plain(answer["image"]), "photo": picture, "captions": captions, "images": similar}

    def _item(self, item: dict[str, Any]) -> dict[str, Any]:
        row = item["row"]
        picture = thumbnail(inside(self.folder, self.index.file(row)), LARGE)
        boxes = region_boxes(self.searcher.record(row), self.names)
        caption = plain((item["captions"] or [""])[0])
        return {
            "picture": picture, "boxes": boxes, "caption": caption, "rank": item["rank"], "id": plain(item["image_id"]),
            "scores": _scores(item),
        }  # fmt: skip


def _scores(item: dict[str, Any]) -> list[tuple[str, str]]:
    return [(short, f"{item[name]:.2f}") for name, short in SCORES.items() if name in item]
