"""``python -m megainter``: the command line."""

from megainter.cli import main

main()
