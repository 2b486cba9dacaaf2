"""`megainter features show, check`: what a feature store holds, and whether it is as it was written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import AGAIN, RegionRecord, StoreSchema, check_record
from megainter.data.feature_store.variety import hardly_varied
from megainter.errors import DamagedError, UsageError
from megainter.progress import Progress
from megainter.weights import origin_name

BARS, BAR_WIDTH = 10, 40  # of the histogram


def describe_store(path: Path) -> str:
    """Counts, sizes, schema, shards and a histogram of region counts, in lines. An unfinished store is described as far as it is."""
    with FeatureStore(path, allow_partial=True) as store:
        counts = store.region_counts(store.ids)
        shards = [f"  {name}  {size / 1e6:,.1f} MB" for name, size in store.shard_sizes().items()]
        lines = [f"{path}: {len(store):,} images, {int(counts.sum()):,} regions" + ("" if store.sealed else " (not sealed: incomplete)")]
        lines += [*_schema_lines(store.schema, origin_name(path)), f"digest: {store.digest}", f"shards: {len(shards)}", *shards]
        if len(counts):
            lines += _histogram(counts)
            lines += [f"warning: {told}" for told in [hardly_varied(store)] if told]
        return "\n".join(lines)


def _schema_lines(schema: StoreSchema, name: str | None) -> list[str]:
    named = ", ".join(schema.class_names[1:4])
    probs = "all of them" if schema.probs == "dense" else f"the {schema.top_k} likeliest of a region"
    lines = [
        f"detector: {f'{name}, ' if name is not None else ''}{schema.detector}",
        f"features: {schema.feature_size} x {schema.feature_dtype}",
        f"classes: {schema.num_classes:,} with background ({named}, ...), probabilities kept: {probs}",
    ]
    lines += [f"extras: {', '.join(f'{name} {dtype}' for name, dtype in schema.extras.items())}"] if schema.extras else []
    return lines + [f"settings: {', '.join(f'{name}={value}' for name, value in schema.settings.items())}"] * bool(schema.settings)


def _histogram(counts: np.ndarray) -> list[str]:
    low, high = int(counts.min()), int(counts.max())
    step = -(-(high - low + 1) // BARS)
    edges = np.arange(low, high + step + 1, step)
    numbers = np.histogram(counts, edges)[0]
    lines = ["regions per image:"]
    for start, number in zip(edges[:-1].tolist(), numbers.tolist(), strict=True):
        label = f"{start}" if step == 1 else f"{start}-{min(start + step - 1, high)}"
        lines.append(f"  {label:>9} {'#' * round(BAR_WIDTH * number / numbers.max()):<{BAR_WIDTH}} {number:,}")
    return lines


def store_facts(path: Path) -> dict[str, Any]:
    """What ``describe_store`` tells, as JSON types: shards by name with their bytes, images by how many regions they have."""
    with FeatureStore(path, allow_partial=True) as store:
        counts, schema = store.region_counts(store.ids), store.schema
        numbers, images = np.unique(counts, return_counts=True)
        facts = {"store": str(path), "sealed": store.sealed, "images": len(store), "regions": int(counts.sum()), "digest": store.digest}
        shards = {str(name): int(size) for name, size in store.shard_sizes().items()}
    spread = {str(number): count for number, count in zip(numbers.tolist(), images.tolist(), strict=True)}
    return facts | {"schema": asdict(schema), "shards": shards, "images_by_region_count": spread}


def describe_record(path: Path, image_id: str) -> str:
    """One record: size, and of each region its box, likeliest class and extras, in lines."""
    with FeatureStore(path, allow_partial=True) as store:
        record, schema = store[image_id], store.schema
    features = np.asarray(record.features, np.float32)
    lines = [
        f"{image_id!r}: {record.width} x {record.height}, {len(record)} regions",
        f"features: {features.shape[1]} x {record.features.dtype.name}, {features.min():.3g} to {features.max():.3g}",
    ]
    return "\n".join(lines + [_region_line(record, schema, row) for row in range(len(record))])


def record_facts(path: Path, image_id: str) -> dict[str, Any]:
    """What ``describe_record`` tells, as JSON types; boxes in pixels."""
    with FeatureStore(path, allow_partial=True) as store:
        record, schema = store[image_id], store.schema
    facts = {"image_id": image_id, "width": record.width, "height": record.height, "feature_dtype": record.features.dtype.name}
    return facts | {"regions": [_region_facts(record, schema, row) for row in range(len(record))]}


def _region_facts(record: RegionRecord, schema: StoreSchema, row: int) -> dict[str, Any]:
    best = int(record.class_probs[row].argmax())
    facts = {"box": record.boxes[row].tolist(), "class": schema.class_names[best], "probability": float(record.class_probs[row, best])}
    return facts | {name: value[row].item() for name, value in record.extras.items()}


def _region_line(record: RegionRecord, schema: StoreSchema, row: int) -> str:
    best = int(record.class_probs[row].argmax())
    box = ", ".join(f"{value:.1f}" for value in record.boxes[row])
    extras = "".join(f"  {name}={value[row]:.6g}" for name, value in record.extras.items())
    return f"  {row:>3}  [{box}]  {schema.class_names[best]} {record.class_probs[row, best]:.3f}{extras}"


@dataclass(frozen=True)
class Checked:
    """How many records a store has, and what is wrong with which: a line each."""

    records: int
    wrong: tuple[str, ...]


def check_store(path: Path) -> Checked:
    """Read and verify every record, printing what is wrong with which image as it is found."""
    wrong = []
    with FeatureStore(path) as store, Progress("check", len(store), "images") as progress:
        for image_id in store.in_storage_order():
            if problem := _problem(store, image_id):
                wrong.append(problem)
                print(problem, flush=True)
            progress.update()
        return Checked(len(store), tuple(wrong))


def require_whole(path: Path, checked: Checked) -> None:
    """``DamagedError`` where a record is wrong; what and which, ``check_store`` said."""
    if checked.wrong:
        wrong, total = len(checked.wrong), checked.records
        raise DamagedError(f"{wrong:,} of {total:,} records of {path} are wrong; delete the shards named above and {AGAIN}")


def _problem(store: FeatureStore, image_id: str) -> str:
    try:
        check_record(image_id, store[image_id], store.schema)
    except (DamagedError, UsageError) as error:
        return str(error)
    return ""
