"""Scoring by processes, whatever the task."""
