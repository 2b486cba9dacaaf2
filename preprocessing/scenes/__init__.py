"""Composed scenes: the demo's data."""
