"""Export of a store to Parquet: one row per image, nested lists of numbers, what the store says of itself in the file's metadata."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.feature_store.record import RegionRecord, StoreSchema

GROUP_BYTES = 64 << 20


def id_problem(image_id: str) -> str:
    """Every id can stand in Parquet."""
    return ""


def write(records: Iterator[tuple[str, RegionRecord]], schema: StoreSchema, destination: Path) -> None:
    """image_id, width, height, boxes [n, 4], features [n, F], class_probs [n, C] float16 and the extras [n], as lists."""
    columns = _schema(schema)
    group: list[tuple[str, RegionRecord]] = []
    size = 0
    with pq.ParquetWriter(destination, columns, compression="zstd") as writer:
        for image_id, record in records:
            group.append((image_id, record))
            size += record.features.nbytes + record.class_probs.nbytes
            if size >= GROUP_BYTES:
                writer.write_batch(_batch(group, columns))
                group, size = [], 0
        if group:
            writer.write_batch(_batch(group, columns))


def _schema(schema: StoreSchema) -> pa.Schema:
    numbers = pa.from_numpy_dtype(np.dtype(schema.feature_dtype))
    matrices = {"boxes": (pa.float32(), 4), "features": (numbers, schema.feature_size), "class_probs": (pa.float16(), schema.num_classes)}
    columns = [("image_id", pa.string()), ("width", pa.int32()), ("height", pa.int32())]
    columns += [(name, pa.list_(pa.list_(kind, size))) for name, (kind, size) in matrices.items()]
    columns += [(name, pa.list_(pa.from_numpy_dtype(np.dtype(dtype)))) for name, dtype in schema.extras.items()]
    return pa.schema(columns, metadata={"megainter feature store": json.dumps(schema.to_json(), ensure_ascii=False)})


def _batch(group: list[tuple[str, RegionRecord]], columns: pa.Schema) -> pa.RecordBatch:
    records = [record for _, record in group]
    offsets = pa.array(np.cumsum([0, *(len(record) for record in records)]), pa.int32())
    arrays = [pa.array([image_id for image_id, _ in group], pa.string())]
    arrays += [pa.array([getattr(record, side) for record in records], pa.int32()) for side in ("width", "height")]
    for field in list(columns)[len(arrays) :]:
        kind, parts = field.type.value_type, [_of(record, field.name) for record in records]
        flat = np.concatenate(parts)
        values = pa.array(flat.ravel().astype((kind.value_type if flat.ndim == 2 else kind).to_pandas_dtype(), copy=False))
        arrays.append(pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(values, type=kind) if flat.ndim == 2 else values))
    return pa.record_batch(arrays, schema=columns)


def _of(record: RegionRecord, name: str) -> np.ndarray:
    return record.extras[name] if name in record.extras else getattr(record, name)
