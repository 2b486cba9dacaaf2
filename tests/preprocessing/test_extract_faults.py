"""Extraction under random SIGKILLs and hostile image files: nothing lost, doubled or damaged, no crash, bounded memory."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megainter.data.feature_store import FeatureStore, stored_ids
from megainter.errors import LockedError
from preprocessing.extract import extract
from tests.preprocessing import test_extract_mpi as mpi
from tests.preprocessing.test_extract import make_folder

ROOT = Path(__file__).parents[2]
KILLS, SCENES, SEED = 200, 240, 20260101
GROUND = """
    import os, signal, sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from preprocessing import extract_crew
    from preprocessing.extract import extract
    extract_crew.START_METHOD = "fork"  # workers need no new interpreter
    for line in sys.stdin:
        workers, seconds, store = line.split(maxsplit=2)
        pid = os.fork()
        if pid == 0:
            os.setsid()
            code = 1
            try:
                extract(
                    Path({images!r}), Path(store.strip()), Path({weights!r}),
                    min_boxes=3, max_boxes=9, workers=int(workers), min_size=128, max_size=128,
                )
                code = 0
            finally:
                os._exit(code)
        deadline, ended = time.monotonic() + float(seconds), (0, 0)
        while not ended[0] and time.monotonic() < deadline:
            time.sleep(0.002)
            ended = os.waitpid(pid, os.WNOHANG)
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended[1]), flush=True)
"""


class Ground:
    """A process that has everything imported and forks a process per run, so that a kill costs milliseconds and not an import."""

    def __init__(self, images: Path, weights: Path) -> None:
        script = textwrap.dedent(GROUND.format(root=str(ROOT), images=str(images), weights=str(weights)))
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", script], text=True, env=environment, **pipes)  # type: ignore[call-overload]

    def run(self, store: Path, workers: int, seconds: float = 3600) -> bool:
        """One run, killed after so many seconds; whether it had ended well by then."""
        self.process.stdin.write(f"{workers} {seconds} {store}\n")
        self.process.stdin.flush()
        code = int(self._line())
        assert code in (0, -signal.SIGKILL), self.process.stderr.read()
        return code == 0

    def _line(self) -> str:
        line = ""
        while not line.strip().lstrip("-").isdigit():  # progress stands between
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
        return line


def checked(store: Path, before: set[str]) -> set[str]:
    """The committed ids after a kill: all that were there are there, each record whole and in one shard only."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with FeatureStore(store, allow_partial=True) as partial:
                assert list(partial.damaged()) == []
                ids = list(partial.ids)
            break
        except LockedError:  # the killed run's workers are just ending
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert before <= set(ids)
    assert len(ids) == len(set(ids))
    return set(ids)


def mpi_kill(folder: Path, store: Path, ranks: int, seconds: float, victim: int) -> None:
    """A run under mpirun of which one rank, or mpirun itself, is killed so long after its first new record."""
    with mpi.start(ranks, folder, store, "--min-size", "128", "--max-size", "128") as job:
        before, deadline = mpi.committed(store), time.monotonic() + 300
        while mpi.committed(store) == before and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(seconds)
        if job.poll() is None:
            os.kill([job.pid, *mpi.ranks_of(job)][victim % (ranks + 1)], signal.SIGKILL)
        job.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("emoji") is None, reason="composing scenes needs megainter[demo]")
def test_200_random_kills_lose_double_and_damage_nothing(tmp_path: Path) -> None:
    """Worker and rank counts, kinds of start and moments of death drawn from a seed; the store in the end is the uninterrupted one."""
    from preprocessing.scenes import write_scenes

    images, weights = tmp_path / "images", tmp_path / "detector.safetensors"
    write_scenes(tmp_path, {"train": SCENES}, progress=False)
    shutil.copy(ROOT / "preprocessing/assets/demo_detector.safetensors", weights)
    rng, ground = np.random.default_rng(SEED), Ground(images, weights)
    assert ground.run(tmp_path / "whole", 2)
    whole = FeatureStore(tmp_path / "whole").digest
    kills, finished, store, ids = 0, 0, tmp_path / "store-0", set()
    while kills < KILLS:
        kind, workers, seconds = rng.random(), int(rng.integers(1, 5)), float(rng.uniform(0.05, 3.5))
        if kind < 0.02 and mpi.MPIRUN and find_spec("mpi4py"):
            mpi_kill(tmp_path, store, max(2, workers), seconds / 4, int(rng.integers(0, 5)))
            done = (store / "store.json").exists() and json.loads((store / "store.json").read_text())["sealed"]
        else:
            done = ground.run(store, workers, seconds)
        kills += not done
        if (store / "store.json").exists():
            ids = checked(store, ids)
        if done:
            assert FeatureStore(store).digest == whole
            finished += 1
            store, ids = tmp_path / f"store-{finished}", set()
    assert ground.run(store, 2)
    assert FeatureStore(store).digest == whole
    assert stored_ids(store) == set(FeatureStore(tmp_path / "whole").ids)
    ground.process.stdin.close()
    ground.process.wait()
    print(f"{kills} kills, {finished} stores finished between them")


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
    from preprocessing.extract import extract
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
    assert run.stderr == ""
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
