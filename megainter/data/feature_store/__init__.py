"""Region features of images in sharded LMDB files: the reader, its records and what a store declares of itself."""

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema

__all__ = ["FeatureStore", "RegionRecord", "StoreSchema"]
