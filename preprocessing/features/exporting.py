"""A store written in other projects' formats."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.errors import UsageError
from megainter.files import aside
from megainter.progress import Progress
from preprocessing.features.formats import WRITERS


def export_features(store: Path, destination: Path, format: str) -> int:
    """Write a sealed store in a foreign format to ``destination``, which must not exist; returns the number of images.

    ``UsageError`` where an id cannot stand in the format (named before anything is written), ``DamagedError`` for a damaged record,
    ``NoSpaceError``.
    """
    if format not in WRITERS:
        raise UsageError(f"format {format!r:.80} is not one of {', '.join(WRITERS)}")
    writer = WRITERS[format]
    with FeatureStore(store) as opened:
        problems = [(image_id, problem) for image_id in opened.ids if (problem := writer.id_problem(image_id))]
        if problems:
            first, problem = problems[0]
            raise UsageError(
                f"{len(problems):,} ids of {store} cannot stand in {format}: {first[:60]!r:.80} {problem}; parquet takes any id"
            )
        _say_what_is_made_up(opened.schema, format)
        with _published(destination) as aside:
            writer.write(_exported(opened, f"export {format}"), opened.schema, aside)
        return len(opened)


def _say_what_is_made_up(schema: StoreSchema, format: str) -> None:
    if schema.settings.get("image_sizes") == "nominal" and format != "uniter-lmdb":
        print("the image sizes of this store are nominal (1024 x 1024), and so are those that are written", flush=True)
    if format == "lxmert-tsv" and "attrs_id" not in schema.extras:
        print("this store has no attributes: attribute 0 with confidence 0 is written", flush=True)
    if format == "vilbert-lmdb" and schema.probs == "top-k":
        print(f"this store keeps {schema.top_k} class probabilities of a region; the rest is written spread evenly", flush=True)


def _exported(store: FeatureStore, label: str) -> Iterator[tuple[str, RegionRecord]]:
    with Progress(label, len(store), "images") as progress:
        for image_id in store.in_storage_order():
            yield image_id, store[image_id]
            progress.update()


@contextmanager
def _published(destination: Path) -> Iterator[Path]:
    """A path beside ``destination`` to write to; what stands there at the end is made durable and renamed."""
    if destination.exists():
        raise UsageError(f"{destination} exists; delete it or give another path")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination.parent} is not a folder")
    with aside(destination) as partial:
        yield partial
