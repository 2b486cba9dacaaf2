"""Region features in other programs' formats: which there are, and which one a file has."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.errors import UsageError
from preprocessing.features.formats import milvlg, mmf, mmf_npy, parquet, tensorpack, tsv, uniter, vilbert_lmdb, vinvl
from preprocessing.features.formats.entry import BadEntryError, Source
from preprocessing.features.formats.lmdb_file import ForeignLmdb, is_lmdb
from preprocessing.features.formats.npz import read_npy, read_npz
from preprocessing.prepare.delimited import shown_names

Records = Iterator[tuple[str, RegionRecord]]


@dataclass(frozen=True)
class Writer:
    """Writes records to a path that does not exist yet, and says why an id cannot stand in the format ("" where it can)."""

    write: Callable[[Records, StoreSchema, Path], None]
    id_problem: Callable[[str], str]


READERS: Mapping[str, Callable[[Path], Source]] = MappingProxyType(
    {
        "lxmert-tsv": tsv.read_lxmert,
        "butd-tsv": tsv.read_butd,
        "vilbert-tsv": tsv.read_vilbert,
        "volta-tsv": tsv.read_volta,
        "vinvl-tsv": vinvl.read,
        "vilbert-lmdb": vilbert_lmdb.read,
        "tensorpack-lmdb": tensorpack.read,
        "uniter-lmdb": uniter.read_lmdb,
        "mmf-lmdb": mmf.read,
        "mmf-npy": mmf_npy.read,
        "uniter-npz": uniter.read_npz_folder,
        "milvlg-npz": milvlg.read,
    }
)
WRITERS: Mapping[str, Writer] = MappingProxyType(
    {
        "lxmert-tsv": Writer(tsv.write_lxmert, tsv.id_problem),
        "vilbert-lmdb": Writer(vilbert_lmdb.write, vilbert_lmdb.id_problem),
        "uniter-lmdb": Writer(uniter.write_lmdb, uniter.id_problem),
        "parquet": Writer(parquet.write, parquet.id_problem),
    }
)
COLUMNS = MappingProxyType({"butd-tsv": tsv.BUTD, "vilbert-tsv": tsv.VILBERT, "lxmert-tsv": tsv.LXMERT, "volta-tsv": tsv.VOLTA})
ENTRIES_LOOKED_AT = 20  # the first ones may be damaged


def recognise(path: Path) -> str:
    """The format of ``path`` by its content; ``UsageError`` where it is none that is known."""
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if is_lmdb(path):
        found = _of_lmdb(path)
    elif path.is_dir():
        found = _of_npz(path) or _of_npy(path)
    else:
        found = _of_lines(path)
    if not found:
        tables = sorted(one.name for one in path.glob("*.tsv")) if path.is_dir() else []
        if tables:
            raise UsageError(f"{path} is a folder of tables; give the one of features: {shown_names(tables)}")
        raise UsageError(f"{path} has no format that is known ({', '.join(READERS)}); name it with --format if it is one of them")
    return found


def _of_lines(path: Path) -> str:
    with open(path, "rb") as file:
        if b"\0" in file.read(1 << 16):
            return ""
    for place, (_, _, line) in enumerate(tsv.lines(path)):
        if line is not None and (found := _of_line(line)):
            return found
        if place == ENTRIES_LOOKED_AT:
            break
    return ""


def _of_line(line: bytes) -> str:
    """The format that has such a line, by the names in it (a header) or by their number."""
    named = [name for name, columns in COLUMNS.items() if tsv.header(line, columns)]
    counted = [name for name, columns in COLUMNS.items() if line.count(b"\t") == len(columns) - 1]
    return next(iter(named or counted), "vinvl-tsv" if vinvl.is_row(line) else "")


def _of_npy(path: Path) -> str:
    """MMF's have a dict beside each file, vilbert-multi-task's are one."""
    for file in itertools.islice(path.rglob("*.npy"), ENTRIES_LOOKED_AT):
        try:
            with open(file, "rb") as stream:
                value = read_npy(stream, file.name)
        except (BadEntryError, OSError):
            continue
        if isinstance(value, dict) and {"bbox", "boxes"} & value.keys():
            return "mmf-npy"
    return ""


def _of_npz(path: Path) -> str:
    for place, file in enumerate(path.rglob("*.npz")):
        try:
            with open(file, "rb") as stream:
                names = read_npz(stream, ("norm_bb", "num_bbox"))
        except (BadEntryError, OSError):
            names = {}
        if names:
            return "uniter-npz" if "norm_bb" in names else "milvlg-npz"
        if place == ENTRIES_LOOKED_AT:
            break
    return ""


def _of_lmdb(path: Path) -> str:
    with ForeignLmdb(path) as source:
        if index := _value(source, tensorpack.INDEX_KEY):
            return "uniter-lmdb" if index.lstrip().startswith(b"[") else "tensorpack-lmdb"
        for key in itertools.islice(source.all_keys(), ENTRIES_LOOKED_AT):
            if key != vilbert_lmdb.INDEX_KEY and (found := _of_value(_value(source, key))):
                return found
    return ""


def _value(source: ForeignLmdb, key: bytes) -> bytes:
    try:
        return source.get(key)
    except BadEntryError:
        return b""


def _of_value(value: bytes) -> str:
    """The format of an LMDB without list of keys by one of its values."""
    if value.startswith(b"PK"):
        return "uniter-lmdb"
    try:
        row = vilbert_lmdb.unpickled_dict(value)
    except BadEntryError:
        return ""
    return "mmf-lmdb" if "bbox" in row or "feature_path" in row else "vilbert-lmdb" if "features" in row else ""
