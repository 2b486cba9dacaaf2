"""Pickles are read as what Python and numpy wrote, in every protocol; whatever is not data is refused before it can act."""

import pickle
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megainter.errors import DamagedError, UsageError
from preprocessing.detector.restricted_pickle import load_restricted

DATA: dict[str, Any] = {
    "features": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "big endian": np.arange(4, dtype=">i4"),
    "half": np.ones((2, 2), np.float16),
    "flags": np.array([True, False]),
    "names": np.array(["cat", "字"]),
    "ids": np.array([b"a", b"bc"]),
    "nothing": np.zeros((0, 5), np.float32),
    "scalars": [np.float32(1.5), np.int64(7), 3, 2.5, True, None],
    "text": "字",
    "bytes": b"\x00\xff",
    "no bytes": b"",
    "info": {"objects": (np.arange(3), ["x", {"y": np.ones(2)}])},
    "ordered": OrderedDict(a=np.zeros(1)),
    "set": {1, 2},
}


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, np.ndarray):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_comes_back_as_written(protocol: int) -> None:
    assert_same(load_restricted(pickle.dumps(DATA, protocol=protocol)), DATA)


def test_arrays_of_objects_come_back(tmp_path: Path) -> None:
    rows = np.empty((2, 2), object)
    rows[:] = [[1, "a"], [None, np.arange(3)]]
    loaded = load_restricted(pickle.dumps(rows))
    assert loaded.shape == (2, 2)
    assert loaded[0].tolist() == [1, "a"]
    np.testing.assert_array_equal(loaded[1, 1], np.arange(3))
    np.save(tmp_path / "info.npy", np.array({"conf": np.ones(3)}))  # as np.savez stores a dictionary
    with open(tmp_path / "info.npy", "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        assert load_restricted(file)[()]["conf"].tolist() == [1, 1, 1]


def test_python_2_text_and_arrays() -> None:
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR"
    array += b"(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb"
    loaded = load_restricted(b"(S'boxes'\n" + array + b"S'name'\nS'caf\\xe9'\nd.")
    assert loaded["boxes"].tolist() == [1, 2]
    assert loaded["name"] == "café"
    assert load_restricted(b"S'caf\\xe9'\n.", encoding="bytes") == b"caf\xe9"


def test_objects_follow_each_other_in_a_file(tmp_path: Path) -> None:
    with open(tmp_path / "two.pkl", "wb") as file:
        for value in (1, "two"):
            pickle.dump(value, file)
    with open(tmp_path / "two.pkl", "rb") as file:
        assert [load_restricted(file), load_restricted(file)] == [1, "two"]


class Call:
    """Pickles to a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_call_is_refused_and_not_made(tmp_path: Path, protocol: int) -> None:
    for hidden in (lambda call: call, lambda call: {"model": [np.zeros(2), call]}, lambda call: {"outer": {"inner": (call,)}}):
        for call in (Call(Path(tmp_path / "made").mkdir), Call(open, str(tmp_path / "made"), "w"), Call(eval, "1")):
            data = pickle.dumps(hidden(call), protocol=protocol)
            with pytest.raises(UsageError, match=r"model.pkl is refused: its pickle asks for .* nothing of it was run"):
                load_restricted(data, where="model.pkl")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nload\n.",
        b"cnumpy.core.multiarray\n_reconstruct\n0cbuiltins\ngetattr\n.",
        b"cnumpy\ndtype.__new__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",  # a dotted name of protocol 4
        b"\x82\x01.",  # an extension code
    ],
)
def test_names_beyond_the_table_are_refused(data: bytes) -> None:
    with pytest.raises((UsageError, DamagedError)):
        load_restricted(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        pickle.dumps(DATA)[:-30],
        b"Pnowhere\n.",  # a persistent id
        b"cnumpy\nndarray\n(I9\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR(I3\nS'|'\nN(S'a'\ntNI8\nI8\nI0\ntb.",  # a record dtype
        b"cnumpy\ndtype\n(S'V8'\ntR.",
        b"cbuiltins\nbytes\n(I99999999999\ntR.",
        b"cnumpy._core.numeric\n_frombuffer\n(S'abcd'\ncnumpy\ndtype\n(S'f4'\ntR(I-1\nI-1\ntS'C'\ntR.",
        b"cnumpy._core.numeric\n_frombuffer\n(S'abcdefgh'\ncnumpy\ndtype\n(S'O8'\ntR(I1\ntS'C'\ntR.",
        b"ccollections\nOrderedDict\nN}S'__init__'\nI1\ns\x86b.",  # attributes of a class, set by state
        b"cnumpy\ndtype\nN}S'value'\nI1\ns\x86b.",
        b"]" * 300 + b"a" * 299 + b".",
    ],
)
def test_what_is_not_whole_or_not_data_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedError, match="not a whole pickle"):
        load_restricted(data)


def test_a_pickle_claiming_two_thousand_million_memos_costs_nothing() -> None:
    assert load_restricted(b"I7\nr" + struct.pack("<I", 2**31 - 1) + b".") == 7


def test_containers_that_hold_themselves_or_each_other_many_times_end() -> None:
    loop: list[Any] = [np.zeros(1)]
    loop.append(loop)
    loaded = load_restricted(pickle.dumps(loop))
    assert loaded[1] is loaded
    shared: list[Any] = [np.zeros(1)]
    for _ in range(60):
        shared = [shared, shared]
    assert load_restricted(pickle.dumps(shared))[0][0] is not None
