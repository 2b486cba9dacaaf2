"""Files and folders that appear whole or not at all, what a full disk is told as, and digests of contents."""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megainter.errors import DamagedError, MegainterError, NoSpaceError, UsageError

CHECKSUMS = "checksums.json"  # of a model's folder
README = "README.md"
OUR_PAGE = b'<meta name="generator" content="megainter">'  # near the head of every page that is written
_NOT_READ = (".md", ".py")  # in a model's folder
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "no space left in the quota", errno.EFBIG: "a file may not be as large here"}
# The same in the words of libraries whose errors have no number: safetensors, and numpy where less was written than asked.
FULL_IN_WORDS = re.compile("|".join([*map(os.strerror, FULL), r"\d+ requested and \d+ written"]))


@contextmanager
def aside(path: Path) -> Iterator[Path]:
    """A name beside ``path`` for a file or a folder that takes its place, durable, where the block ends well, and else vanishes.

    A file that was at ``path`` stays until the new one is there; so does a folder, but for the moment between two renames.
    ``NoSpaceError`` where the disk is full, ``UsageError`` where it refuses otherwise; errors about other files pass.
    """
    partial = partial_name(path)
    remove(partial)  # of a killed process with the same number
    try:
        yield partial
        for part in [*partial.rglob("*"), partial] if partial.is_dir() else [partial]:
            fsync_folder(part)  # opening to read and fsync serve files as well
        replace(partial, path)
    except Exception as error:
        if isinstance(error, MegainterError) or not _is_about(error, partial, path):
            raise
        raise refusal(path, error) from None
    finally:
        remove(partial)


