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
from preprocessing.images.listing import list_images

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


class ImageFiles:
    """Where the image files of an index lie below their ``folder``: as the table of captions said, else as the folder has them."""

    def __init__(self, index: Index, folder: Path) -> None:
        """``UsageError`` where there is no such table, and no file of the folder has the id of an image."""
        self.index, self.folder = index, folder
        self._by_id: dict[str, str] | None = None
        if index.facts.pairs is None:
            self._by_id = {item.image_id: item.path for item in list_images(folder).items if item.part is None}
            if not any(image_id in self._by_id for image_id in index.image_ids.to_pylist()):
                first = f"{index.image_id(0)!r:.80}"
                raise UsageError(f"no file in {folder} has the id of an image of the index, such as {first}; give its folder by --images")

    def of(self, row: int) -> str:
        """Path of an image's file below the folder; of one that the folder has not, its id."""
        image_id = self.index.image_id(row)
        return self.index.file(row) if self._by_id is None else self._by_id.get(image_id, image_id)


class Pictures:
    """Pictures of an index's images, from their folder."""

    def __init__(self, searcher: Searcher, folder: Path) -> None:
        self.searcher, self.index, self.files = searcher, searcher.index, ImageFiles(searcher.index, folder)
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
        picture = thumbnail(inside(self.files.folder, self.files.of(row)), LARGE)
        boxes = region_boxes(self.searcher.record(row), self.names)
        caption = plain((item["captions"] or [""])[0])
        return {
            "picture": picture, "boxes": boxes, "caption": caption, "rank": item["rank"], "id": plain(item["image_id"]),
            "scores": _scores(item),
        }  # fmt: skip


def _scores(item: dict[str, Any]) -> list[tuple[str, str]]:
    return [(short, f"{item[name]:.2f}") for name, short in SCORES.items() if name in item]
