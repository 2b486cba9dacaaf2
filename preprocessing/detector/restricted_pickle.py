"""Pickles of other programs, read as data: numbers, text, containers and numpy arrays, and nothing that could run.

A pickle names functions for its reader to call. Here every name is looked up in a table of stand-ins (or refused), so that not even
numpy's own constructors are called from the file: shapes, dtypes and bytes are checked first, and the arrays are made afterwards.
"""

import io
import os
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np

from megainter.errors import DamagedError, UsageError

MAX_DEPTH = 100  # of containers within containers
DTYPE_CODE = re.compile(r"b1|[iu][1248]|f[248]|[SUa]\d{1,9}|O8?|\?")


class _Dtype:
    """``numpy.dtype(code, align, copy)``, whose byte order comes as state. Plain numbers, text and objects; no records."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, *_: object) -> None:
        if not isinstance(code, str) or not DTYPE_CODE.fullmatch(code):
            raise pickle.UnpicklingError(f"a numpy array of type {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, base, names, columns, *_ = state
        if order not in ("<", ">", "|", "=") or (base, names, columns) != (None, None, None):
            raise pickle.UnpicklingError("a numpy array of records")
        self.value = self.value.newbyteorder("=" if order == "|" else order)


class _ArrayType:
    """``numpy.ndarray`` as the argument of ``_reconstruct``: nothing can be made with it."""

    def __new__(cls, *_: object) -> "_ArrayType":
        raise pickle.UnpicklingError("numpy.ndarray called")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("numpy.ndarray called")


class _Array:
    """``_reconstruct(ndarray, (0,), b"b")``, filled by its state; an ndarray is made of it when the file has been read."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0)
        self.objects: list[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        order: Literal["C", "F"] = "F" if fortran else "C"
        if dtype.value.hasobject:
            if not isinstance(content, list) or len(content) != _count(shape):
                raise pickle.UnpicklingError("a numpy array of objects without them")
            self.value, self.objects = np.empty(shape, object, order), content
        else:
            self.value = _from_bytes(content, dtype, shape, order)


class _Buffer:
    """``_frombuffer(bytes, dtype, shape, order)``: an array in pickles of protocol 5."""

    def __new__(cls, content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Any:
        return _from_bytes(content, dtype, shape, "F" if order == "F" else "C")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state without an object")


class _Scalar(_Buffer):
    """``scalar(dtype, bytes)``: one number."""

    def __new__(cls, dtype: _Dtype, content: Any = b"") -> Any:
        return _from_bytes(content, dtype, (), "C")[()]


class _Encoded(_Buffer):
    """``_codecs.encode(text, "latin1")``: how protocols up to 2 write bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"the text encoding {encoding!r}")
        return text.encode("latin1")


class _Bytes(_Buffer):
    """``bytes()`` and ``bytearray(...)``; a number as the argument would reserve as much memory."""

    def __new__(cls, content: Any = b"", encoding: str = "latin1") -> Any:
        if not isinstance(content, bytes | bytearray | str):
            raise pickle.UnpicklingError("bytes of nothing")
        return content.encode("latin1") if isinstance(content, str) else bytes(content)


class _Set:
    """``set`` and ``frozenset``, of plain keys."""

    kind: type = set

    def __new__(cls, items: Any = ()) -> Any:
        return cls.kind(_plain_keys(items))

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("state without an object")


class _Frozen(_Set):
    kind = frozenset


class _Ordered(_Buffer):
    """``collections.OrderedDict``, of plain keys."""

    def __new__(cls, items: Any = ()) -> Any:
        pairs = [(key, value) for key, value in items]
        _plain_keys(key for key, _ in pairs)
        return OrderedDict(pairs)


def _plain_keys(keys: Iterable[Any]) -> list[Any]:
    """The keys of a set or a dict: containers would be hashed to the bottom, which takes 2^n steps where each holds the next one twice."""
    found = list(keys)
    for key in found:
        if isinstance(key, tuple | frozenset) and any(isinstance(item, tuple | frozenset) for item in key):
            raise pickle.UnpicklingError("a key that is a container of containers")
    return found


def _from_bytes(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    data = content.encode("latin1") if isinstance(content, str) else content  # Python 2 wrote arrays as text
    if dtype.value.hasobject or len(data) != _count(shape) * dtype.value.itemsize:
        raise pickle.UnpicklingError(f"a numpy array of {dtype.value} {shape} in {len(data)} bytes")
    return np.frombuffer(data, dtype.value).reshape(shape, order=order)


def _count(shape: tuple[int, ...]) -> int:
    if not isinstance(shape, tuple) or len(shape) > 32 or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise pickle.UnpicklingError(f"a numpy array of shape {shape!r}")
    count = 1
    for size in shape:
        count *= size
    return count


_MULTIARRAY, _NUMERIC = ("numpy.core.multiarray", "numpy._core.multiarray"), ("numpy.core.numeric", "numpy._core.numeric")
# what builtin containers and numpy arrays need, whichever numpy or Python wrote them
NUMPY: Mapping[tuple[str, str], type] = MappingProxyType(
    {
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _ArrayType,
        **{(module, "_reconstruct"): _Array for module in _MULTIARRAY},
        **{(module, "scalar"): _Scalar for module in _MULTIARRAY},
        **{(module, "_frombuffer"): _Buffer for module in _NUMERIC},
        ("_codecs", "encode"): _Encoded,
        ("collections", "OrderedDict"): _Ordered,
        **{(module, name): _Bytes for module in ("builtins", "__builtin__") for name in ("bytes", "bytearray")},
        **{(module, "set"): _Set for module in ("builtins", "__builtin__")},
        **{(module, "frozenset"): _Frozen for module in ("builtins", "__builtin__")},
    }
)


class Foreign:
    """What stands where a file has an object that is not read: ``name`` is what the file asks for. Nothing of it was run."""

    name = ""
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Items are left out too."""

    extend = append


_LIBRARY: dict[int, Callable[[Any], None]] = dict(pickle._Unpickler.dispatch)  # what each opcode does
# Where on the stack, above the last mark, an opcode finds keys of a dict or items of a set.
_KEYS = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(None, None, 2),
    pickle.DICT: slice(None, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}


def _of_plain_keys(load: Callable[[Any], None], places: slice) -> Callable[[Any], None]:
    """What an opcode does, after a look at the keys."""

    def checked(unpickler: Any) -> None:
        _plain_keys(unpickler.stack[places])
        load(unpickler)

    return checked


def _load_bytearray8(unpickler: Any) -> None:
    """Only what is there: the library's reserves as much as the file claims."""
    (size,) = struct.unpack("<Q", unpickler.read(8))
    content = unpickler.read(min(size, sys.maxsize))
    if len(content) < size:
        raise pickle.UnpicklingError(f"a bytearray of {size} bytes in {len(content)}")
    unpickler.append(bytearray(content))


class _Unpickler(pickle._Unpickler):
    """Python's own reader, not the C one: that one reserves memory for as many memos as a file claims to use."""

    allowed: Mapping[tuple[str, str], type]
    stand_in: bool
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_LIBRARY,
        pickle.BYTEARRAY8[0]: _load_bytearray8,
        **{code[0]: _of_plain_keys(_LIBRARY[code[0]], places) for code, places in _KEYS.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if self.stand_in:
            return type("Foreign", (Foreign,), {"name": f"{module}.{name}"[:80]})
        raise _ForbiddenNameError(f"{module}.{name}"[:200])


class _Bounded:
    """A file on the disk, asked for no more than it has left: buffered files reserve as much as they are asked for."""

    def __init__(self, file: io.BufferedReader) -> None:
        self.file, self.size = file, os.fstat(file.fileno()).st_size
        self.readline = file.readline

    def read(self, size: int) -> bytes:
        return self.file.read(max(0, min(size, self.size - self.file.tell())))


class _ForbiddenNameError(Exception):
    """The file asks for something that is not data."""


def load_restricted(
    file: BinaryIO | bytes | memoryview,
    allowed: Mapping[tuple[str, str], type] = NUMPY,
    where: object = "the pickle",
    encoding: str = "latin1",
    stand_in: bool = False,
) -> Any:
    """The next object pickled in ``file`` (a binary file or bytes), built of plain containers, numbers, text, bytes and numpy arrays.

    Arrays are read-only views of the bytes read. ``allowed`` maps (module, name) to the class called for it; a class should define
    ``__setstate__``, or the file could set the class's own attributes. ``encoding`` is how text of Python 2 is read ("bytes" leaves it).
    With ``stand_in`` an object of any other name becomes a ``Foreign``, so that what stands beside it can be used.

    Raises ``UsageError`` where the file asks for any other name (nothing is called), ``DamagedError`` where it is not a whole pickle;
    both begin with ``where``.
    """
    stream = _Bounded(file) if isinstance(file, io.BufferedReader) else file if hasattr(file, "read") else io.BytesIO(file)
    unpickler = _Unpickler(stream, encoding=encoding)  # type: ignore[arg-type]
    unpickler.allowed, unpickler.stand_in = allowed, stand_in
    try:
        return _arrays_made(unpickler.load(), {}, 0)
    except _ForbiddenNameError as error:
        raise UsageError(f"{where} is refused: its pickle asks for {error}, which is not plain data; nothing of it was run") from None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a parser fed with hostile bytes may raise anything
        raise DamagedError(f"{where} is not a whole pickle of plain data: {' '.join(str(error).split()) or type(error).__name__}") from None


def _arrays_made(value: Any, seen: dict[int, Any], depth: int) -> Any:
    """``value`` with arrays and dtypes in place of their stand-ins, at any depth. ``seen`` keeps each container's visit single."""
    if isinstance(value, _Dtype):
        return value.value
    if not isinstance(value, list | tuple | dict | _Array):
        return value
    if id(value) in seen:
        return seen[id(value)]
    if depth > MAX_DEPTH:
        raise pickle.UnpicklingError(f"containers within containers, more than {MAX_DEPTH} deep")
    seen[id(value)] = value.value if isinstance(value, _Array) else value
    if isinstance(value, tuple):
        seen[id(value)] = tuple(_arrays_made(item, seen, depth + 1) for item in value)
    elif isinstance(value, list):
        value[:] = [_arrays_made(item, seen, depth + 1) for item in value]
    elif isinstance(value, dict):
        for key in value:
            value[key] = _arrays_made(value[key], seen, depth + 1)
    elif value.objects is not None:
        value.value.ravel(order="K")[:] = _object_row([_arrays_made(item, seen, depth + 1) for item in value.objects])
    return seen[id(value)]


def _object_row(items: list[Any]) -> np.ndarray:
    row = np.empty(len(items), object)
    for index, item in enumerate(items):
        row[index] = item
    return row
