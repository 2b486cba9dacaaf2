"""Extraction under random SIGKILLs and hostile image files: nothing lost, doubled or damaged, no crash, bounded memory."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import stored_ids
from preprocessing.extraction.extract import extract
from tests.places import ROOT
from tests.preprocessing.extraction import test_mpi as mpi
from tests.preprocessing.extraction.test_extract import make_folder
from tests.preprocessing.extraction.warm_start import WarmStart

KILLS, IMAGES, SEED = 200, 240, 20260101
OWN_CODES = range(2, 8)  # exit codes that say what is wrong; nothing is
WITH_MPI = mpi.MPIRUN is not None and find_spec("mpi4py") is not None


@dataclass(frozen=True)
class Start:
    """How an extraction is started: as ``count`` ranks under mpirun or as one process with ``count`` workers."""

    ranks: bool
    count: int


class Run:
    """A running extraction of folder/images into ``store``."""

    def __init__(self, start: Start, folder: Path, store: Path, warm: WarmStart) -> None:
        self.place = Path(tempfile.mkdtemp(dir=folder))
        files = ["--images", folder / "images", "--weights", folder / "detector.safetensors", "--output", store]
        arguments = ["extract", *map(str, files), "--min-boxes", "3", "--max-boxes", "9"]
        arguments += [] if start.ranks else ["--workers", str(start.count)]
        command = warm.command(self.place, *arguments)
        launcher = [str(mpi.MPIRUN), "-n", str(start.count)] if start.ranks else []
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": mpi.environment()}
        self.process = subprocess.Popen([*launcher, *command], text=True, **pipes)  # type: ignore[call-overload]

    def processes(self) -> list[int]:
        """The first process, the ranks, and the workers."""
        ranks = sorted(int(name) for name in os.listdir(self.place))
        return [self.process.pid, *ranks, *(child for pid in ranks for child in children(pid))]

    def kill(self, victim: int) -> bool:
        """SIGKILL to one of the processes; whether that kept the run from its good end. Returns when all processes are gone."""
        pids = self.processes()
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(pids[victim % len(pids)], signal.SIGKILL)
        code = self.ended()
        wait_for_the_end_of({*pids, *self.processes()})
        return code != 0

    def ended(self) -> int:
        """The exit code, once no process holds the outputs any more."""
        _, error = self.process.communicate(timeout=600)
        assert "Traceback" not in error, error
        assert self.process.returncode not in OWN_CODES, error
        self.error = error
        return self.process.returncode


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_the_end_of(pids: set[int]) -> None:
    """None of a run's processes outlives it by more than what a dying process takes on a busy machine."""
    deadline = time.monotonic() + 120
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.01)


def sleep_into(run: Run, seconds: float) -> None:
    """Wait so long, or until the run has ended."""
    deadline = time.monotonic() + seconds
    while run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def checked(store: Path, before: set[str]) -> set[str]:
    """The committed ids after a kill: all that were there are there, each record whole and in one shard only."""
    with FeatureStore(store, allow_partial=True) as partial:
        assert list(partial.damaged()) == []
        ids = list(partial.ids)
    assert before <= set(ids)
    assert len(ids) == len(set(ids))
    return set(ids)


@pytest.mark.slow
def test_200_random_kills_lose_double_and_damage_nothing(tmp_path: Path) -> None:
    """Half of the runs under mpirun; rank and worker counts, victims and moments from a seed; each store ends as the uninterrupted one."""
    folder, rng, kills = make_folder(tmp_path, IMAGES), np.random.default_rng(SEED), Counter[str]()
    with WarmStart(folder) as warm:
        spans, digests = {}, set()
        for start in (Start(False, 1), Start(True, 2), Start(True, 4)) if WITH_MPI else (Start(False, 1),):
            began, store = time.monotonic(), folder / f"whole-{start.ranks}-{start.count}"
            assert Run(start, folder, store, warm).ended() == 0
            spans[start.ranks] = time.monotonic() - began
            digests.add(FeatureStore(store).digest)
        assert len(digests) == 1
        finished, gained, store, ids = 0, 0, folder / "store-0", set[str]()
        while kills.total() < KILLS or ids:
            start = Start(bool(rng.random() < 0.5) and WITH_MPI, int(rng.integers(1, 5)))
            run = Run(start, folder, store, warm)
            sleep_into(run, float(rng.uniform(0, spans[start.ranks])))
            if kills.total() < KILLS and run.kill(int(rng.integers(0, 60))):
                kills[f"{start.count} {'ranks' if start.ranks else 'workers'}"] += 1
                if (store / "store.json").exists():
                    before, ids = ids, checked(store, ids)
                    gained += before < ids
                if kills.total() % 20 == 0:
                    print(f"{kills.total()} kills, {gained} of them after new records; {finished} stores finished", flush=True)
            else:
                assert run.ended() == 0, run.error
                assert {FeatureStore(store).digest} == digests
                finished, ids = finished + 1, set()
                store = folder / f"store-{finished}"
    print(f"{dict(sorted(kills.items()))}, {gained} of them after new records; {finished} stores finished")


