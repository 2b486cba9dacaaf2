"""Extraction by real processes with a tiny real detector: kills, signals, bad images, other settings; the same store in the end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.shard import count_records
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store, stored_ids
from megainter.data.tables.boxes import ImageBoxes, write_boxes
from megainter.errors import DamagedError, LockedError, MegainterError, StoppedEarly, TooManyBadInputsError, UsageError
from megainter.progress import Progress
from megainter.weights import as_packaged, locate, packaged_weights
from preprocessing.detector import load_detector
from preprocessing.detector.detector import Detector, DetectorConfig, build_model, save_detector
from preprocessing.detector.torchvision_models import TorchvisionDetection
from preprocessing.extraction.crew import Expectation, Worker, receive
from preprocessing.extraction.extract import (
    Extraction,
    _batches,
    _check_disk,
    _devices,
    _images_per_pass,
    _source,
    _warn_of_glyphs,
    _why,
    extract,
)
from preprocessing.extraction.worker import Failure, Task, decoded, extractor, store_batch
from preprocessing.features.show import check_store, require_whole
from preprocessing.images.decode import formats
from preprocessing.images.listing import ImageList, list_images
from tests.places import ROOT

IMAGES = 150  # more than two transactions of 64
SIZES = ((64, 64), (96, 64), (64, 80))


def write_images(folder: Path, count: int, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        blocks = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        Image.fromarray(blocks).resize((width, height)).save(folder / f"{number:04d}.jpg")


def make_folder(folder: Path, images: int = IMAGES) -> Path:
    """Fill a folder with images/ (readable ones and one HTML page) and detector.safetensors, randomly initialised."""
    write_images(folder / "images", images)
    (folder / "images" / "page.jpg").write_text("<html>404</html>")
    names = ("__background__", "red", "green", "blue")
    config = DetectorConfig(
        names, "tiny", feature_size=24, min_size=64, max_size=96, anchor_sizes=((16, 32),), proposals=20, proposals_before_nms=50
    )
    torch.manual_seed(0)
    save_detector(folder / "detector.safetensors", config, build_model(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("extract"))


@pytest.fixture(scope="module")
def finished(folder: Path) -> Extraction:
    """An uninterrupted extraction by two workers into folder/whole."""
    options = {"workers": 2, "min_boxes": 3, "max_boxes": 9, "precision": "fp32"}
    return extract(folder / "images", folder / "whole", folder / "detector.safetensors", **options)


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from megainter.errors import MegainterError
    from preprocessing.extraction.extract import extract
    folder = Path({folder!r})
    try:
        options = dict(workers=2, min_boxes=3, max_boxes=9, precision="fp32")
        print(extract(folder / "images", Path({store!r}), folder / "detector.safetensors", **options))
    except MegainterError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


def start(folder: Path, store: Path) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT.format(root=str(ROOT), folder=str(folder), store=str(store)))
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def committed(store: Path) -> int:
    return sum(count_records(shard) for shard in store.glob("shard-*.lmdb") if shard.stat().st_size)


def wait_for_records(store: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + 240
    while committed(store) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_store_holds_what_the_detector_says_of_each_image(folder: Path, finished: Extraction) -> None:
    assert (finished.stored, finished.failed) == (IMAGES, 1)
    detector = load_detector(folder / "detector.safetensors")
    with FeatureStore(folder / "whole") as store:
        assert store.digest == finished.digest
        assert store.schema.detector == detector.fingerprint
        assert store.schema.settings["max_boxes"] == 9
        assert len(list((folder / "whole").glob("shard-*.lmdb"))) == 2
        for number in (0, 1, 2, 77, 149):
            record = store[f"{number:04d}"]
            image = Image.open(folder / "images" / f"{number:04d}.jpg").convert("RGB")
            alone = detector.extract(image, min_boxes=3, max_boxes=9)
            assert (record.width, record.height) == image.size
            assert 3 <= len(record) <= 9
            np.testing.assert_allclose(record.boxes, alone.boxes, atol=1e-3)
            np.testing.assert_allclose(record.features.astype(np.float32), alone.features.astype(np.float32), rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(record.class_probs, alone.class_probs, atol=1e-3)


def test_failed_images_are_listed_with_their_reason(folder: Path, finished: Extraction) -> None:
    lines = (folder / "whole" / "failed.tsv").read_text().splitlines()
    assert lines == ["image_id\tpath\treason", f"page\tpage.jpg\tnot {', '.join(formats()[:-1])} or {formats()[-1]}, whatever its name"]


def test_killed_runs_taken_up_again_end_with_the_same_store(folder: Path, finished: Extraction, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(folder, store) as process:
        wait_for_records(store, process)
        process.kill()
    assert 0 < len(stored_ids(store)) < IMAGES
    with start(folder, store) as process:  # at once: the dead run's workers hold nothing any more
        out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert f"stored={IMAGES}, failed=1, digest='{finished.digest}'" in out
    assert re.fullmatch(r"warning: 100\.0% of the regions in .* are likeliest 'blue': .*\n", error)  # weights are drawn


def test_sigterm_keeps_what_is_finished_and_says_how_to_go_on(folder: Path, finished: Extraction, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(folder, store) as process:
        wait_for_records(store, process)
        process.terminate()
        start_of_stop = time.monotonic()
        _, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert time.monotonic() - start_of_stop < 10
    assert "stopped at" in error
    assert f"of {IMAGES + 1} images; run the same command to go on" in error
    assert error.count("\n") == 1
    kept = len(stored_ids(store))
    assert 0 < kept < IMAGES
    with pytest.raises(MegainterError, match=f"incomplete: {kept} records"):
        FeatureStore(store)


@pytest.mark.slow  # a detector that takes its time
def test_a_heavy_detector_tells_its_pace_and_keeps_each_finished_image_whatever_the_batch(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 40)
    config = DetectorConfig(("__background__", "thing"), min_size=480, max_size=640)
    save_detector(tmp_path / "detector.safetensors", config, build_model(config))
    files = ["--images", tmp_path / "images", "--output", tmp_path / "store", "--weights", tmp_path / "detector.safetensors"]
    command = [sys.executable, "-m", "megainter", "extract", *map(str, files), "--batch-size", "64", "--workers", "2", "--device", "cpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_records(tmp_path / "store", process)
        process.terminate()
        asked = time.monotonic()
        told, error = process.communicate(timeout=30)
    assert process.returncode == 75, error
    assert time.monotonic() - asked < 10
    assert re.search(r"^extract: 40 of 40 images to do; loading the detector in 2 processes$", told, re.M)
    assert re.search(r"^extract: the first (image|\d+) took [\d.]+ m?s( each)?; 40 by 2 processes take about \d+ (s|min)$", told, re.M)
    assert 1 <= len(stored_ids(tmp_path / "store")) < 40
    assert "stopped at" in error


@pytest.mark.slow  # the start of one more run of two processes
def test_ctrl_c_while_the_workers_start_is_one_line(folder: Path, tmp_path: Path) -> None:
    files = ["--images", folder / "images", "--output", tmp_path / "store", "--weights", folder / "detector.safetensors"]
    command = [sys.executable, "-m", "megainter", "extract", *map(str, files), "--workers", "2"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("extract: "):
            assert process.poll() is None
        time.sleep(0.5)  # amid their imports
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(error.splitlines()) == 1
    assert "run the same command to go on" in error


@pytest.mark.parametrize(
    ("weights", "size", "warned"),
    [("demo", (640, 480), True), ("a copy", (640, 480), True), ("demo", (160, 160), False), ("photos", (640, 480), False)],
)
def test_the_glyph_detector_is_warned_of_where_images_are_no_scenes(
    tmp_path: Path, weights: str, size: tuple[int, int], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copy(packaged_weights("demo"), tmp_path / "mine.safetensors")
    (tmp_path / "images").mkdir()
    for number in range(3):
        Image.new("RGB", size).save(tmp_path / "images" / f"{number}.jpg")
    found = as_packaged(locate(copy if weights == "a copy" else weights, "detector"))
    assert found.name == ("photos" if weights == "photos" else "demo")
    _warn_of_glyphs(found, list_images(tmp_path / "images"))
    told = capsys.readouterr().err
    assert (told.startswith("WARNING: the detector demo knows the glyphs") and "--weights photos" in told) == warned


def test_a_plain_file_of_weights_stays_one(folder: Path) -> None:
    found = locate(folder / "detector.safetensors", "detector")
    assert as_packaged(found) is found


def test_a_pass_on_a_cpu_has_few_images_and_of_a_heavy_network_one(folder: Path) -> None:
    light, heavy = load_detector(folder / "detector.safetensors"), DetectorConfig(("__background__", "thing"))
    model = torch.nn.Module()  # the passes depend on the configuration alone
    large = Detector(TorchvisionDetection(heavy, model, "cpu"), "0" * 16)
    assert [_images_per_pass(light, "cpu", asked) for asked in (1, 8, 64)] == [1, 8, 8]
    assert [_images_per_pass(large, "cpu", asked) for asked in (1, 8, 64)] == [1, 1, 1]


def test_the_first_batch_says_how_long_all_take(capsys: pytest.CaptureFixture[str]) -> None:
    class Link:
        def __init__(self, *messages: object) -> None:
            self.messages = list(messages)

        def recv(self) -> object:
            return self.messages.pop(0)

    task = Task("a", "a.jpg", (64, 64))
    unreadable = Failure("a", "a.jpg", "no image")
    link = Link(("done", 1, [unreadable], 0.1), ("done", 2, [], 26.0), ("done", 2, [], 30.0))
    worker = Worker("one", link, batches=[[task], [task] * 2, [task] * 2])  # type: ignore[arg-type]
    expectation, failures = Expectation(60, [worker, worker]), list[Failure]()
    with Progress("extract", 60, "images", enabled=False) as progress:
        assert [receive(worker, failures, progress, expectation) for _ in range(3)] == [1, 2, 2]
    assert failures == [unreadable]
    assert capsys.readouterr().out == "extract: the first 2 took 13.0 s each; 60 by 2 processes take about 6 min\n"


def test_one_image_is_told_in_the_singular(capsys: pytest.CaptureFixture[str]) -> None:
    task = Task("a", "a.jpg", (64, 64))
    worker = Worker("one", None, batches=[[task]])  # type: ignore[arg-type]
    Expectation(15, [worker]).tell(1, 0.6)
    assert capsys.readouterr().out == "extract: the first image took 0.60 s; 15 by 1 process take about 9 s\n"


def test_failed_images_make_no_pace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does what is over within a second: 4 of 10 that gave regions in 8 s are 2 s each."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("extract", 20, "images") as progress:
        now[0] = 30.0
        progress.began(0.0001)
        progress.fail(2)
        progress.update(2, "2 failed")
        now[0] = 38.0
        progress.fail(4)
        progress.update(8)
        progress.last_line = 0.0
        progress.update(0, "6 failed")
        now[0] = 30.5
    assert capsys.readouterr().out.splitlines() == [
        "extract: 2/20 images, 2 failed",
        "extract: 10/20 images, 2.0 s each, 0.3 min left, 6 failed",
        "extract: 10/20 images in less than a second",
    ]


def test_reasons_that_come_once_are_not_called_frequent() -> None:
    failed = [Failure(name, f"{name}.jpg", reason) for name, reason in zip("abc", ("empty", "cut off", "cut off"), strict=True)]
    assert [_why(failed[:n]) for n in range(4)] == ["", " (empty)", " (first: empty)", " (most often: cut off)"]


@pytest.mark.slow  # the start of one more run of two processes
def test_a_worker_that_dies_is_told_and_the_others_end(folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with start(folder, store) as process:
        wait_for_records(store, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(workers[0], signal.SIGKILL)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"(pid {workers[0]}) was killed by SIGKILL at images '00" in error
    assert "run the same command to go on" in error
    assert error.count("\n") == 1
    assert not Path(f"/proc/{workers[1]}").exists()


WAITING_RANK = """
    import signal, sys, time
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from preprocessing.extraction import mpi, worker

    class Link:
        received = 0
        def send(self, message): pass
        def recv(self):
            self.received += 1
            if self.received > 1:
                print("waiting", flush=True)
                time.sleep(60)
            return worker.WorkerSetup(0, Path(), Path(), None, Path(), "cpu", "fp32", {{}}, 0)

    mpi.work = lambda link, job: signal.signal(signal.SIGTERM, worker._terminate)
    mpi._serve(Link(), 0)
"""


def test_a_rank_that_has_worked_and_waits_for_the_end_dies_of_sigterm_in_silence() -> None:
    """mpirun sends it where another rank died."""
    script = textwrap.dedent(WAITING_RANK.format(root=str(ROOT)))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "waiting\n"
        rank.terminate()
        _, error = rank.communicate(timeout=30)
    assert (rank.returncode, error) == (-signal.SIGTERM, "")


def test_a_finished_run_has_nothing_left_to_do(folder: Path, finished: Extraction) -> None:
    before = (folder / "whole" / "store.json").stat().st_mtime_ns
    page = (folder / "images" / "page.jpg").rename(folder / "page.txt")
    try:
        again = extract(folder / "images", folder / "whole", folder / "detector.safetensors", min_boxes=3, max_boxes=9)
    finally:
        page.rename(folder / "images" / "page.jpg")
    assert again == Extraction(IMAGES, 0, finished.digest)
    assert (folder / "whole" / "store.json").stat().st_mtime_ns == before


def test_other_settings_or_another_detector_are_refused(folder: Path, finished: Extraction, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="max_boxes is 9, not 36"):
        extract(folder / "images", folder / "whole", folder / "detector.safetensors", min_boxes=3, max_boxes=36)
    config = load_detector(folder / "detector.safetensors").config
    save_detector(tmp_path / "other.safetensors", config, build_model(config))
    with pytest.raises(UsageError, match=r"detector is '[0-9a-f]+', not '[0-9a-f]+'"):
        extract(folder / "images", folder / "whole", tmp_path / "other.safetensors", min_boxes=3, max_boxes=9)


def test_a_damaged_record_is_named_and_made_anew_by_the_way_that_the_message_tells(
    folder: Path, finished: Extraction, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(folder / "whole", tmp_path / "store"))
    with FeatureStore(store) as whole:
        features = whole["0003"].features.tobytes()
    shard = next(path for path in store.glob("shard-*.lmdb") if features in path.read_bytes())
    shard.write_bytes(shard.read_bytes().replace(features, bytes([features[0] ^ 1]) + features[1:]))  # pages once used hold copies
    told = rf"record '0003' in {shard} is damaged \(checksum\); delete that file and run the same extraction or import again"
    with FeatureStore(store) as damaged, pytest.raises(DamagedError, match=told):
        damaged["0003"]
    with pytest.raises(DamagedError, match=r"1 of 150 records of .* are wrong; delete the shards named above"):
        require_whole(store, check_store(store))

    shard.unlink()
    with pytest.raises(DamagedError, match=f"{shard} is missing; restore it, or run the same extraction or import again"):
        FeatureStore(store)
    options = {"workers": 1, "min_boxes": 3, "max_boxes": 9, "precision": "fp32"}
    assert extract(folder / "images", store, folder / "detector.safetensors", **options) == finished
    assert check_store(store).records == IMAGES


def test_a_damaged_index_is_written_anew_by_the_same_command(folder: Path, finished: Extraction, tmp_path: Path) -> None:
    store = Path(shutil.copytree(folder / "whole", tmp_path / "store"))
    os.truncate(store / "index.arrow", 100)
    with pytest.raises(DamagedError, match="run the same extraction again to write it anew"):
        FeatureStore(store)
    options = {"workers": 1, "min_boxes": 3, "max_boxes": 9, "precision": "fp32"}
    assert extract(folder / "images", store, folder / "detector.safetensors", **options) == finished
    assert check_store(store).records == IMAGES


def test_too_many_bad_images_keep_the_good_ones_unsealed(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", 6)
    (tmp_path / "images" / "tab\there.jpg").write_bytes(b"")
    (tmp_path / "images" / os.fsdecode(b"latin-\xe9.jpg")).write_bytes((tmp_path / "images" / "0000.jpg").read_bytes())
    run = {"weights": folder / "detector.safetensors", "workers": 1}
    with pytest.raises(TooManyBadInputsError, match=r"2 of 8 images failed .*, listed in .*failed\.tsv: more than --max-bad 0\.01"):
        extract(tmp_path / "images", tmp_path / "store", **run)
    assert stored_ids(tmp_path / "store") == {f"{number:04d}" for number in range(6)}
    text = (tmp_path / "store" / "failed.tsv").read_text()
    assert "latin-\\udce9\tlatin-\\udce9.jpg\timage id 'latin-\\udce9' is not valid Unicode" in text
    assert "tab\\there\ttab\\there.jpg\tempty file" in text
    assert extract(tmp_path / "images", tmp_path / "store", max_bad=0.3, **run).stored == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_boxes": 0}, "min_boxes 0 must be positive"),
        ({"min_boxes": 50, "max_boxes": 36}, "at most max_boxes 36"),
        ({"selection": "nms"}, "not one of caffe, d2, objectness"),
        ({"workers": 0}, "must be at least 1"),
        ({"max_bad": 2.0}, "between 0 and 1"),
        ({"weights": Path("absent.safetensors")}, r"absent\.safetensors do(es)? not exist"),
        ({"images": Path("absent")}, "images folder absent does not exist"),
    ],
)
def test_impossible_requests_are_refused_before_anything_is_written(folder: Path, tmp_path: Path, options: dict, message: str) -> None:
    arguments = {"images": folder / "images", "output": tmp_path / "store", "weights": folder / "detector.safetensors"} | options
    with pytest.raises(UsageError, match=message):
        extract(**arguments)
    assert not (tmp_path / "store").exists()


def test_a_second_extraction_into_one_store_is_refused(folder: Path, finished: Extraction) -> None:
    schema = FeatureStore(folder / "whole").schema
    with FeatureStoreWriter(folder / "whole", schema), pytest.raises(LockedError, match=f"in use by pid {os.getpid()}"):
        extract(folder / "images", folder / "whole", folder / "detector.safetensors", min_boxes=3, max_boxes=9)


def test_batches_hold_one_size_and_do_not_depend_on_what_is_done(folder: Path) -> None:
    source = list_images(folder / "images")
    batches = list(_batches(source, {}, set(), 8))
    assert sorted(task.image_id for batch in batches for task in batch) == [item.image_id for item in source.items]
    assert all(len({task.size for task in batch}) == 1 and len(batch) <= 8 for batch in batches)
    assert sum(len(batch) == 8 for batch in batches) > len(batches) / 2
    done = {task.image_id for batch in batches[::2] for task in batch}
    assert list(_batches(source, {}, done, 8)) == batches[1::2]


def test_workers_share_devices_and_are_no_more_than_batches() -> None:
    assert _devices("cpu", 3, 10) == ["cpu"] * 3
    assert _devices("cpu", 3, 2) == ["cpu"] * 2
    assert _devices("cuda:1", 2, 9) == ["cuda:1"] * 2
    assert _devices("cpu", None, 0) == []


def test_an_image_that_breaks_the_detector_is_found_by_halving_and_the_others_are_stored(folder: Path, tmp_path: Path) -> None:
    detector = load_detector(folder / "detector.safetensors")
    calls: list[int] = []

    def breaking(batch: list[tuple[Task, Image.Image]]) -> list[RegionRecord]:
        calls.append(len(batch))
        if any(task.image_id == "0006" for task, _ in batch):
            raise torch.OutOfMemoryError("out of memory\nwith details")
        return detector.extract_batch([image for _, image in batch])

    tasks = [Task(f"{number:04d}", f"{number:04d}.jpg", SIZES[0]) for number in (0, 3, 6, 9)]
    with FeatureStoreWriter(tmp_path / "store", detector.schema()) as writer:
        failures = store_batch([(task, decoded(folder / "images", task)) for task in tasks], breaking, writer)
    assert failures == [Failure("0006", "0006.jpg", "out of memory")]
    assert stored_ids(tmp_path / "store") == {"0000", "0003", "0009"}
    assert calls == [4, 2, 2, 1, 1]


def test_boxes_of_an_image_decoded_smaller_are_in_its_own_pixels(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (6000, 3000), (200, 30, 30)).save(tmp_path / "large.jpg")
    task = Task("large", "large.jpg", (6000, 3000))
    picture = decoded(tmp_path, task)
    assert isinstance(picture, Image.Image)
    assert picture.size == (3000, 1500)
    detector = load_detector(folder / "detector.safetensors")
    with FeatureStoreWriter(tmp_path / "store", detector.schema()) as writer:
        assert store_batch([(task, picture)], extractor(detector, {}), writer) == []
    record, small = FeatureStore(tmp_path / "store", allow_partial=True)["large"], detector.extract(picture)
    assert (record.width, record.height) == (6000, 3000)
    np.testing.assert_allclose(record.boxes, small.boxes * 2, rtol=1e-5)


def test_batching_changes_no_region(folder: Path) -> None:
    """Sizes mixed in one batch are told apart by the worker, so that nothing is padded to another image's size."""
    detector, source = load_detector(folder / "detector.safetensors"), list_images(folder / "images")
    extract_all = extractor(detector, {"min_boxes": 3, "max_boxes": 9})
    batch = [
        (task, picture)
        for task in (Task(item.image_id, item.path, None) for item in source.items[:12])
        if isinstance(picture := decoded(source.root, task), Image.Image)
    ]
    for size in SIZES:
        part = [(task, picture) for task, picture in batch if picture.size == size]
        assert len(part) == 4
        for (_, picture), record in zip(part, extract_all(part), strict=True):
            alone = detector.extract(picture, min_boxes=3, max_boxes=9)
            np.testing.assert_allclose(record.boxes, alone.boxes, atol=1e-3)
            np.testing.assert_allclose(record.features.astype(np.float32), alone.features.astype(np.float32), rtol=2e-3, atol=1e-3)
            np.testing.assert_allclose(record.class_probs, alone.class_probs, atol=1e-4)


