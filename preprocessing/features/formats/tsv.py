"""The TSV files of bottom-up-attention and its followers: a row per image, arrays in base64, at most a header line of the columns' names.

bottom-up-attention's own (features), jiasenlu's with class probabilities (ViLBERT, InterBERT; background first), LXMERT's (labels and
attributes with their confidences), and VOLTA's (both). Rows are read one after the other; a torn or foreign line spoils only itself.
"""

import base64
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from megainter.data.feature_store.record import RegionRecord, StoreSchema
from preprocessing.features.formats.entry import BadEntryError, Entry, ForeignRegions, Source, from_base64, integer, region_count, unusable

BUTD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
VILBERT = (*BUTD, "cls_prob")
LXMERT = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes", "features")
VOLTA = (*LXMERT, "cls_prob", "attrs", "classes")  # the last two are scores that cls_prob follows from
LXMERT_EXTRAS = MappingProxyType({"objects_id": "<i8", "objects_conf": "<f4", "attrs_id": "<i8", "attrs_conf": "<f4"})
MAX_LINE_BYTES = 256 << 20  # a thousand regions with everything are a tenth of it


def read_butd(path: Path) -> Source:
    """bottom-up-attention's TSV."""
    return _source(path, BUTD)


def read_vilbert(path: Path) -> Source:
    """jiasenlu's TSV with ``cls_prob``."""
    return _source(path, VILBERT)


def read_lxmert(path: Path) -> Source:
    """LXMERT's TSV. Its ids exclude background and "no attribute"."""
    return _source(path, LXMERT)


def read_volta(path: Path) -> Source:
    """VOLTA's TSV: LXMERT's with ``cls_prob``, background first."""
    return _source(path, VOLTA)


def lines(path: Path) -> Iterator[tuple[str, int, bytes | None]]:
    """("line n", bytes, content without its end) of each line that is not blank; the content is None where it is too long to be a row."""
    with open(path, "rb", buffering=1 << 20) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number, size, content = number + 1, len(line), line.rstrip(b"\r\n")
            too_long = size == MAX_LINE_BYTES and not line.endswith(b"\n")
            while too_long and not line.endswith(b"\n") and (line := file.readline(MAX_LINE_BYTES)):
                size += len(line)
            if content:
                yield f"line {number}", size, None if too_long else content


def base64_regions(row: Mapping[str, str | bytes]) -> ForeignRegions:
    """Regions of a row whose arrays are base64, whichever of these formats it has; ``BadEntryError`` where it cannot be used."""
    width, height = (integer(row.get(f"image_{side}", row.get(f"img_{side}")), f"image_{side}") for side in "wh")
    n = region_count(row.get("num_boxes"))
    boxes, features = (from_base64(row.get(name), "<f4", n, name) for name in ("boxes", "features"))
    probs = from_base64(row["cls_prob"], "<f4", n, "cls_prob") if "cls_prob" in row else None
    extras = {name: _one_each(row[name], dtype, n, name) for name, dtype in LXMERT_EXTRAS.items() if name in row}
    return ForeignRegions(boxes, features, width, height, probs, extras=extras)


def _one_each(text: str | bytes, dtype: str, count: int, what: str) -> np.ndarray:
    values = from_base64(text, dtype, count, what)
    if values.shape[1] != 1:
        raise BadEntryError(f"{what} has {values.size} values for {count} regions")
    return values[:, 0]


def _source(path: Path, columns: tuple[str, ...]) -> Source:
    return Source(path.stat().st_size, "bytes", partial(_entries, path, columns))


def _entries(path: Path, columns: tuple[str, ...]) -> Iterator[Entry]:
    place = 0
    for number, (where, size, line) in enumerate(lines(path)):
        cells = line.split(b"\t") if line is not None else []
        if number == 0 and (named := header(line, columns)):
            columns, place = named, named.index(columns[0])
            continue
        if len(cells) != len(columns):
            yield unusable(where, size, f"it has {len(cells)} of {len(columns)} columns" if cells else "it is too long for a row")
            continue
        try:
            image_id = _unquoted(cells[place]).decode()
        except UnicodeDecodeError:
            yield unusable(where, size, "its id is not UTF-8")
            continue
        yield Entry(where, image_id, size, partial(base64_regions, dict(zip(columns, cells, strict=True))))


def header(line: bytes | None, columns: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a first line that has those of ``columns``, in any order; () where it is a row."""
    names = tuple(_unquoted(name.strip()).decode(errors="replace") for name in (line or b"").split(b"\t"))
    return names if set(names) == set(columns) and len(names) == len(columns) else ()


def _unquoted(cell: bytes) -> bytes:
    """Python's csv writers put cells with quotation marks into quotation marks."""
    return cell[1:-1].replace(b'""', b'"') if len(cell) > 1 and cell[:1] == cell[-1:] == b'"' else cell


def write_lxmert(records: Iterator[tuple[str, RegionRecord]], schema: StoreSchema, destination: Path) -> None:
    """LXMERT's TSV: float32 arrays; labels and attributes as they were imported, else the likeliest class and no attribute (0 at 0)."""
    with open(destination, "wb") as file:
        for image_id, record in records:
            cells = [_quoted(image_id), b"%d" % record.height, b"%d" % record.width]
            cells += [to_base64(value, LXMERT_EXTRAS[name]) for name, value in labels(record).items()]
            cells += [b"%d" % len(record), to_base64(record.boxes, "<f4"), to_base64(record.features, "<f4")]
            file.write(b"\t".join(cells) + b"\r\n")


def labels(record: RegionRecord) -> dict[str, np.ndarray]:
    """``objects_id``, ``objects_conf``, ``attrs_id``, ``attrs_conf``, [n] each, in LXMERT's order: the record's own where it has them."""
    foreground = record.class_probs[:, 1:]
    likeliest = foreground.argmax(1)
    none = np.zeros(len(record))
    found = {"objects_id": likeliest, "objects_conf": foreground[np.arange(len(record)), likeliest], "attrs_id": none, "attrs_conf": none}
    return {name: record.extras.get(name, value) for name, value in found.items()}


def id_problem(image_id: str) -> str:
    """Why an id cannot stand in a TSV; "" where it can."""
    return "has a tab, a line break or a NUL" if set(image_id) & set("\t\n\r\0") else ""


def _quoted(image_id: str) -> bytes:
    text = image_id.replace('"', '""') if '"' in image_id else ""
    return f'"{text}"'.encode() if text else image_id.encode()


def to_base64(array: np.ndarray, dtype: str) -> bytes:
    """An array's bytes in base64."""
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes())
