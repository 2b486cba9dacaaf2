"""Labelled examples of texts and images."""
