"""Whether images are still the files that their regions were extracted from, by size and time of change.

A store's ``images.parquet`` holds both of each image's file (of a tar file's, for its members), as they were before it was read. An image
of a store without one, of an earlier version, counts as unchanged from the first run on that writes it.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from megainter.data.tables.parquet import read_table, write_parquet
from preprocessing.images.listing import ImageList

SEEN = "images.parquet"
SEEN_SCHEMA = pa.schema([("image_id", pa.string()), ("bytes", pa.int64()), ("modified_ns", pa.int64())])
AT_ONCE = 16  # questions to a network disk, whose answers take their time
State = tuple[int, int]  # bytes, and nanoseconds of the last change


def states(source: ImageList) -> dict[str, State]:
    """The states of the images' files as they are now, by image id; of files that are not there none."""
    paths = sorted({item.path for item in source.items})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = dict(zip(paths, pool.map(lambda path: _state(source.root / path), paths, chunksize=256), strict=True))
    return {item.image_id: state for item in source.items if (state := found[item.path]) is not None}


def _state(path: Path) -> State | None:
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_size, state.st_mtime_ns


def seen(store: Path) -> dict[str, State]:
    """The states that the store's images were extracted in, as far as they were noted."""
    if not (store / SEEN).is_file():
        return {}
    columns = read_table(store / SEEN, SEEN_SCHEMA).to_pydict()
    return dict(zip(columns["image_id"], zip(columns["bytes"], columns["modified_ns"], strict=True), strict=True))


def note(store: Path, before: dict[str, State], now: dict[str, State], extracted: Iterable[str]) -> None:
    """Note the states of all images ``extracted``: the one noted ``before`` where there is one, else the one of ``now``."""
    noted = {image_id: state for image_id in sorted(extracted) if (state := before.get(image_id, now.get(image_id))) is not None}
    if noted == before:
        return
    sizes, times = ([state[part] for state in noted.values()] for part in (0, 1))
    write_parquet(store / SEEN, SEEN_SCHEMA, [pa.record_batch([list(noted), sizes, times], schema=SEEN_SCHEMA)])


def told(changed: list[str]) -> str:
    """What the user is told of images that changed."""
    ids = f"{min(changed)!r:.80}"
    return (
        f"warning: {len(changed):,} images changed (size or time) since they were extracted, first {ids}; the store has the regions of the "
        "earlier files: add --redo-changed to extract these images anew"
    )
