"""`megainter features import, export, merge`: foreign formats into a feature store and out of one, and stores into one.

What is written to a store is written in transactions and taken up again by the same command; what is exported appears whole or not at all.
"""

import errno
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from megainter.data.feature_store import FeatureStore, FeatureStoreWriter, StoreSchema, seal_store, stored_ids
from megainter.data.image_ids import renamer
from megainter.data.record import RegionRecord, encode
from megainter.data.shard import read_store_json, refuse_live_writers, shard_files
from megainter.data.store_writer import create_store
from megainter.errors import NoSpaceError, TooManyBadInputsError, UsageError
from megainter.files import fsync_folder
from megainter.progress import Progress
from preprocessing.failures import write_failures
from preprocessing.formats import READERS, WRITERS, recognise
from preprocessing.formats.complete import Completion, Labels, class_count, complete, fitted, label_ids, read_classes, read_sizes
from preprocessing.formats.entry import Background, BadEntryError, Entry, Regions, Source

SHARD_BYTES = 64 << 30  # then the next shard is begun: a file that can still be copied
SAMPLES, TRIED = 20, 200  # the entries that settle feature size and classes, among the first ones
Encoded = tuple[str, bytes, int, int]  # id, record, CRC-32, regions

BOXES = "boxes"  # the setting of an extraction that holds the digest of its table of boxes


@dataclass(frozen=True)
class Imported:
    """What an import ends with: images in the store, entries listed as unusable and as repeated, and the store's digest."""

    stored: int
    bad: int
    repeated: int
    digest: str


@dataclass
class _Account:
    entries: int = 0
    stored: int = 0
    bad: int = 0
    lacking: int = 0  # kept without some member
    failures: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        return len(self.failures) - self.bad - self.lacking


def import_features(
    source: Path,
    output: Path,
    *,
    format: str | None = None,
    features: Literal["float16", "float32"] = "float16",
    classes: Path | None = None,
    sizes: Path | None = None,
    background: Background | None = None,
    top_k: int = 0,
    detector: str | None = None,
    ids: str | None = None,
    max_bad: float = 0.01,
) -> Imported:
    """Import region features of a foreign format (recognised by content, or ``format``) into the feature store ``output``, and seal it.

    ``features`` is the dtype to keep; ``classes`` lists the foreground classes; ``sizes`` gives image sizes, before what the format says
    of them; ``background`` is the column of the background in its class probabilities, and tells whether its labels count it; ``top_k``
    of the probabilities are kept (0: all); ``detector`` names what made the features; ``ids`` says how an image's id is
    made of the format's (``image_ids.renamer``). Listed in ``output``/failed.tsv are entries that
    cannot be used, those that repeat an id (the first is kept), and those that are kept without a member that others have.

    Raises ``UsageError``, ``TooManyBadInputsError`` where more than ``max_bad`` of the entries are bad (the others are kept, the store
    stays unsealed), ``DamagedError`` for an unreadable source, ``NoSpaceError``, ``LockedError``.
    """
    name = format or recognise(source)
    if name not in READERS or not 0 <= max_bad <= 1:
        raise UsageError(f"format {name!r:.80} is not one of {', '.join(READERS)}, or max_bad {max_bad} not between 0 and 1")
    entries, rename = READERS[name](source), renamer(ids) if ids is not None else str
    samples = _samples(source, entries)
    names = read_classes(classes) if classes is not None else None
    counts = Counter(class_count(regions, names, background) for _, regions in samples)
    num_classes = counts.most_common(1)[0][0]
    labels = label_ids([regions for _, regions in samples], background, num_classes - 1)
    given = read_sizes(sizes) if sizes is not None else None
    how = Completion(num_classes, names, given, background, labels.ids if labels is not None else "foreground")
    schema = _schema(samples, how, name, features, top_k, detector)
    decided = ({"labels": labels.ids} if labels is not None else {}) | ({"ids": ids} if ids is not None else {})
    schema = replace(schema, settings=schema.settings | decided)
    _say_what_is_decided(samples, how, labels, name)
    create_store(output, schema)
    refuse_live_writers(output)
    done, account = stored_ids(output), _Account()
    try:
        written = _write(output, schema, _imported(entries, how, schema, done, account, f"import {name}", rename))
    except BaseException:
        with suppress(OSError):  # a full disk must not hide the first error
            _list_failures(output, account)
        raise
    _list_failures(output, account)
    return _finish(output, account, max_bad, written > 0)


def _samples(source: Path, entries: Source) -> list[tuple[str, Regions]]:
    """Some of the first entries that can be decoded; ``UsageError`` where there is none."""
    samples, reason = [], "it is empty"
    with closing(entries.entries()) as read:  # type: ignore[type-var]
        for entry in itertools.islice(read, TRIED):
            try:
                samples.append((entry.image_id, entry.load()))
            except BadEntryError as error:
                reason = f"{entry.where}: {error}"
            if len(samples) == SAMPLES:
                break
    if not samples:
        raise UsageError(f"nothing in {source} can be read: {reason}")
    return samples


