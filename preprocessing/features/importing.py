"""`megainter features import`: foreign formats into a feature store.

What is written to a store is written in transactions and taken up again by the same command.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megainter.data.feature_store.record import StoreSchema, encode
from megainter.data.feature_store.shard import refuse_live_writers
from megainter.data.feature_store.writer import create_store, stored_ids
from megainter.data.image_ids import renamer
from megainter.errors import MegainterError, UsageError
from megainter.progress import Progress
from preprocessing.features.formats import READERS, recognise
from preprocessing.features.formats.complete import Completion, Labels, class_count, complete, fitted, label_ids, read_classes, read_sizes
from preprocessing.features.formats.entry import Background, BadEntryError, Entry, ForeignRegions, Source
from preprocessing.features.writing import Account, Encoded, Imported, finish, list_failures, write_entries

SAMPLES, TRIED = 20, 200  # the entries that settle feature size and classes, among the first ones


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

    # What the store will hold, decided from the first entries and from what the user said.
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

    # Every entry, in a store that nobody else writes; one that is there goes on where it was.
    create_store(output, schema)
    refuse_live_writers(output)
    done, account = stored_ids(output), Account()
    try:
        written = write_entries(output, schema, _imported(entries, how, schema, done, account, f"import {name}", rename))
    except BaseException:
        with suppress(OSError, MegainterError):  # a full disk must not hide the first error
            list_failures(output, account)
        raise
    list_failures(output, account)
    return finish(output, account, max_bad, written > 0)


def _samples(source: Path, entries: Source) -> list[tuple[str, ForeignRegions]]:
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


def _schema(
    samples: list[tuple[str, ForeignRegions]], how: Completion, name: str, features: str, top_k: int, detector: str | None
) -> StoreSchema:
    """The store's schema: what most of the samples have."""
    records, reason = [], ""
    for image_id, regions in samples:
        try:
            records.append(complete(image_id, regions, how))
        except BadEntryError as error:
            reason = str(error)
    if not records:
        raise UsageError(f"image {samples[0][0]!r:.80}: {reason}")

    # Sizes are those of most; what labels and names say of the classes.
    size = Counter(record.features.shape[1] for record in records).most_common(1)[0][0]
    record = next(record for record in records if record.features.shape[1] == size)
    regions = samples[0][1]
    kept = top_k or int(regions.probs is None)  # the likeliest class and the rest spread evenly is all that labels say
    names = how.classes or tuple(f"class {number}" for number in range(1, how.num_classes))
    settings = {"imported": name, "image_sizes": "nominal" if regions.normalised and how.sizes is None else "given"}
    _say_what_is_missing(regions, settings, name)

    return StoreSchema(
        feature_size=record.features.shape[1],
        num_classes=how.num_classes,
        class_names=("__background__", *names),
        detector=detector or f"unknown, imported from {name}",
        probs="top-k" if kept else "dense",
        top_k=kept,
        settings=settings,
        feature_dtype=features,
        extras={extra: value.dtype.name for extra, value in record.extras.items()},
    )


def _say_what_is_decided(samples: list[tuple[str, ForeignRegions]], how: Completion, labels: Labels | None, name: str) -> None:
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


def _first_other_size(found: list[tuple[str, ForeignRegions]], how: Completion) -> str:
    assert how.sizes is not None
    for image_id, regions in found:
        if how.sizes[image_id] != (regions.width, regions.height):
            width, height = how.sizes[image_id]
            return f"; the first to differ, {image_id[:80]!r:.80}, is {width} x {height} there and {regions.width} x {regions.height} here"
    return "; the first ones agree" if found else "; of the first ones none is in --sizes"


def _say_what_is_missing(regions: ForeignRegions, settings: dict[str, str], name: str) -> None:
    if settings["image_sizes"] == "nominal":
        print(f"{name} has no image sizes: boxes are kept on a nominal 1024 x 1024 (give --sizes for pixels)", flush=True)
    if regions.probs is None and (regions.names or "objects_id" in regions.extras):
        print(f"{name} has no class probabilities: the likeliest class gets its confidence, the rest is spread evenly", flush=True)
    elif regions.probs is None:
        print(f"{name} has no classes: train with the region objective 'feature', all classes are stored as equally likely", flush=True)


def _imported(
    source: Source, how: Completion, schema: StoreSchema, done: set[str], account: Account, label: str, rename: Callable[[str], str]
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


def _record(entry: Entry, image_id: str, how: Completion, schema: StoreSchema, account: Account) -> Encoded | None:
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
