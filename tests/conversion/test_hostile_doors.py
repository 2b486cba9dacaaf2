"""Forty hostile files through every door that takes a file: each is refused in one line with exit code 2 or 4, and nothing of it runs."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from megainter import InterBertForPreTraining
from megainter.conversion.bert import convert_bert
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.conversion.official import convert_official
from megainter.conversion.zero import convert
from megainter.data.feature_store import FeatureStore
from megainter.errors import MegainterError
from megainter.model.folder import read_config
from preprocessing.detector.weights import read_weights
from preprocessing.features.importing import import_features
from tests.conversion.test_hostile_files import PICKLES, WRAPPERS, Reduce, legacy, text, zipped
from tests.foreign import write_lmdb


def extension_pickle(command: str) -> bytes:
    """An extension code, which stands for a name that a registry knows, beside a call."""
    return b"\x80\x02\x82\x01cposix\nsystem\n(X" + text(command) + b"tR."


def dtype_pickle(command: str) -> bytes:
    """The argument of numpy's dtype is a call."""
    return b"\x80\x02cnumpy\ndtype\n(cposix\nsystem\n(X" + text(command) + b"tRtR."


def rebuild_pickle(command: str) -> bytes:
    """The argument of torch's function that rebuilds a tensor is a call."""
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(cposix\nsystem\n(X" + text(command) + b"tRtR."


def state_pickle(command: str) -> bytes:
    """The state of an array is a call."""
    return b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tC\x01btRcposix\nsystem\n(X" + text(command) + b"tRb."


def object_array(command: str) -> bytes:
    """An .npy of objects, one of which is a call."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Reduce(command)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(content: bytes) -> bytes:
    """An .npz whose member "features" has that pickle as its objects."""
    buffer, member = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "|O", "fortran_order": False, "shape": ()})
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("features.npy", member.getvalue() + content)
        archive.writestr("norm_bb.npy", member.getvalue() + content)
    return buffer.getvalue()


MORE = [extension_pickle, dtype_pickle, rebuild_pickle, state_pickle]
FILES: dict[str, Callable[[str], bytes]] = {
    f"{make.__name__} in {wrap.__name__}": (lambda command, make=make, wrap=wrap: wrap(make(command)))  # type: ignore[misc]
    for make in (*PICKLES, *MORE)
    for wrap in WRAPPERS
    if make in PICKLES or wrap in (zipped, legacy, bytes)
} | {"objects in npy": object_array, "safetensors with a pickle as header": lambda command: struct.pack("<Q", 64) + PICKLES[0](command)}


def folder_of(file: Path, name: str) -> Path:
    """A folder in which the file has a name that is looked for."""
    folder = file.with_name(f"folder {name}")
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "interbert"}')
    (folder / name).write_bytes(file.read_bytes())
    return folder


def named(file: Path, name: str) -> Path:
    other = file.with_name(name)
    other.write_bytes(file.read_bytes())
    return other


def imported(file: Path, source: Path) -> None:
    import_features(source, file.with_name("imported.store"))


def store(file: Path) -> None:
    folder = file.with_name("a.store")
    folder.mkdir()
    (folder / "store.json").write_bytes(file.read_bytes())
    FeatureStore(folder)


DOORS: dict[str, Callable[[Path], object]] = {
    "convert official": lambda file: convert_official(file, file.with_name("hf")),
    "convert bert": lambda file: convert_bert(file, file.with_name("hf")),
    "convert hf": lambda file: convert_hugging_face(file, file.with_name("hf")),
    "convert hf of a renamed file": lambda file: convert_hugging_face(named(file, "model.safetensors"), file.with_name("hf")),
    "convert zero": lambda file: convert(folder_of(file, "mp_rank_00_model_states.pt"), file.with_name("hf")),
    "extract --weights": read_weights,
    "extract --weights of a renamed file": lambda file: read_weights(named(file, "detector.safetensors")),
    "from_pretrained": lambda file: InterBertForPreTraining.from_pretrained(folder_of(file, "pytorch_model.bin")),
    "from_pretrained of a renamed file": lambda file: InterBertForPreTraining.from_pretrained(folder_of(file, "model.safetensors")),
    "the configuration of start_from, evaluate and view": lambda file: read_config(folder_of(file, "config.json")),
    "features import of a file": lambda file: imported(file, file),
    "features import of LMDB values": lambda file: imported(file, write_lmdb(file.with_name("lmdb"), {b"image": file.read_bytes()})),
    "features import of npz": lambda file: imported(file, named(file, "x.npz").parent),
    "features import of an npz's objects": lambda file: imported(file, _one(file, "x.npz", npz(file.read_bytes()))),
    "features import of npy": lambda file: imported(file, _one(file, "x.npy", file.read_bytes())),
    "features import of a TSV's field": lambda file: imported(file, _tsv(file)),
    "store.json": store,
}


def _one(file: Path, name: str, content: bytes) -> Path:
    folder = file.with_name("only")
    folder.mkdir()
    (folder / name).write_bytes(content)
    return folder


def _tsv(file: Path) -> Path:
    path = file.with_name("x.tsv")
    path.write_bytes(b"image\t10\t9\t1\tAAAA\t" + file.read_bytes().replace(b"\n", b"").replace(b"\t", b"") + b"\n")
    return path


QUICK = ("convert official", "extract --weights", "features import of LMDB values")


@pytest.mark.parametrize("door", [*QUICK, *(pytest.param(door, marks=pytest.mark.slow) for door in DOORS if door not in QUICK)])
def test_nothing_runs_at_any_door(door: str, tmp_path: Path) -> None:
    assert len(FILES) >= 30
    for number, (name, make) in enumerate(FILES.items()):
        place, canary = tmp_path / str(number), tmp_path / f"ran{number}"
        place.mkdir()
        (place / "weights.bin").write_bytes(make(f"touch {canary}"))
        with pytest.raises((MegainterError, OSError, SafetensorError)) as raised:
            DOORS[door](place / "weights.bin")
        if not door.startswith("from_pretrained"):  # whose errors are transformers' own
            assert isinstance(raised.value, MegainterError), (name, raised.value)
            assert raised.value.exit_code in (2, 4), (name, raised.value)
            assert str(raised.value).isprintable(), name
        assert not canary.exists(), name


def test_the_further_pickles_are_hostile(tmp_path: Path) -> None:
    for make in MORE:
        canary = tmp_path / make.__name__
        try:
            pickle.loads(make(f"touch {canary}"))
        except Exception:
            assert make is not None  # what is made of the call's answer is another matter
        assert canary.exists() or make is extension_pickle, make.__name__
