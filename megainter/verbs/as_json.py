"""`--json` of a verb: one object on standard output, for scripts; the lines for people go to standard error."""

import contextlib
import dataclasses
import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any


def lines_aside(asked: bool) -> AbstractContextManager[object]:
    """Where ``asked``, what is printed inside goes to standard error: the object has standard output to itself."""
    return contextlib.redirect_stdout(sys.stderr) if asked else contextlib.nullcontext()


def print_object(value: Any) -> None:
    """One line of JSON in ASCII, which no terminal and no encoding alters; dataclasses are objects, paths text."""
    print(json.dumps(value, default=_plain), flush=True)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")