# --- hostile images ----------------------------------------------------------------------------------------------------------------

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that claims a size, with little or no data behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + b"\x08\x06\0\0\0") + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def mutated(rng: np.random.Generator, number: int) -> tuple[str, bytes]:
    """A file name and content: an image cut off, with flipped bits, spliced, under a wrong suffix, or a bomb."""
    name = list(FORMATS)[number % len(FORMATS)]
    width, height = (int(value) for value in rng.integers(20, 100, 2))
    picture = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    picture.save(buffer, name)
    data = bytearray(buffer.getvalue())
    kind = ("cut", "flip", "burst", "splice", "suffix", "bomb")[int(rng.choice(6, p=[0.25, 0.3, 0.2, 0.1, 0.1, 0.05]))]
    if kind == "cut":
        data = data[: int(rng.integers(0, len(data)))]
    elif kind == "flip":
        for bit in rng.integers(0, len(data) * 8, int(rng.integers(1, 9))):
            data[bit // 8] ^= 1 << bit % 8
    elif kind == "burst":
        start = int(rng.integers(0, min(200, len(data))))
        data[start : start + 16] = rng.bytes(16)
    elif kind == "splice":
        data[len(data) // 2 :] = rng.bytes(len(data) // 2)
    elif kind == "bomb":
        side = int(rng.choice([9_000, 30_000, 2**31 - 1]))
        data = bytearray(png_header(side, side if side < 2**31 - 1 else 1))
    suffix = "jpg" if kind == "suffix" else FORMATS[name]
    return f"{number:04d}-{kind}.{suffix}", bytes(data)


LIMITED = """
    import resource, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from preprocessing.extraction.extract import extract
    folder = Path({folder!r})
    done = extract(folder / "images", folder / "store", folder / "detector.safetensors", workers=1, max_bad=1.0, min_boxes=1, max_boxes=5)
    print("result", done.stored, done.failed, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def extract_in_process(folder: Path) -> tuple[int, int, int]:
    """Stored, failed, and the worker's peak memory in MiB, of a run in a process of its own."""
    script = textwrap.dedent(LIMITED.format(root=str(ROOT), folder=str(folder)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=550, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stderr.splitlines() if "% of the regions in" not in line] == []  # the weights are drawn
    stored, failed, peak = run.stdout.splitlines()[-1].split()[1:]
    return int(stored), int(failed), int(peak)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_images_give_regions_or_a_named_line(tmp_path: Path, count: int) -> None:
    folder = make_folder(tmp_path, images=3)
    rng = np.random.default_rng(count)
    files = dict(mutated(rng, number) for number in range(count))
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    stored, failed, peak = extract_in_process(folder)
    rows = [line.split("\t") for line in (folder / "store" / "failed.tsv").read_text().splitlines()[1:]]
    listed = {row[0] for row in rows}
    assert all(len(row) == 3 and row[2] for row in rows)
    assert stored + failed == count + 4  # three good images and a page of HTML
    assert stored_ids(folder / "store") | listed == {Path(name).stem for name in files} | {"0000", "0001", "0002", "page"}
    assert not stored_ids(folder / "store") & listed
    assert stored > count / 10
    assert failed > count / 10
    assert peak < 1500, f"the worker took {peak} MiB"
    with FeatureStore(folder / "store") as store:
        assert list(store.damaged()) == []


@pytest.mark.slow
def test_large_images_stay_within_memory(tmp_path: Path) -> None:
    """Whole images of up to 100 megapixels in every mode, more of them than a batch: decoded in full they would take 8 GB."""
    folder = make_folder(tmp_path, images=3)
    for number in range(6):
        Image.new("RGBA", (10_000, 10_000), (9, 99, 200, 255)).save(folder / "images" / f"rgba-{number}.png", compress_level=1)
        Image.new("RGB", (10_000, 10_000), (9, 99, 200)).save(folder / "images" / f"rgb-{number}.jpg")
        Image.new("1", (10_000, 9_000), 1).save(folder / "images" / f"bits-{number}.png")
    stored, failed, peak = extract_in_process(folder)
    assert (stored, failed) == (21, 1)
    assert peak < 1500, f"the worker took {peak} MiB"
    with FeatureStore(folder / "store") as store:
        assert (store["rgba-0"].width, store["rgba-0"].height) == (10_000, 10_000)


def test_an_extraction_in_a_read_only_place_is_refused(tmp_path: Path) -> None:
    from megainter.errors import UsageError

    folder = make_folder(tmp_path, images=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot be created: Not a directory"):
        extract(folder / "images", tmp_path / "file" / "store", folder / "detector.safetensors", workers=1)
