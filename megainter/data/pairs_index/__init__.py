"""Captions of a store's images, indexed on disk for all ranks."""
