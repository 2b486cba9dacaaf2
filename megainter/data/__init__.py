"""Captions and regions on disk and as a stream: tables, feature store, text, pairs index; order, masks, negatives, portions."""
