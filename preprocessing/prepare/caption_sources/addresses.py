"""Captions that come with an image's address and not its file: Conceptual Captions, SBU. Patterns say how the files were named."""

import hashlib
import posixpath
import string
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from megainter.errors import UsageError
from megainter.files import read_json
from preprocessing.prepare.reading import SHARED_NAME, Fields, Item, Items, Reading, Unusable, read_lines, split_in_name

# Google's list is usually fetched by the script that ViLBERT ships, which names files by the CRC-32 of the address, without suffix, in the
# folders training and validation; SBU's photos keep the last part of their address.
CONCEPTUAL_NAMES = "{crc32},{crc32}.jpg,training/{crc32},validation/{crc32}"
SBU_NAMES = "{name},dataset/{name}"
SBU_CAPTIONS, SBU_URLS = "SBU_captioned_photo_dataset_captions.txt", "SBU_captioned_photo_dataset_urls.txt"


@dataclass(frozen=True)
class Address:
    """Where an image was: line or row ``number`` from 1, and its address; ``shard`` and ``key`` are img2dataset's."""

    number: int
    url: str
    caption: str = ""
    shard: str = ""
    key: str = ""


def _name(url: str) -> str:
    """The last part of an address; "" of one that is none."""
    try:
        return posixpath.basename(urlsplit(url).path)
    except ValueError:
        return ""


Namer = Callable[[Address], tuple[str, ...]]
PARTS: dict[str, Callable[[Address], str | int]] = {
    "line": lambda address: address.number,
    "row": lambda address: address.number - 1,
    "crc32": lambda address: zlib.crc32(address.url.encode()),
    "md5": lambda address: hashlib.md5(address.url.encode(), usedforsecurity=False).hexdigest(),
    "name": lambda address: _name(address.url),
    "stem": lambda address: posixpath.splitext(_name(address.url))[0],
    "shard": lambda address: address.shard,
    "key": lambda address: address.key,
}


def names_of(patterns: str) -> Namer:
    """From an address to the paths that ``patterns``, apart by commas, give it. ``UsageError`` for a pattern of other parts."""
    templates = [(pattern.strip(), _parts(pattern)) for pattern in patterns.split(",")]

    def paths(address: Address) -> tuple[str, ...]:
        return tuple(pattern.format(**{part: PARTS[part](address) for part in parts}) for pattern, parts in templates)

    try:
        paths(Address(1, "http://a/b.jpg", shard="00000", key="000000000"))
    except (ValueError, KeyError, IndexError) as error:
        raise UsageError(f"image names {patterns!r:.80}: {error}") from None
    return paths


def _parts(pattern: str) -> set[str]:
    try:
        parts = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
    except ValueError as error:
        raise UsageError(f"image names {pattern!r:.80}: {error}") from None
    if not parts or parts - set(PARTS):
        raise UsageError(f"image names {pattern!r:.80} need parts of {', '.join(f'{{{name}}}' for name in PARTS)}")
    return parts


def conceptual_captions(src: Path, fields: Fields) -> Reading[Item]:
    """``caption<tab>address`` a line (Train_GCC-training.tsv), or the other way round (cc12m.tsv)."""
    names, split = names_of(fields.image_names or CONCEPTUAL_NAMES), _gcc_split(src)
    shared = _shared_names(read_lines(src, _tab_address).items, names)
    reading = read_lines(src, _tab_address)
    return Reading(_items(reading.items, names, shared, split), reading.total, reading.unit, reading.position)


def _gcc_split(src: Path) -> str:
    first = src.name.lower()
    return "train" if first.startswith("train_gcc") else "val" if first.startswith("validation_gcc") else split_in_name(src)


def _tab_address(number: int, line: str) -> Address:
    first, _, rest = line.partition("\t")
    second = rest.partition("\t")[0].strip()
    if second.startswith(("http://", "https://")):
        return Address(number, second, first)
    if first.startswith(("http://", "https://")):
        return Address(number, first.strip(), second)
    raise ValueError("not 'caption<tab>address'")


def sbu(src: Path, fields: Fields) -> Reading[Item]:
    """Two text files side by side (``src`` is the captions', or their folder), or sbu-captions-all.json."""
    names = names_of(fields.image_names or SBU_NAMES)
    if src.suffix == ".json":
        listed = _sbu_document(src)
        return Reading(_items(iter(listed), names, _shared_names(iter(listed), names), ""), len(listed), "entries", place="entry")
    captions, urls = (src / SBU_CAPTIONS, src / SBU_URLS) if src.is_dir() else (src, src.with_name(src.name.replace("captions", "urls")))
    for file in (captions, urls):
        if not file.is_file() or captions == urls:
            raise UsageError(f"{file} does not exist; SBU's captions and addresses stand in two files, ..._captions.txt and ..._urls.txt")
    shared = _shared_names(_side_by_side(captions, urls), names)
    return Reading(_items(_side_by_side(captions, urls), names, shared, ""), _lines_in(urls), "lines")


def _sbu_document(src: Path) -> list[Address]:
    document = read_json(src)
    urls, captions = (document.get(name) if isinstance(document, dict) else None for name in ("image_urls", "captions"))
    if not isinstance(urls, list) or not isinstance(captions, list) or len(urls) != len(captions):
        raise UsageError(f"{src} is not SBU's: it needs the lists 'image_urls' and 'captions', equally long")
    return [Address(number, str(url), str(caption)) for number, (url, caption) in enumerate(zip(urls, captions, strict=True), 1)]


def _side_by_side(captions: Path, urls: Path) -> Iterator[Address | Unusable]:
    """Line n of one file belongs to line n of the other, so they must be equally long."""
    with open(captions, "rb") as one, open(urls, "rb") as other:
        for number, (caption, url) in enumerate(zip_longest(one, other), 1):
            if caption is None or url is None:
                raise UsageError(
                    f"{captions} and {urls} are not equally long (one ends before line {number:,}): they do not belong together"
                )
            try:
                yield Address(number, url.decode().strip(), caption.decode())
            except UnicodeDecodeError:
                yield Unusable(number, "not UTF-8")


def _lines_in(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _shared_names(addresses: Iterator[Address | Unusable], names: Namer) -> set[int]:
    """Hashes of file names that different addresses have: which of the images lies in such a file, nobody can tell.

    Of 3.3 million CRC-32s about 1,300 pairs fall together. The names are kept as hashes, 16 bytes an address.
    """
    name_hashes, url_hashes = array("q"), array("q")
    for address in addresses:
        if isinstance(address, Address):
            name_hashes.append(hash(names(address)[0]))
            url_hashes.append(hash(address.url))
    both = np.stack([np.frombuffer(name_hashes, np.int64), np.frombuffer(url_hashes, np.int64)], axis=1)
    found, counts = np.unique(np.unique(both, axis=0)[:, 0], return_counts=True)
    return set(found[counts > 1].tolist())


def _items(addresses: Iterator[Address | Unusable], names: Namer, shared: set[int], split: str) -> Items:
    for address in addresses:
        if isinstance(address, Unusable):
            yield address
            continue
        paths = names(address)
        if hash(paths[0]) in shared:
            yield Unusable(address.number, repr(paths[0]), SHARED_NAME)
            continue
        stem = posixpath.splitext(paths[0])[0]
        yield Item(address.number, paths, [address.caption], [f"{stem}#line{address.number}"], split=split)
