"""Records with single-precision features and extras, and what their stores say to earlier readers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema, encode, record_size
from megainter.data.feature_store.views import decode
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import DamagedError, UsageError

SCHEMA = StoreSchema(6, 3, ("__background__", "a", "b"), "d")
EXTRAS = {"objects_id": "int64", "objects_conf": "float32", "half": "float16"}
WIDE = replace(SCHEMA, feature_dtype="float32", extras=EXTRAS)


def make_record(n: int = 5, seed: int = 0) -> RegionRecord:
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.uniform(0, 50, (n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32)
    extras = {"objects_id": rng.integers(-1, 2, n), "objects_conf": rng.random(n, np.float32), "half": rng.random(n).astype(np.float16)}
    features = rng.standard_normal((n, 6)).astype(np.float32)
    return RegionRecord(boxes, features, rng.dirichlet(np.ones(3), n).astype(np.float32), 50, 60, extras)


def test_single_precision_and_extras_come_back_bit_for_bit() -> None:
    record = make_record()
    back = decode(encode("x", record, WIDE)[0], "x", WIDE, "here")
    for name in ("boxes", "features"):
        assert getattr(back, name).tobytes() == getattr(record, name).tobytes()
    assert {name: (value.dtype.name, value.tobytes()) for name, value in back.extras.items()} == {
        name: (dtype, record.extras[name].tobytes()) for name, dtype in EXTRAS.items()
    }


def test_the_size_of_a_record_is_what_it_says() -> None:
    for schema in (SCHEMA, WIDE, replace(WIDE, probs="top-k", top_k=1)):
        record = replace(make_record(), extras={name: make_record().extras[name] for name in schema.extras})
        assert len(encode("some id", record, schema)[0]) == record_size(5, 7, schema)


def test_half_precision_stays_the_default_in_bytes_and_in_store_json() -> None:
    record = replace(make_record(), extras={})
    assert decode(encode("x", record, SCHEMA)[0], "x", SCHEMA, "here").features.dtype == np.float16
    assert not {"feature_dtype", "extras"} & SCHEMA.to_json().keys()
    assert StoreSchema.from_json(json.loads(json.dumps(SCHEMA.to_json()))) == SCHEMA
    assert StoreSchema.from_json(json.loads(json.dumps(WIDE.to_json()))) == WIDE


def test_a_record_of_other_kinds_than_the_schema_is_damaged() -> None:
    data = encode("x", make_record(), WIDE)[0]
    for other in (
        replace(WIDE, feature_dtype="float16", feature_size=12),
        replace(WIDE, extras={}),
        replace(WIDE, feature_dtype="float16"),
    ):
        with pytest.raises(DamagedError, match="record 'x' in here is damaged"):
            decode(data, "x", other, "here")


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({}, "the store takes"),
        ({"objects_id": np.zeros(4, np.int64)}, "the store takes"),
        ({**make_record().extras, "more": np.zeros(5)}, "the store takes"),
        ({**make_record().extras, "objects_conf": np.full(5, np.nan, np.float32)}, "NaN"),
    ],
)
def test_extras_that_may_not_enter(extras: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UsageError, match=rf"image 'x': extras .*{message}"):
        encode("x", replace(make_record(), extras=extras), WIDE)


@pytest.mark.parametrize("change", [{"feature_dtype": "float64"}, {"extras": {"a b": "int64"}}, {"extras": {"a": "object"}}])
def test_impossible_schemas(change: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="of a store are"):
        replace(SCHEMA, **change)  # type: ignore[arg-type]


def test_records_are_copied_byte_by_byte_in_storage_order(tmp_path: Path) -> None:
    records = {f"{n:02}": make_record(1 + n % 4, n) for n in range(20)}
    with FeatureStoreWriter(tmp_path / "one", WIDE) as writer:
        writer.add_all(list(records.items()))
    digest = seal_store(tmp_path / "one")
    with FeatureStore(tmp_path / "one") as store, FeatureStoreWriter(tmp_path / "two", WIDE) as writer:
        order = list(store.in_storage_order())
        assert sorted(order) == list(store.ids)
        writer.add_encoded([(image_id, *store.encoded(image_id)) for image_id in order])
        assert store.checksums(["03", "absent"]).tolist() == [encode("03", records["03"], WIDE)[1], -1]
    assert seal_store(tmp_path / "two") == digest
