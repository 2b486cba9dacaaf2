"""Masked segments, masked regions and image-text matching."""
