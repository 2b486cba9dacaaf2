"""How this process holds memory on the CPU, and how much there is."""

import ctypes
import os
import sys
from pathlib import Path

# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEEP_UP_TO, GROW_BY = 2**31 - 1, 32 << 20  # bytes
LARGEST_THRESHOLD = 32 << 20  # bytes; glibc takes no larger one


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next allocation instead of returning it to the system; False where it cannot be told.

    Tensors of tens of megabytes are otherwise mapped and unmapped at every step, and the system clears each page anew: a third of the
    time of a base-size training step on CPU (docs/evidence/performance.md). Blocks above 32 MiB come from what is kept where they fit in,
    else from the system: a heap that has to hold DeepSpeed's buckets of 2 GB, too, finds no place for them again and grows at every step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, KEEP_UP_TO) and mallopt(M_TOP_PAD, GROW_BY))


def available_memory() -> int:
    """Bytes that a new process could take: Linux's MemAvailable, elsewhere the free pages."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
