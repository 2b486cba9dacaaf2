"""Parquet tables that people bring or `prepare` writes: pairs, boxes, labelled examples, questions."""