def _schema(samples: list[tuple[str, Regions]], how: Completion, name: str, features: str, top_k: int, detector: str | None) -> StoreSchema:
    """The store's schema: what most of the samples have."""
    records, reason = [], ""
    for image_id, regions in samples:
        try:
            records.append(complete(image_id, regions, how))
        except BadEntryError as error:
            reason = str(error)
    if not records:
        raise UsageError(f"image {samples[0][0]!r:.80}: {reason}")
    size = Counter(record.features.shape[1] for record in records).most_common(1)[0][0]
    record = next(record for record in records if record.features.shape[1] == size)
    regions = samples[0][1]
    kept = top_k or int(regions.probs is None)  # the likeliest class and the rest spread evenly is all that labels say
    names = how.classes or tuple(f"class {number}" for number in range(1, how.num_classes))
    settings = {"imported": name, "image_sizes": "nominal" if regions.normalised and how.sizes is None else "given"}
    _say_what_is_missing(regions, settings, name)
    return StoreSchema(
        record.features.shape[1],
        how.num_classes,
        ("__background__", *names),
        detector or f"unknown, imported from {name}",
        "top-k" if kept else "dense",
        kept,
        settings,
        features,
        {extra: value.dtype.name for extra, value in record.extras.items()},
    )


def _say_what_is_decided(samples: list[tuple[str, Regions]], how: Completion, labels: Labels | None, name: str) -> None:
    """What was not in the file, or in two places."""
    if labels is not None:
        kind, other = ("without", "first") if labels.ids == "foreground" else ("with", "none")
        say = "" if how.background is not None else f" (--background {other} says otherwise)"
        print(f"{name}: labels are counted {kind} background, {labels.reason}{say}", flush=True)
    for member, reason in {member: reason for _, regions in samples for member, reason in regions.left_out.items()}.items():
        print(f"{name}: {member} is left out where it is like this: {reason}", flush=True)
    if how.sizes is not None and any(regions.width for _, regions in samples):
        found = [(image_id, regions) for image_id, regions in samples if regions.width and image_id in how.sizes]
        print(f"image sizes are those of --sizes, not of {name}, for images that are in both{_first_other_size(found, how)}", flush=True)


def _first_other_size(found: list[tuple[str, Regions]], how: Completion) -> str:
    assert how.sizes is not None
    for image_id, regions in found:
        if how.sizes[image_id] != (regions.width, regions.height):
            width, height = how.sizes[image_id]
            return f"; the first to differ, {image_id[:80]!r:.80}, is {width} x {height} there and {regions.width} x {regions.height} here"
    return "; the first ones agree" if found else "; of the first ones none is in --sizes"


def _say_what_is_missing(regions: Regions, settings: dict[str, str], name: str) -> None:
    if settings["image_sizes"] == "nominal":
        print(f"{name} has no image sizes: boxes are kept on a nominal 1024 x 1024 (give --sizes for pixels)", flush=True)
    if regions.probs is None and (regions.names or "objects_id" in regions.extras):
        print(f"{name} has no class probabilities: the likeliest class gets its confidence, the rest is spread evenly", flush=True)
    elif regions.probs is None:
        print(f"{name} has no classes: train with the region objective 'feature', all classes are stored as equally likely", flush=True)


def _imported(
    source: Source, how: Completion, schema: StoreSchema, done: set[str], account: _Account, label: str, rename: Callable[[str], str]
) -> Iterator[Encoded]:
    """Records to add: of every entry that can be used, whose id has not come before and is not in the store yet."""
    seen: set[str] = set()
    with Progress(label, source.total, source.unit) as progress:
        for entry in source.entries():
            account.entries += 1
            progress.update(entry.size, f"{account.bad} bad" if account.bad else "")
            try:
                image_id = rename(entry.image_id) if entry.image_id else ""
            except ValueError as error:
                account.bad += 1
                account.failures.append((entry.image_id, entry.where, str(error)))
                continue
            if image_id in seen:
                account.failures.append((image_id, entry.where, "its id came before, and the first is kept"))
            elif image_id in done:
                seen.add(image_id)
            elif (record := _record(entry, image_id, how, schema, account)) is not None:
                seen.add(image_id)
                yield record


def _record(entry: Entry, image_id: str, how: Completion, schema: StoreSchema, account: _Account) -> Encoded | None:
    try:
        regions = entry.load()
        record, lacking = fitted(complete(entry.image_id, regions, how), schema.extras)
        if lacking:
            account.lacking += 1
            why = "".join(f"; {reason}" for reason in regions.left_out.values())
            account.failures.append((image_id, entry.where, f"kept without {', '.join(lacking)}{why}"))
        return image_id, *encode(image_id, record, schema), len(record)
    except (BadEntryError, UsageError) as error:
        account.bad += 1
        account.failures.append((entry.image_id, entry.where, str(error)))
        return None


