"""A run's settings: dataclasses, their reading from recipes and the command line, their help."""