def partial_name(path: Path) -> Path:
    """Where what is to stand at ``path`` is made: hidden beside it, for this process alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def replace(new: Path, path: Path) -> None:
    """Rename a file or a folder to ``path``, in the place of what was there, so that it survives a power cut."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if new.is_dir() and path.exists():
        os.rename(path, old)
    os.replace(new, path)
    fsync_folder(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file or a folder, where there is one and the disk allows it."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def is_full(error: BaseException) -> bool:
    """Whether an error comes of a disk, a quota or a limit that has no room left, in number or in words."""
    found: BaseException | None = error
    while found is not None:
        if getattr(found, "errno", None) in FULL or FULL_IN_WORDS.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False


def refusal(path: Path, error: BaseException) -> NoSpaceError | UsageError:
    """What the user is told where ``path`` could not be written."""
    number: int | None = getattr(error, "errno", None)
    if is_full(error):
        return NoSpaceError(f"{path} cannot be written: {FULL.get(number or 0, 'no space left')}; free space and run the same command")
    return UsageError(f"{path} cannot be written: {os.strerror(number) if number is not None else error}")


def _is_about(error: Exception, partial: Path, path: Path) -> bool:
    """Whether an error is one of writing, as far as it says: it names no file, or one of ours."""
    if not isinstance(error, OSError):
        return is_full(error)
    named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes | Path) else partial
    return named in (path, path.parent) or named.is_relative_to(partial)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` so that a kill leaves the old file or the new (``aside``)."""
    with aside(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, as_json(value))


def as_json(value: Any) -> bytes:
    """``value`` as indented JSON in UTF-8."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a ``UsageError`` that names the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # what is no JSON or no UTF-8, a number of too many digits, lists too deep
        raise UsageError(f"{path} is not valid JSON: {error}") from None


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def apply_umask(path: Path) -> None:
    """Give a file the permissions of any new file in its folder: safetensors makes its files readable to their owner alone."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.mode")  # made rather than os.umask called, which other threads would feel
    probe.touch()
    try:
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink()


def require_file_place(path: Path, option: str) -> None:
    """``UsageError`` where no file can be written at ``path``: asked before long work rather than after it. Its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be written: {error.strerror}") from None
    if path.is_dir():
        raise UsageError(f"{option} {path} is a folder; give the name of a file in it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {path} cannot be written: its folder is not writable")


def require_page_place(path: Path, option: str) -> None:
    """``require_file_place``, and ``UsageError`` where a file is there that is no page of ours: it stays."""
    require_file_place(path, option)
    if not path.exists():
        return
    with open(path, "rb") as file:
        if OUR_PAGE not in file.read(4096):
            raise UsageError(f"{option} {path} is there and is no page of megainter; give another name, or remove it")


def checksum_of(value: Any) -> str:
    """Hex SHA-256 of what JSON says, however it is written in a file."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Leave sizes and SHA-256 of a folder's files in its ``checksums.json``, for ``require_checksums``; not of what nothing here reads:
    the page, which is for people to go on with, and the code for others, which is not fetched with weights by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS and path.suffix not in _NOT_READ)
    write_json(folder / CHECKSUMS, {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files})


def renew_checksums(folder: Path) -> None:
    """``write_checksums`` where the folder has some: after one of its files was written on purpose."""
    if (folder / CHECKSUMS).is_file():
        write_checksums(folder)


def require_checksums(folder: Path) -> None:
    """``DamagedError`` where a folder has a ``checksums.json`` and a file is not as that says; without one nothing is known."""
    if not (folder / CHECKSUMS).is_file():
        return
    told = read_json(folder / CHECKSUMS)
    entries = told.items() if isinstance(told, dict) else [("", None)]
    for name, entry in entries:
        path = folder / Path(name).name
        if not isinstance(entry, dict) or not name:
            raise DamagedError(f"{folder / CHECKSUMS} is damaged; convert the model again, or remove that file where you trust the others")
        if not path.is_file() or path.stat().st_size != entry.get("bytes") or sha256_of(path) != entry.get("sha256"):
            way_out = f"convert or fetch the model again, or remove {CHECKSUMS} where you changed it yourself"
            raise DamagedError(f"{path} is missing or not as it was written ({CHECKSUMS}); {way_out}")


def inside(root: Path, relative: str) -> Path:
    """``root / relative`` with symbolic links resolved; a ``UsageError`` where it leaves ``root``."""
    base = root.resolve()
    path = _resolved(base / relative)
    if path is None or not path.is_relative_to(base):
        raise UsageError(f"path {relative[:200]!r} leaves its folder {root}, or is none")
    return path


def _resolved(path: Path) -> Path | None:
    """``path`` with symbolic links resolved; None where it holds what no name holds, is too long, or its links go round in circles."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (ValueError, OSError):
        return None
    try:
        return path.resolve()
    except (ValueError, OSError, RuntimeError):
        return None


def shard(folder: Path, name: str) -> Path:
    """The file that an index in a folder of weights names; ``UsageError`` where it leaves the folder, by its name or as a link.

    In a Hugging Face cache files are links into ``blobs``: links inside the same repository's part of the cache are followed, and so are
    those of older downloads, from a folder of the user's into a cache. The path comes back unresolved: a blob's name has no suffix.
    """
    base = folder.resolve()
    path, target = folder / name, _resolved(base / name) or base.parent
    within = Path(os.path.normpath(base / name)).is_relative_to(base)
    cache = cached_repository(base)
    if within and (target.is_relative_to(base) or (target.is_relative_to(cache) if cache is not None else _is_blob(target))):
        return path
    raise UsageError(f"path {name[:200]!r} leaves its folder {folder}: put the file itself there")


def followed(path: Path) -> Path:
    """``path``, a file of weights or one beside them; ``UsageError`` where it lies in a Hugging Face cache and is a link that leaves it."""
    folder = path.parent.resolve()
    cache = cached_repository(folder)
    if cache is not None and not (folder / path.name).resolve().is_relative_to(cache):
        raise UsageError(f"{path} is a link that leaves its cache {cache}: download the model again, or give a folder with the file itself")
    return path


def require_own_files(folder: Path) -> None:
    """``UsageError`` where a file of a folder of weights, or one that its index names, is not its own (``followed``, ``shard``)."""
    for path in folder.iterdir() if folder.is_dir() else ():
        followed(path)
        if path.name.endswith(".index.json"):
            places = read_json(path)
            places = places.get("weight_map") if isinstance(places, dict) else None
            for place in sorted(set(map(str, places.values()))) if isinstance(places, dict) else ():
                shard(folder, place)


def cached_repository(folder: Path) -> Path | None:
    """The part of a Hugging Face cache that the resolved ``folder`` lies in, ``models--NAME``: beside ``snapshots`` it has ``blobs``."""
    above = [folder, *folder.parents]
    pairs = ((inner, outer) for inner, outer in itertools.pairwise(above) if inner.name == "snapshots")
    return next((outer for _, outer in pairs if (outer / "blobs").is_dir()), None)


def _is_blob(path: Path) -> bool:
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")
