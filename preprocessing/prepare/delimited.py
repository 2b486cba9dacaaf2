"""Tables of text with a delimiter, read so that a stray quotation mark costs its own row at most and never the rows behind it.

A field in quotation marks may hold line breaks, and so an unbalanced mark takes the following lines for its own, to the end of the file
if need be. Here a field ends before a line that looks like a row; the line whose mark is unbalanced is then read as it stands.
"""

import csv
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from preprocessing.images.decode import MORE_SUFFIXES, SUFFIXES

SHOWN = 40  # names of columns in a message
OPEN_AT_THE_END = "unexpected end of data"  # what the csv module says of a mark that does not close


@dataclass(frozen=True)
class Row:
    """The cells of a row; ``number`` is that of its last line, from 1. ``literal``: its quotation marks were taken for text."""

    number: int
    cells: list[str]
    literal: bool = False


@dataclass(frozen=True)
class Fault:
    """A line that is no row, and why."""

    number: int
    reason: str


def header_cells(line: str, delimiter: str) -> list[str]:
    """The names in a header line."""
    return next(csv.reader([line], delimiter=delimiter), [])


def shown_names(names: Iterable[str], quoted: bool = False) -> str:
    """Names of columns for a message, the first ones of many; in quotation marks where blanks around one, or what cannot be printed, would
    not be seen without, and where all are to be ``quoted``.
    """
    first = [*itertools.islice(names, SHOWN + 1)]
    plain = [not quoted and name.isprintable() and name == name.strip() for name in first]
    shown = [name[:80] if bare else f"{name!r:.80}" for name, bare in zip(first, plain, strict=True)]
    return ", ".join(shown[:SHOWN] + ["and more"] * (len(shown) > SHOWN))


def literal_notes(literal: Sequence[int]) -> list[str]:
    """What the user should know of the rows, by number, whose quotation marks were taken for text."""
    if not literal:
        return []
    return [f"note: {len(literal):,} rows have a quotation mark that does not close and were taken as they stand, first line {literal[0]}"]


def delimited_rows(lines: Iterable[str], delimiter: str, columns: int, key: int) -> Iterator[Row | Fault]:
    """The rows behind the header line; every line that is not blank is in a row, or is a fault of its own.

    ``lines`` keep their ends. A row may have another number of cells than ``columns``, which is for its reader to judge; ``key`` is the
    column by whose form (an image's name, an id) a line is known as a row.
    """
    return _Rows(lines, delimiter, columns, key).read()


class _Rows:
    """Lines, with those that were looked at ahead of their time."""

    def __init__(self, lines: Iterable[str], delimiter: str, columns: int, key: int) -> None:
        self.lines, self.ahead, self.number = iter(lines), deque[str](), 1
        self.delimiter, self.columns, self.key = delimiter, columns, key
        self.form: tuple[object, ...] | None = None  # of the last row's key

    def read(self) -> Iterator[Row | Fault]:
        while (line := self._next()) is not None:
            if '"' in line:
                yield from self._quoted(line)
            elif content := line.rstrip("\r\n"):
                yield self._row(content.split(self.delimiter))

    def _next(self) -> str | None:
        line = self.ahead.popleft() if self.ahead else next(self.lines, None)
        self.number += line is not None
        return line

    def _row(self, cells: list[str], literal: bool = False) -> Row:
        if len(cells) == self.columns:
            self.form = _form(cells[self.key])
        return Row(self.number, cells, literal)

    def _quoted(self, line: str) -> Iterator[Row | Fault]:
        """The row that begins with ``line``, or faults of the lines that were taken for it."""
        taken, stopped = [line], False
        form = self._form_of(_as_it_stands(line, self.delimiter)) or self.form

        def feed() -> Iterator[str]:
            nonlocal stopped
            yield line
            while (following := self._next()) is not None:
                if self._looks_like_a_row(following, form):
                    self._return([following])
                    stopped = True
                    return
                taken.append(following)
                yield following

        try:
            yield self._row(next(csv.reader(feed(), delimiter=self.delimiter, strict=True)))
        except csv.Error as error:
            unbalanced = stopped or (len(taken) == 1 and (self.delimiter == "\t" or str(error) == OPEN_AT_THE_END))
            cells = _as_it_stands(line, self.delimiter)
            if unbalanced and len(cells) != self.columns:
                cells = _closed(line, self.delimiter)
            if unbalanced and len(cells) == self.columns:
                self._return(taken[1:])
                yield self._row(cells, literal=True)
                return
            first = self.number - len(taken) + 1
            yield Fault(first, str(error))
            yield from (Fault(first + n, f"taken by the quotation mark of line {first}") for n in range(1, len(taken)))

    def _return(self, lines: Sequence[str]) -> None:
        self.ahead.extendleft(reversed(lines))
        self.number -= len(lines)

    def _looks_like_a_row(self, line: str, form: tuple[object, ...] | None) -> bool:
        if line.count(self.delimiter) < self.columns - 1:
            return False
        found = self._form_of(_alone(line, self.delimiter))
        if found is None:
            return False
        return found == form if form is not None else found[0] in SUFFIXES | MORE_SUFFIXES

    def _form_of(self, cells: list[str]) -> tuple[object, ...] | None:
        return _form(cells[self.key]) if len(cells) == self.columns else None


def _form(name: str) -> tuple[object, ...]:
    """What names of one table have in common: the suffix, or (without one) whether there are digits and blanks."""
    name = name.strip('"')
    suffix = os.path.splitext(name)[1].lower()
    return (suffix,) if suffix and " " not in suffix else ("", any(map(str.isdigit, name)), " " in name.strip(), not name)


def _alone(line: str, delimiter: str) -> list[str]:
    """The cells of a line that is to be a row without the next one."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return _as_it_stands(line, delimiter)


def _as_it_stands(line: str, delimiter: str) -> list[str]:
    """The cells of a line in which quotation marks are text, but for cells that have them around."""
    return [_bare(cell) for cell in line.rstrip("\r\n").split(delimiter)]


def _bare(cell: str) -> str:
    whole = len(cell) > 1 and cell[0] == cell[-1] == '"'
    return cell[1:-1].replace('""', '"') if whole and '"' not in cell[1:-1].replace('""', "") else cell


def _closed(line: str, delimiter: str) -> list[str]:
    """The cells of a line that lacks nothing but the last quotation mark."""
    try:
        return next(csv.reader([line.rstrip("\r\n") + '"'], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []
