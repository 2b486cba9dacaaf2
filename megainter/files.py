"""Files that appear whole or not at all, and digests of their contents."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from megainter.errors import UsageError


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, fsync it and rename it into place, so that a kill leaves the old file or the new."""
    data = content.encode() if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    fsync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or malformed one is a ``UsageError`` that names the file and the line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, relative: str) -> Path:
    """``root / relative`` with symbolic links resolved; a ``UsageError`` where it leaves ``root``."""
    base = root.resolve()
    path = (base / relative).resolve()
    if "\0" in relative or not path.is_relative_to(base):
        raise UsageError(f"path {relative!r} leaves its folder {root}")
    return path
