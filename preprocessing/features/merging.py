"""Several stores made one."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.shard import refuse_live_writers
from megainter.data.feature_store.writer import create_store, seal_store, stored_ids
from megainter.errors import UsageError
from megainter.progress import Progress
from preprocessing.features.writing import BOXES, Encoded, write_entries


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
        write_entries(output, schemas[0], _merged(opened, stored_ids(output)))
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
