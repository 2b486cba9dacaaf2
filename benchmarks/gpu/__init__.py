"""``python -m benchmarks.gpu``: what one run on a GPU tells of megainter: is it right there, does it train, how fast, and why."""