def _list_failures(output: Path, account: _Account) -> None:
    write_failures(output / "failed.tsv", ("image_id", "where", "reason"), account.failures)


def _finish(output: Path, account: _Account, max_bad: float, changed: bool) -> Imported:
    """Seal, unless too many were bad."""
    listed = f"{account.bad:,} of {account.entries:,} entries cannot be used, listed in {output / 'failed.tsv'}"
    if account.bad > max_bad * account.entries:
        raise TooManyBadInputsError(f"{listed}: more than --max-bad {max_bad:g}; the others are kept: repair or allow more, and run again")
    if account.bad:
        print(listed, flush=True)
    if account.lacking:
        print(f"{account.lacking:,} entries lack a member that others have; they are kept, listed in {output / 'failed.tsv'}", flush=True)
    if account.repeated:
        print(f"{account.repeated:,} entries repeat an id; the first of each is kept, listed in {output / 'failed.tsv'}", flush=True)
    if changed or not read_store_json(output)["sealed"]:
        seal_store(output)
    with FeatureStore(output) as store:
        return Imported(len(store), account.bad, account.repeated, store.digest)


def _write(output: Path, schema: StoreSchema, records: Iterator[Encoded]) -> int:
    """Add records to a store's last shard, and to a new one each time it has become large; returns how many."""
    written = 0
    while True:
        with FeatureStoreWriter(output, schema, _shard_to_fill(output)) as writer:
            for record in records:
                writer.add_encoded([record])
                written += 1
                if writer.shard.stat().st_size >= SHARD_BYTES:
                    break
            else:
                return written


def _shard_to_fill(output: Path) -> str:
    shards = shard_files(output)
    if shards and shards[-1].stat().st_size < SHARD_BYTES:
        return shards[-1].stem
    return f"shard-{int(shards[-1].stem.removeprefix('shard-')) + 1 if shards else 0:05d}"


def merge_stores(stores: list[Path], output: Path) -> str:
    """Copy the records of several sealed stores into ``output``, seal it and return its digest. The same command goes on after a stop.

    ``UsageError`` where detector or schema differ, or where two stores have different records of one image; equal ones are merged.
    ``DamagedError`` naming a record that is damaged.
    """
    if len(stores) < 2 or output.resolve() in {store.resolve() for store in stores}:
        raise UsageError("give two stores or more, and another path for what they are merged into")
    with ExitStack() as stack:
        opened = [stack.enter_context(FeatureStore(path)) for path in stores]
        schemas = _with_joint_boxes([store.schema for store in opened])
        for store, schema in zip(opened[1:], schemas[1:], strict=True):
            if difference := schemas[0].difference(schema):
                raise UsageError(f"{opened[0].path} and {store.path} cannot be merged: in the first {difference}")
        for one, two in itertools.combinations(opened, 2):
            _refuse_conflict(one, two)
        create_store(output, schemas[0])
        refuse_live_writers(output)
        _write(output, schemas[0], _merged(opened, stored_ids(output)))
    return seal_store(output)


def _with_joint_boxes(schemas: list[StoreSchema]) -> list[StoreSchema]:
    """The same schemas where all were extracted from given boxes, of one table each: as if from the tables together."""
    if not all(BOXES in schema.settings for schema in schemas):
        return schemas
    tables = {digest for schema in schemas for digest in str(schema.settings[BOXES]).split("+")}
    joint = {BOXES: "+".join(sorted(tables))}
    return [replace(schema, settings=schema.settings | joint) for schema in schemas]


def _refuse_conflict(one: FeatureStore, two: FeatureStore) -> None:
    ids = two.ids[:]
    first, second = one.checksums(ids), two.checksums(ids)
    different = np.flatnonzero((first >= 0) & (first != second))
    if len(different):
        example = ids[int(different[0])]
        raise UsageError(f"{one.path} and {two.path} have different records of {len(different):,} images, first {example!r:.80}")


def _merged(stores: list[FeatureStore], done: set[str]) -> Iterator[Encoded]:
    with Progress("merge", sum(len(store) for store in stores), "images") as progress:
        for store in stores:
            for image_id in store.in_storage_order():
                if image_id not in done:
                    done.add(image_id)
                    yield image_id, *store.encoded(image_id)
                progress.update()


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
    aside = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    try:
        yield aside
        _make_durable(aside)
        os.rename(aside, destination)
        fsync_folder(destination.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise (NoSpaceError if full else UsageError)(
            f"{destination} cannot be written: {error.strerror or error}; nothing was kept"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True) if aside.is_dir() else aside.unlink(missing_ok=True)


def _make_durable(path: Path) -> None:
    for part in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fsync_folder(part)  # opening to read and fsync serve files as well
