"""What is promised of a parser for any input: a value or one bounded line, soon, in memory that the input's size explains."""

import resource
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megainter.errors import MegainterError
from preprocessing.features.formats.entry import BadEntryError
from tests.places import ROOT

SECONDS = 5.0  # of processor time: a parser that takes longer counts as hanging
LINE = 4000  # characters of an error, as the command line prints them
MEMORY, TIMES = 96 << 20, 64  # bytes by which the peak may grow, and for each byte of input
TOLD = (MegainterError, BadEntryError)  # the second is what importers count and list by entry


@dataclass(frozen=True)
class Fault:
    """A promise that was broken: ``kind`` names it, the same for all inputs that break it at one place; ``detail`` is for a reader."""

    kind: str
    detail: str


def judge(parse: Callable[[bytes], object], data: bytes) -> Fault | None:
    """What is wrong with what ``parse`` does with ``data``, or None."""
    before, start = peak(), time.process_time()
    try:
        parse(data)
        fault = None
    except TOLD as error:
        fault = _badly_told(error)
    except Exception as error:
        fault = Fault(f"{type(error).__name__} {_place(error)}", traceback.format_exc()[-4000:])
    seconds, grown = time.process_time() - start, peak() - before
    if fault is None and seconds > SECONDS:
        fault = Fault("slow", f"{seconds:.1f} s for {len(data):,} bytes")
    if fault is None and grown > MEMORY + TIMES * len(data):
        fault = Fault("memory", f"{grown >> 20:,} MiB for {len(data):,} bytes")
    if grown > MEMORY:
        forget_peak()
    return fault


def _badly_told(error: Exception) -> Fault | None:
    text = str(error)
    if not text or len(text) > LINE or (not text.isprintable() and any(unicodedata.category(one)[0] == "C" for one in text)):
        return Fault(f"not one printable line of at most {LINE} characters {_place(error)}", repr(text[:500]))
    return None


def _place(error: BaseException) -> str:
    """The last place in this repository that an exception went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _ours(frame.filename)]
    return f"at {Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].name}" if frames else "nowhere here"


def _ours(file: str) -> bool:
    path = Path(file)
    return path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "tests") and ".venv" not in path.parts


def peak() -> int:
    """Bytes that this process has held at most since ``forget_peak``."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def forget_peak() -> None:
    """Let ``peak`` begin at what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
