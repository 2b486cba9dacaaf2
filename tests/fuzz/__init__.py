"""Every parser of files from elsewhere, fed with bytes that nobody wrote for it: it gives a value, or raises a ``MegainterError``.

targets.py     the parsers, each as a function of bytes, with the seeds that mutation begins with
judging.py     what is promised of one input, and what a broken promise is called
mutating.py    changes to JSON and pickles that leave them JSON and pickles
child.py       one target under atheris (coverage-guided), in a process that may die of it
__main__.py    `python -m tests.fuzz`: all targets for so many seconds, and a table
corpus/        what mutation begins with, by target; what found something is named after it
"""
