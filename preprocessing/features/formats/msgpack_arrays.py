"""Arrays in msgpack as the msgpack-numpy package writes them, without that package, which unpickles arrays of objects."""

from typing import Any

import msgpack
import numpy as np

from preprocessing.features.formats.entry import BadEntryError, from_bytes


def unpack(data: bytes) -> Any:
    """The object in ``data``; text that is no key comes as bytes, since early versions did not tell it from bytes."""
    try:
        return msgpack.unpackb(data, raw=True, strict_map_key=False, object_hook=_array)
    except BadEntryError:
        raise
    except Exception as error:  # a parser fed with hostile bytes may raise anything
        raise BadEntryError(f"it is not whole msgpack: {error or type(error).__name__}") from None


def _array(value: dict[Any, Any]) -> Any:
    """An array or a number where ``value`` describes one."""
    if b"nd" not in value:
        return value
    if value.get(b"kind", b"") not in (b"", ""):
        raise BadEntryError("it has an array of objects or records")
    array = from_bytes(value.get(b"data", b""), value.get(b"type"), value.get(b"shape", ()), "an item")
    return array if value[b"nd"] else array[()]


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """A dict of arrays as msgpack-numpy writes it."""
    packed = {}
    for name, array in arrays.items():
        content = np.ascontiguousarray(array)
        packed[name] = {b"nd": True, b"type": content.dtype.str, b"kind": b"", b"shape": content.shape, b"data": content.tobytes()}
    return msgpack.packb(packed, use_bin_type=True)