def test_a_batch_of_several_sizes_is_split_before_the_detector_sees_it(folder: Path, tmp_path: Path) -> None:
    detector, seen = load_detector(folder / "detector.safetensors"), []

    def watching(batch: list[tuple[Task, Image.Image]]) -> list[RegionRecord]:
        seen.append({image.size for _, image in batch})
        return detector.extract_batch([image for _, image in batch])

    tasks = [Task(f"{number:04d}", f"{number:04d}.jpg", None) for number in range(6)]
    with FeatureStoreWriter(tmp_path / "store", detector.schema()) as writer:
        assert store_batch([(task, decoded(folder / "images", task)) for task in tasks], watching, writer) == []
    assert seen == [{size} for size in SIZES]
    assert len(stored_ids(tmp_path / "store")) == 6


def test_large_images_make_small_batches(folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        Image.new("1", (5000, 3000)).save(tmp_path / f"{number}.png")
    assert [len(batch) for batch in _batches(list_images(tmp_path), {}, set(), 8)] == [2, 2]


def given(image_id: str, width: int, height: int, boxes: list[list[float]]) -> ImageBoxes:
    return ImageBoxes(image_id, f"{image_id}.jpg", width, height, np.array(boxes, np.float32).reshape(-1, 4), ["x"] * len(boxes))


def test_given_boxes_take_the_place_of_proposals_in_their_order(folder: Path, tmp_path: Path) -> None:
    detector = load_detector(folder / "detector.safetensors")
    boxes = [[32, 0, 96, 128], [0, 0, 128, 128], [10, 20, 50, 60]]  # drawn in a frame of twice the size
    tasks = [
        Task("0000", "0000.jpg", SIZES[0], given=given("0000", 128, 128, boxes)),
        Task("0003", "0003.jpg", SIZES[0], given=given("0003", 64, 64, [])),
        Task("0006", "0006.jpg", SIZES[0], given=given("0006", 64, 40, [[0, 0, 9, 9]])),
    ]
    with FeatureStoreWriter(tmp_path / "store", detector.schema()) as writer:
        failures = store_batch([(task, decoded(folder / "images", task)) for task in tasks], extractor(detector, {}), writer)
    assert failures == [Failure("0006", "0006.jpg", "its boxes were drawn in 64 x 40, but the image is 64 x 64, of another aspect")]
    store = FeatureStore(tmp_path / "store", allow_partial=True)
    record = store["0000"]
    np.testing.assert_array_equal(record.boxes, np.array(boxes, np.float32) / 2)
    alone = detector.extract_at([Image.open(folder / "images" / "0000.jpg").convert("RGB")], [record.boxes[::-1].copy()])[0]
    np.testing.assert_allclose(record.features.astype(np.float32), alone.features[::-1].astype(np.float32), rtol=2e-3, atol=1e-3)
    assert np.abs(np.diff(record.features.astype(np.float32), axis=0)).max() > 1e-3
    np.testing.assert_array_equal(store["0003"].boxes, [[0, 0, 64, 64]])


def test_given_boxes_name_the_images_and_every_image_must_be_there(folder: Path, tmp_path: Path) -> None:
    rows = [given("0000", 64, 64, [[0, 0, 9, 9]]), given("0001", 96, 64, [])]
    write_boxes(tmp_path / "boxes.parquet", rows)
    source, found = _source(folder / "images", None, tmp_path / "boxes.parquet")
    assert [item.image_id for item in source.items] == list(found) == ["0000", "0001"]
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for name in ("0000.jpg", "0002.jpg"):
            archive.add(folder / "images" / name, name)
    with pytest.raises(UsageError, match=r"1 of 2 images of .*boxes\.parquet are not in .*images\.tar, first '0001'"):
        _source(tmp_path / "images.tar", None, tmp_path / "boxes.parquet")
    write_boxes(tmp_path / "boxes.parquet", rows[:1])
    source, _ = _source(tmp_path / "images.tar", None, tmp_path / "boxes.parquet")
    assert [item.image_id for item in source.items] == ["0000"]
    with pytest.raises(UsageError, match="leave the manifest"):
        _source(folder / "images", tmp_path / "pairs.parquet", tmp_path / "boxes.parquet")


def test_a_store_on_nfs_is_refused_unless_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("preprocessing.extraction.extract.network_filesystem", lambda path: "nfs4")
    with pytest.raises(UsageError, match=r"is on a network disk \(nfs4\).*rsync.*--network-disk"):
        _check_disk(tmp_path / "store", network_disk=False)
    _check_disk(tmp_path / "store", network_disk=True)


@pytest.mark.slow  # two more runs
def test_tar_files_tables_and_boxes_are_extracted_like_a_folder(folder: Path, finished: Extraction, tmp_path: Path) -> None:
    """From a tar file that lists the images in another order, at half precision and at given boxes: each store by its own settings."""
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for number in range(9):
            archive.add(folder / "images" / f"{number:04d}.jpg", f"{number:04d}.jpg")
    write_boxes(tmp_path / "boxes.parquet", [given("0000", 64, 64, [[0, 0, 9, 9], [5, 5, 60, 60]])])
    run = {"weights": folder / "detector.safetensors", "workers": 1, "min_boxes": 3, "max_boxes": 9}
    assert extract(tmp_path / "images.tar", tmp_path / "a", precision="fp32", **run).stored == 9
    whole, tar = FeatureStore(folder / "whole"), FeatureStore(tmp_path / "a")
    for image_id in tar.ids:
        np.testing.assert_allclose(tar[image_id].boxes, whole[image_id].boxes, atol=1e-3)
    assert extract(tmp_path / "images.tar", tmp_path / "b", boxes=tmp_path / "boxes.parquet", precision="bf16", **run).stored == 1
    store = FeatureStore(tmp_path / "b")
    assert store["0000"].boxes.tolist() == [[0, 0, 9, 9], [5, 5, 60, 60]]
    assert store.schema.settings["precision"] == "bf16"
    write_boxes(tmp_path / "boxes.parquet", [given("0000", 64, 64, [[0, 0, 9, 8], [5, 5, 60, 60]])])
    with pytest.raises(UsageError, match="boxes is"):
        extract(tmp_path / "images.tar", tmp_path / "b", boxes=tmp_path / "boxes.parquet", precision="bf16", **run)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_size": -5}, "min_size -5 is too small"),
        ({"min_size": 96, "max_size": 64}, "min_size 96"),
        ({"device": "gpu"}, "--device gpu"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, given: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        extract(folder / "images", tmp_path / "store", folder / "detector.safetensors", **given)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


def test_one_bad_file_of_a_few_is_listed_and_no_reason_to_stop(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    write_images(tmp_path / "images", 5)
    (tmp_path / "images" / "0003.jpg").write_text("no image")
    done = extract(tmp_path / "images", tmp_path / "store", folder / "detector.safetensors", workers=1, min_boxes=3, max_boxes=9)
    assert (done.stored, done.failed) == (4, 1)
    (tmp_path / "images" / "0004.jpg").write_text("no image either")
    with pytest.raises(TooManyBadInputsError, match=r"2 of 5 images failed \(most often: not JPEG, .*\), listed in .*--max-bad"):
        extract(tmp_path / "images", tmp_path / "other", folder / "detector.safetensors", workers=1, min_boxes=3, max_boxes=9)

    # Taken up with a larger limit there is nothing to do but to seal it; what failed is told each time.
    for state in ("sealed", "complete before"):
        capsys.readouterr()
        extract(
            tmp_path / "images", tmp_path / "other", folder / "detector.safetensors",
            workers=1, min_boxes=3, max_boxes=9, max_bad=0.5,
        )  # fmt: skip
        assert f"regions of 3 images (2 failed and stand in failed.tsv), {state}, digest" in capsys.readouterr().out


def test_ids_by_a_pattern_are_those_of_the_same_records_also_after_a_stop(
    folder: Path, finished: Extraction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the store remembers the pattern, so that it is not gone on with under another."""
    options = {"min_boxes": 3, "max_boxes": 9, "workers": 1, "precision": "fp32"}
    files = (folder / "images", tmp_path / "store", folder / "detector.safetensors")

    def part(source: ImageList, *rest: Any) -> Iterator[list[Task]]:
        for count, batch in enumerate(_batches(source, *rest)):
            if count == 3:
                raise StoppedEarly("enough")
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr("preprocessing.extraction.extract._batches", part)
        with pytest.raises(StoppedEarly):
            extract(*files, **options, ids="photo-{id}")
    kept = stored_ids(tmp_path / "store")
    assert 0 < len(kept) < IMAGES
    assert kept <= {f"photo-{n:04d}" for n in range(IMAGES)}
    for other in (None, "{id}"):
        with pytest.raises(UsageError, match=r"was written with other settings: there .*ids"):
            extract(*files, **options, ids=other)
    done = extract(*files, **options, ids="photo-{id}")
    assert (tmp_path / "store" / "failed.tsv").read_text().splitlines()[1].startswith("photo-page\tpage.jpg\t")
    plain = FeatureStore(folder / "whole")
    with FeatureStoreWriter(tmp_path / "renamed", plain.schema) as writer:
        writer.add_all([(f"photo-{image_id}", plain[image_id]) for image_id in plain.ids])
    assert done.digest == seal_store(tmp_path / "renamed") != finished.digest


def test_given_boxes_find_their_image_under_a_pattern(folder: Path, tmp_path: Path) -> None:
    box = np.array([[8, 8, 40, 40]], np.float32)
    write_boxes(tmp_path / "boxes.parquet", [ImageBoxes(f"b/{n:04d}", f"{n:04d}.jpg", *SIZES[n % 3], box + n, ["red"]) for n in range(4)])
    extract(
        folder / "images", tmp_path / "store", folder / "detector.safetensors", boxes=tmp_path / "boxes.parquet", workers=1, ids="{number}"
    )
    store = FeatureStore(tmp_path / "store")
    assert list(store.ids) == ["0", "1", "2", "3"]
    for n in range(4):
        np.testing.assert_allclose(store[f"{n}"].boxes, box + n, atol=0.01)


def test_two_images_of_one_id_end_an_extraction_before_it_begins(folder: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "a", 2)
    write_images(tmp_path / "images" / "b", 1)
    with pytest.raises(UsageError, match=r"'a/0000.jpg' and 'b/0000.jpg' would both have the image id '0000'"):
        extract(tmp_path / "images", tmp_path / "store", folder / "detector.safetensors", ids="{stem}")
    assert not (tmp_path / "store").exists()
