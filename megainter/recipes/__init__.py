"""Recipes that come with megainter: TOML files, each opening with its command, time and expected score."""
