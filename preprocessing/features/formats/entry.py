"""What a foreign file says about one image, as far as it says it, and the checks that all formats share."""

import binascii
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from megainter.errors import one_line
from preprocessing.detector.restricted_pickle import Foreign

Background = Literal["first", "last", "none", "unknown"]
LabelIds = Literal["foreground", "columns", "unknown"]


class BadEntryError(Exception):
    """An entry that cannot be used. The text, one line as a ``MegainterError``'s, says why, not which."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True, eq=False)
class ForeignRegions:
    """Regions of one image as a foreign format gives them.

    ``boxes`` [n, 4] xyxy, in pixels of the image, or in shares of its width and height where ``normalised``; ``features`` [n, F];
    ``width`` and ``height`` in pixels, 0 where the format does not say; ``probs`` [n, K] or None, and in which of the K columns the
    background stands; ``extras`` [n] each, among them ``objects_id``, counted over the foreground classes or (``ids_over`` "columns")
    over all classes with the background where ``background`` says ("unknown": what the first entries show); ``names`` the class of each
    region where the format spells it out; ``left_out`` the members that could not be used, and why, beside those that could.
    """

    boxes: np.ndarray
    features: np.ndarray
    width: int = 0
    height: int = 0
    probs: np.ndarray | None = None
    background: Background = "first"
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    ids_over: LabelIds = "foreground"
    names: tuple[str, ...] | None = None
    normalised: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One image of a foreign file: where it stands, its id, its share of the source's total, and how to decode it.

    ``load`` raises ``BadEntryError`` where the entry cannot be used; the id is "" where not even that could be read. It is to be called
    before the next entry is taken.
    """

    where: str
    image_id: str
    size: int
    load: Callable[[], ForeignRegions]


@dataclass(frozen=True)
class Source:
    """A foreign file or folder: ``total`` in ``unit``s, the sum of the sizes of its entries, which are read one after the other."""

    total: int
    unit: str
    entries: Callable[[], Iterator[Entry]]


def unusable(where: str, size: int, reason: str) -> Entry:
    """An entry of which not even the id can be read."""

    def refuse() -> ForeignRegions:
        raise BadEntryError(reason)

    return Entry(where, "", size, refuse)


def integer(value: Any, what: str) -> int:
    """A count or a size in any spelling, 0 or more."""
    _refuse_foreign(value, what)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        raise BadEntryError(f"{what} is {shown(value)}, not a number") from None
    if not 0 <= number < 2**31:
        raise BadEntryError(f"{what} is {shown(number)}")
    return number


def shown(value: Any) -> str:
    """A value for a message; of a container its kind alone, since one that holds another twice, and so on, would fill the memory."""
    if isinstance(value, int) and abs(value) >= 2**64:
        return "a number of many digits"
    return f"{value!r:.40}" if isinstance(value, str | bytes | int | float | None) else f"a {type(value).__name__}"


def refusal(value: Foreign, what: str) -> str:
    """Why an object is not read."""
    return f"{what} is refused: its pickle asks for {value.name}, which is not plain data; nothing of it was run"


def _refuse_foreign(value: Any, what: str) -> None:
    if isinstance(value, Foreign):
        raise BadEntryError(refusal(value, what))


def region_count(value: Any) -> int:
    """The number of regions, at least 1."""
    count = integer(value, "num_boxes")
    if count == 0:
        raise BadEntryError("it has no regions")
    return count


def from_base64(text: Any, dtype: str, count: int, what: str) -> np.ndarray:
    """[count, ...] of the numbers that ``text`` holds in base64."""
    _refuse_foreign(text, what)
    try:
        data = binascii.a2b_base64(text, strict_mode=True)
    except (TypeError, ValueError):
        raise BadEntryError(f"{what} is not whole base64") from None
    width, rest = divmod(len(data), count * np.dtype(dtype).itemsize)
    if rest or not width:
        raise BadEntryError(f"{what} has {len(data):,} bytes, which are no {count} equal rows of {np.dtype(dtype).name}")
    return np.frombuffer(data, dtype).reshape(count, width)


def from_bytes(data: Any, dtype: Any, shape: Any, what: str, fortran: bool = False) -> np.ndarray:
    """An array of plain numbers from its bytes, dtype string and shape, none of which is believed before it is checked."""
    try:
        kind = np.dtype(dtype if isinstance(dtype, str) else str(dtype, "utf-8"))
        sizes = tuple(int(size) for size in shape)
    except (TypeError, ValueError, OverflowError, SyntaxError):
        raise BadEntryError(f"{what} is an array of an unknown kind") from None
    count = 1
    for size in sizes:
        count *= size
    if kind.kind not in "fiub" or min(sizes, default=0) < 0 or len(data) != count * kind.itemsize:
        raise BadEntryError(f"{what} is an array of {kind} {list(sizes)} in {len(data):,} bytes")
    return np.frombuffer(data, kind).reshape(sizes, order="F" if fortran else "C")


def rows(value: Any, count: int, what: str) -> np.ndarray:
    """[count, ...] of a numeric array: its first ``count`` rows, or its numbers in rows where it came without shape."""
    _refuse_foreign(value, what)
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiub":
        raise BadEntryError(f"{what} is missing or is no array of numbers")
    if value.ndim == 2 and len(value) >= count:
        return value[:count]
    if value.ndim == 1 and value.size and value.size % count == 0:
        return value.reshape(count, -1)
    raise BadEntryError(f"{what} has shape {list(value.shape)} for {count} regions")


def optional(
    members: Mapping[str, Any], names: Iterable[str], read: Callable[[Any, str], np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Of the members called ``names``, as far as they are there, what ``read(value, name)`` makes of each, and why not of the others."""
    found, left_out = dict[str, np.ndarray](), dict[str, str]()
    for name in names:
        if members.get(name) is None:
            continue
        try:
            found[name] = read(members[name], name)
        except BadEntryError as error:
            left_out[name] = str(error)
    return found, left_out


def column(value: Any, count: int, what: str) -> np.ndarray:
    """[count] of a numeric array [count] or [count, 1]."""
    _refuse_foreign(value, what)
    if isinstance(value, list | tuple) and all(isinstance(one, int | float | np.number) for one in value):
        value = np.array(value)
    if not isinstance(value, np.ndarray) or value.ndim == 0:
        raise BadEntryError(f"{what} is {shown(value)}, not numbers of {count} regions")
    values = rows(value if value.ndim == 2 else value[:count], count, what)
    if values.shape[1] != 1:
        raise BadEntryError(f"{what} has shape {list(np.shape(value))} for {count} regions")
    return values[:, 0]
