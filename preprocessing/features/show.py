"""`megainter features show, check`: what a feature store holds, and whether it is as it was written."""

from pathlib import Path

import numpy as np

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import AGAIN, RegionRecord, StoreSchema, check_record
from megainter.errors import DamagedError, UsageError
from megainter.progress import Progress

BARS, BAR_WIDTH = 10, 40  # of the histogram


def describe_store(path: Path) -> str:
    """Counts, sizes, schema, shards and a histogram of region counts, in lines. An unfinished store is described as far as it is."""
    with FeatureStore(path, allow_partial=True) as store:
        counts = store.region_counts(store.ids)
        shards = [f"  {name}  {size / 1e6:,.1f} MB" for name, size in store.shard_sizes().items()]
        lines = [f"{path}: {len(store):,} images, {int(counts.sum()):,} regions" + ("" if store.sealed else " (not sealed: incomplete)")]
        lines += [*_schema_lines(store.schema), f"digest: {store.digest}", f"shards: {len(shards)}", *shards]
        return "\n".join(lines + (_histogram(counts) if len(counts) else []))


def _schema_lines(schema: StoreSchema) -> list[str]:
    named = ", ".join(schema.class_names[1:4])
    probs = "all of them" if schema.probs == "dense" else f"the {schema.top_k} likeliest of a region"
    lines = [
        f"detector: {schema.detector}",
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


def _region_line(record: RegionRecord, schema: StoreSchema, row: int) -> str:
    best = int(record.class_probs[row].argmax())
    box = ", ".join(f"{value:.1f}" for value in record.boxes[row])
    extras = "".join(f"  {name}={value[row]:.6g}" for name, value in record.extras.items())
    return f"  {row:>3}  [{box}]  {schema.class_names[best]} {record.class_probs[row, best]:.3f}{extras}"


def check_store(path: Path) -> int:
    """Read and verify every record; returns how many there are. ``DamagedError`` after naming what is wrong with which image."""
    wrong = 0
    with FeatureStore(path) as store, Progress("check", len(store), "images") as progress:
        for image_id in store.in_storage_order():
            if problem := _problem(store, image_id):
                wrong += 1
                print(problem, flush=True)
            progress.update()
        total = len(store)
    if wrong:
        raise DamagedError(f"{wrong:,} of {total:,} records of {path} are wrong; delete the shards named above and {AGAIN}")
    return total


def _problem(store: FeatureStore, image_id: str) -> str:
    try:
        check_record(image_id, store[image_id], store.schema)
    except (DamagedError, UsageError) as error:
        return str(error)
    return ""
