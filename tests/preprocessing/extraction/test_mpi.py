"""Extraction under mpirun: the same store as one process writes, on any number of ranks, also after ranks died or were told to end."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import stored_ids
from tests.places import ROOT
from tests.preprocessing.extraction.test_extract import committed, make_folder

MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(MPIRUN is None or find_spec("mpi4py") is None, reason="mpirun or mpi4py is not installed")
IMAGES = 150


def environment(threads: int = 1) -> dict[str, str]:
    """mpirun as root and with more ranks than cores, under Open MPI 4 and 5; MPICH asks for neither."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    more = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return os.environ | root | more | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}


def start(ranks: int, folder: Path, store: Path, *options: str) -> subprocess.Popen[str]:
    """`mpirun -n ranks megainter extract`, in a process group of its own."""
    files = ["--images", str(folder / "images"), "--weights", str(folder / "detector.safetensors"), "--output", str(store)]
    command = [str(MPIRUN), "-n", str(ranks), sys.executable, "-m", "megainter", "extract", *files, "--min-boxes", "3", "--max-boxes", "9"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *options], text=True, env=environment(), start_new_session=True, **pipes)  # type: ignore[call-overload]


def finish(ranks: int, folder: Path, store: Path, *options: str) -> tuple[int, str, str]:
    with start(ranks, folder, store, *options) as job:
        out, error = job.communicate(timeout=500)
    return job.returncode, out, error


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks, in the order in which mpirun started them."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"megainter" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait_for_records(store: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while committed(store) == 0:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("mpi"))


@pytest.fixture(scope="module")
def digest(folder: Path) -> str:
    """Of the store that one process writes."""
    from preprocessing.extraction.extract import extract

    return extract(folder / "images", folder / "whole", folder / "detector.safetensors", workers=1, min_boxes=3, max_boxes=9).digest


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_write_what_one_process_writes(folder: Path, digest: str, tmp_path: Path, ranks: int) -> None:
    code, out, error = finish(ranks, folder, tmp_path / "store")
    assert code == 0, error
    assert "1 of 151 images failed" in out
    with FeatureStore(tmp_path / "store") as store:
        assert store.digest == digest
    assert len(list((tmp_path / "store").glob("shard-*.lmdb"))) == ranks


def test_a_mistake_is_told_once_and_every_rank_ends(folder: Path, tmp_path: Path) -> None:
    code, _, error = finish(2, folder, tmp_path / "store", "--workers", "3")
    assert code == 2
    assert error.count("megainter: ") == 1
    assert "each rank is one worker; start 3 ranks" in error
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_sigterm_to_mpirun_keeps_what_is_finished(folder: Path, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(3, folder, store) as job:
        wait_for_records(store, job)
        job.terminate()
        _, error = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "Traceback" not in error
    kept = stored_ids(store)
    assert 0 < len(kept) < IMAGES
    code, _, error = finish(2, folder, store)
    assert code == 0, error
    assert kept <= stored_ids(store)
    assert FeatureStore(store).digest == digest


@pytest.mark.slow
def test_sigterm_to_a_rank_ends_all_with_75(folder: Path, tmp_path: Path) -> None:
    for number in (0, 1):
        store = tmp_path / f"store-{number}"
        with start(2, folder, store) as job:
            wait_for_records(store, job)
            os.kill(ranks_of(job)[number], signal.SIGTERM)
            _, error = job.communicate(timeout=60)
        assert job.returncode == 75, error
        assert error.count("megainter: ") == 1
        assert "run the same command to go on" in error


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_its_images_go_to_the_others_next_time(folder: Path, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(3, folder, store) as job:
        wait_for_records(store, job)
        os.kill(ranks_of(job)[2], signal.SIGKILL)
        job.communicate(timeout=60)
    assert job.returncode != 0
    code, _, error = finish(2, folder, store)
    assert code == 0, error
    assert FeatureStore(store).digest == digest


@pytest.mark.slow
def test_a_killed_mpirun_leaves_no_rank_behind(folder: Path, digest: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(2, folder, store) as job:
        wait_for_records(store, job)
        ranks = ranks_of(job)
        job.kill()
        job.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    code, _, error = finish(2, folder, store)
    assert code == 0, error
    assert FeatureStore(store).digest == digest


@pytest.mark.slow
def test_a_stopped_rank_is_named_after_a_minute(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(2, folder, store) as job:
        wait_for_records(store, job)
        stopped = ranks_of(job)[1]
        os.kill(stopped, signal.SIGSTOP)
        _, error = job.communicate(timeout=150)
    assert job.returncode not in (0, 75)
    assert f"rank 1 (pid {stopped} on " in error
    assert "has gone silent" in error
    deadline = time.monotonic() + 30  # a stopped process ends only when mpirun's SIGKILL comes
    while Path(f"/proc/{stopped}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_ranks_give_the_ids_of_a_pattern_and_a_clash_is_told_once(folder: Path, tmp_path: Path) -> None:
    code, _, error = finish(2, folder, tmp_path / "store", "--ids", "photo-{number}")
    assert code == 2, "one image is called page"
    assert error.count("megainter: ") == 1
    assert "'page.jpg' in" in error
    assert "id 'page' has no number for --ids" in error
    assert not (tmp_path / "store").exists()
    code, _, error = finish(2, folder, tmp_path / "store", "--ids", "photo-{stem}")
    assert code == 0, error
    with FeatureStore(tmp_path / "store") as store:
        assert list(store.ids) == [f"photo-{n:04d}" for n in range(IMAGES)]
