"""Image files, none of them trusted: which there are, and each as an RGB picture or a reason why not.

Every picture comes out the same way whatever it was stored as: turned as its EXIF says, the first frame of an animation, 16-bit grey
scaled to 8 bits, transparency over white. ICC profiles are ignored, as in the detectors' own training.
An image may also be a part of a larger file, a member of a tar: it is read where it stands.
"""

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from megainter.errors import UsageError
from megainter.files import inside

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # no format that runs an outside program or a large foreign parser
MORE_FORMATS = ("HEIF", "TIFF")  # what phones and scanners write: by the extra "images", as their parsers are large
UPRIGHT = MORE_FORMATS  # Pillow gives these in the size in which they are shown
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}
MORE_SUFFIXES = {".heic", ".heif", ".hif", ".tif", ".tiff"}
OTHER_SUFFIXES = MORE_SUFFIXES | {".avif", ".jp2", ".jxl", ".ppm", ".pgm", ".svg", ".eps", ".tga", ".psd"}
NEEDED = "reading it needs pip install 'megainter[images]'"
TIFF_MAGIC, HEIF_BRANDS = (b"II*\0", b"MM\0*"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
MAX_PIXELS = 100_000_000  # decoded that is 300 MB
DRAFT_PIXELS = 16_000_000  # with draft, a larger image comes at 1/2, 1/4 or 1/8 of its size, but at no fewer pixels than a quarter of this
BAND_ROWS = 64  # rows of the smaller picture that are made at once
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
EXIF_ORIENTATION, FIRST_TURNED_ORIENTATION = 0x0112, 5  # orientations 5 to 8 swap width and height
Part = tuple[int, int]  # where an image stands inside a larger file: offset and length in bytes


class UnreadableImageError(UsageError):
    """A file that is no readable image; ``reason`` is the short why, for lists."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is not a readable image: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)


class _FilePart(io.RawIOBase):
    """``length`` bytes of a file from ``offset`` on, as a file of its own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self.file, self.offset, self.length, self.at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        data = os.pread(self.file.fileno(), max(0, min(len(buffer), self.length - self.at)), self.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read here, as Pillow names them: HEIF and TIFF where the extra "images" is installed."""
    try:
        import pillow_heif
    except ImportError:
        return FORMATS
    pillow_heif.register_heif_opener(thumbnails=False, decode_threads=1)
    return FORMATS + MORE_FORMATS


def load_image(path: Path, draft: bool = False, part: Part | None = None) -> Image.Image:
    """The image as RGB, 8 bits. ``UnreadableImageError`` for anything but a whole file of ``formats`` of up to 100 megapixels.

    With ``draft`` an image above 16 megapixels comes smaller than it is (``image_size`` tells its true size), at a fraction of the memory.
    """
    with _opened(path, part) as image:
        large = draft and image.width * image.height > DRAFT_PIXELS
        if large and image.format == "JPEG":
            scale = (DRAFT_PIXELS / 4 / (image.width * image.height)) ** 0.5
            image.draft("RGB", (round(image.width * scale), round(image.height * scale)))
        image.load()
        return _reduced(image) if large and image.format != "JPEG" else _to_rgb(ImageOps.exif_transpose(image))


def image_size(path: Path, part: Part | None = None) -> tuple[int, int]:
    """(width, height) in pixels as ``load_image`` gives them without ``draft``, from the header alone."""
    with _opened(path, part) as image:
        turned = image.format not in UPRIGHT and image.getexif().get(EXIF_ORIENTATION, 1) in range(FIRST_TURNED_ORIENTATION, 9)
        return (image.height, image.width) if turned else (image.width, image.height)


def find_images(folder: Path) -> list[tuple[str, str]]:
    """(image id, path relative to ``folder``) of every image below it, sorted by id; the id is the path without its suffix.

    Hidden files are left out. ``UsageError`` for a missing or empty folder, and for two files with one id.
    """
    if not folder.is_dir():
        raise UsageError(f"images folder {folder} does not exist or is not a folder")
    found: dict[str, str] = {}
    clashes = []
    for relative in _files_below(folder):
        image_id = os.path.splitext(relative)[0]
        if image_id in found:
            clashes.append(f"{found[image_id]} and {relative} would both have the image id {image_id!r}")
        found.setdefault(image_id, relative)
    if clashes:
        more = f", and {len(clashes) - 3:,} more" if len(clashes) > 3 else ""
        raise UsageError(f"{folder}: {'; '.join(clashes[:3])}{more}; rename them, or name images and ids in a --manifest")
    if not found:
        raise UsageError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))})")
    return sorted(found.items())


def confined(folder: Path, relative: str) -> Path:
    """``folder / relative``; ``UnreadableImageError`` where that is outside ``folder``, links included."""
    try:
        return inside(folder, relative)
    except (UsageError, ValueError, OSError):
        raise UnreadableImageError(Path(folder, relative.replace("\0", "\\0")), "it lies outside the images folder") from None


def _files_below(folder: Path) -> Iterator[str]:
    """Relative paths of image files, links followed, every folder once."""
    visited: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES | OTHER_SUFFIXES:
                yield Path(current, name).relative_to(folder).as_posix()


@contextmanager
def _opened(path: Path, part: Part | None) -> Iterator[Image.Image]:
    """The file as a Pillow image whose header is read and whose size is allowed; whatever fails inside becomes one kind of error."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UnreadableImageError(path, "not a regular file")
        with open(path, "rb") as file, Image.open(_within(file, part), formats=formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except UnreadableImageError:
        raise
    except MemoryError:
        raise UnreadableImageError(path, "out of memory") from None
    except Exception as error:  # a parser fed with hostile bytes may raise anything
        raise UnreadableImageError(path, _reason(path, part, error)) from None


def _within(file: BinaryIO, part: Part | None) -> BinaryIO:
    return file if part is None else io.BufferedReader(_FilePart(file, *part))


def _reason(path: Path, part: Part | None, error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "no such file"
        case Image.DecompressionBombError():
            return f"more than {MAX_PIXELS // 10**6} megapixels"
        case UnidentifiedImageError():
            return _unidentified(path, part)
        case OSError() if error.errno is not None:
            return error.strerror or str(error)
        case OSError() | SyntaxError() | ValueError() | EOFError() | struct.error() | zlib.error():
            return " ".join(str(error).split()) or type(error).__name__
        case _:
            return f"{type(error).__name__} while decoding: {' '.join(str(error).split())}"


def _unidentified(path: Path, part: Part | None) -> str:
    """What a file is that Pillow takes for none of the formats."""
    with open(path, "rb") as file:
        head = _within(file, part).read(12)
    if not head:
        return "empty file"
    known = formats()
    if known == FORMATS and (head[:4] in TIFF_MAGIC or is_heif(head)):
        return f"{'TIFF' if head[:4] in TIFF_MAGIC else 'HEIC'}, and {NEEDED}"
    return f"not {', '.join(known[:-1])} or {known[-1]}, whatever its name"


def is_heif(head: bytes) -> bool:
    """Whether a file that begins so is what phones call HEIC."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def silence_pillow() -> None:
    """No warnings from Pillow in this process: its 89-megapixel warning is an error of our own here, broken metadata is of no interest."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def _reduced(image: Image.Image) -> Image.Image:
    """``image`` at the largest of 1/2, 1/4, 1/8 that has at most 16 megapixels, made band by band: one RGB copy of it would be 300 MB."""
    factor = next(f for f in (2, 4, 8) if image.width * image.height <= DRAFT_PIXELS * f * f)
    small = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, small.height, BAND_ROWS):
        rows = (top * factor, min(image.height, (top + BAND_ROWS) * factor))
        small.paste(_to_rgb(image.crop((0, rows[0], image.width, rows[1]))).reduce(factor), (0, top))
    small.getexif()[EXIF_ORIENTATION] = image.getexif().get(EXIF_ORIENTATION, 1)
    return ImageOps.exif_transpose(small)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        return _scaled_grey(image)
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _scaled_grey(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255 by rounding; Pillow's own conversion would clip at 255."""
    values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
