"""`megainter extract`: image files in, a sealed feature store out. Resumable, on all cores or GPUs, with a list of what failed and why.

This process reads image headers, hands out batches of equally sized images and watches the workers (`preprocessing.extract_worker`).
A batch depends only on the list of images, never on which worker takes it or on earlier interruptions, and is stored whole or not at
all; so a run that was killed and taken up again ends with the same store, to the digest, as one that was not.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import torch

from megainter.data.feature_store import FeatureStore, StoreSchema, seal_store, stored_ids
from megainter.data.manifest import is_boxes_manifest, read_boxes, read_pairs
from megainter.data.shard import WriterLock, read_store_json, refuse_live_writers
from megainter.data.store_writer import create_store
from megainter.errors import MegainterError, StoppedEarly, TooManyBadInputsError, UsageError
from megainter.files import write_atomically
from megainter.progress import Progress
from preprocessing.detector import load_detector
from preprocessing.extract_worker import Failure, Job, Task, work
from preprocessing.images import UnreadableImageError, confined, find_images, image_size, silence_pillow

WINDOW_BATCHES = 8  # images of one size are looked for among this many batches' worth of neighbours in the list
BATCHES_AHEAD = 2  # per worker: one in work, one being decoded
WORKERS_PER_GPU = 2  # one computes while the other prepares its batch
SECONDS_TO_STOP = 8.0  # then a worker is killed, which costs its open batch
Images = list[tuple[str, str]]  # (image id, path relative to the images folder)


@dataclass(frozen=True)
class Extraction:
    """What a finished run says: images in the store, images that failed, and the store's digest."""

    stored: int
    failed: int
    digest: str


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    batches: int = 0  # sent and not answered
    closed: bool = False
    told_to_end: bool = False


@dataclass
class _Stop:
    """Set by the first SIGINT or SIGTERM; the second one ends the process at once."""

    requested: bool = False


def extract(
    images: Path,
    output: Path,
    weights: Path,
    *,
    manifest: Path | None = None,
    min_boxes: int = 10,
    max_boxes: int = 100,
    selection: Literal["caffe", "d2"] = "caffe",
    min_size: int | None = None,
    max_size: int | None = None,
    workers: int | None = None,
    batch_size: int = 8,
    max_bad: float = 0.01,
    device: str | None = None,
) -> Extraction:
    """Extract the regions of all images below ``images`` (or of those a manifest lists) into the feature store ``output``, and seal it.

    The same command goes on where an earlier run stopped. ``workers`` processes (default: one per core, two per GPU), each with its own
    detector on ``device`` (default: the GPUs where there are any). Images that fail are listed in ``output``/failed.tsv.

    Raises ``UsageError`` (missing or empty folder, other settings or detector than the store's), ``TooManyBadInputsError`` where more
    than ``max_bad`` of the images failed (the good ones are kept, the store stays unsealed), ``StoppedEarly`` on SIGTERM or SIGINT,
    ``NoSpaceError``, ``LockedError``, ``DamagedError``, and ``MegainterError`` where a worker died.
    """
    _check_settings(min_boxes, max_boxes, selection, workers, batch_size, max_bad)
    silence_pillow()
    listing = list_images(images, manifest)
    options = {"min_boxes": min_boxes, "max_boxes": max_boxes, "selection": selection, "min_size": min_size, "max_size": max_size}
    schema = replace(load_detector(weights, "cpu").schema(), settings=options)
    create_store(output, schema)
    with WriterLock(output / "extract.lock"):
        refuse_live_writers(output)
        done = stored_ids(output)
        left = sum(image_id not in done for image_id, _ in listing)
        devices = _devices(device, workers, -(-left // batch_size))
        jobs = [Job(n, images, output, schema, weights, name, options, os.getpid()) for n, name in enumerate(devices)]
        failures: list[Failure] = []
        try:
            if jobs:
                _run(jobs, _batches(images, listing, done, batch_size), len(listing), len(listing) - left, failures)
        except BaseException:
            with suppress(OSError):  # a full disk must not hide the first error
                _list_failures(output, failures)
            raise
        _list_failures(output, failures)
        return _finish(output, schema, len(listing), failures, max_bad, changed=left > len(failures))


def list_images(images: Path, manifest: Path | None = None) -> Images:
    """(image id, relative path) of every image to extract, from the folder or from a manifest of pairs or boxes, sorted by id."""
    if manifest is None:
        return find_images(images)
    if not images.is_dir():
        raise UsageError(f"images folder {images} does not exist or is not a folder")
    if is_boxes_manifest(manifest):
        return sorted((image.image_id, image.image) for image in read_boxes(manifest))
    pairs = read_pairs(manifest)
    columns = pairs.table.select(["image_id", "image"]).group_by(["image_id", "image"]).aggregate([])
    return sorted(zip(columns.column("image_id").to_pylist(), columns.column("image").to_pylist(), strict=True))


def _check_settings(min_boxes: int, max_boxes: int, selection: str, workers: int | None, batch_size: int, max_bad: float) -> None:
    if not 0 < min_boxes <= max_boxes:
        raise UsageError(f"min_boxes {min_boxes} must be positive and at most max_boxes {max_boxes}")
    if selection not in ("caffe", "d2"):
        raise UsageError(f"selection {selection!r} is not 'caffe' or 'd2'")
    if (workers is not None and workers < 1) or batch_size < 1 or not 0 <= max_bad <= 1:
        raise UsageError(f"workers {workers} and batch_size {batch_size} must be at least 1, max_bad {max_bad} between 0 and 1")


def _devices(device: str | None, workers: int | None, batches: int) -> list[str]:
    """The device of each worker."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        names = [device]
        wanted = workers or (len(os.sched_getaffinity(0)) if device == "cpu" else WORKERS_PER_GPU)
    else:
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        wanted = workers or WORKERS_PER_GPU * len(names)
    return [names[number % len(names)] for number in range(min(wanted, batches))]


def _batches(images: Path, listing: Images, done: set[str], batch_size: int) -> Iterator[list[Task]]:
    """Batches of equally sized images, without what is done. Where batches begin does not depend on what is done."""
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(listing), window):
        part = listing[start : start + window]
        if all(image_id in done for image_id, _ in part):
            continue
        by_size: dict[tuple[int, int] | None, list[Task]] = defaultdict(list)
        for image_id, path in part:
            size = _size(images, path)
            by_size[size].append(Task(image_id, path, size))
        for tasks in by_size.values():
            for first in range(0, len(tasks), batch_size):
                if batch := [task for task in tasks[first : first + batch_size] if task.image_id not in done]:
                    yield batch


def _size(images: Path, path: str) -> tuple[int, int] | None:
    try:
        return image_size(confined(images, path))
    except UnreadableImageError:
        return None  # the worker finds out why


def _run(jobs: list[Job], batches: Iterator[list[Task]], total: int, done: int, failures: list[Failure]) -> None:
    """Have all batches extracted; images that failed are added to ``failures`` as they become known."""
    context = multiprocessing.get_context("spawn")
    workers: list[_Worker] = []
    with _stop_on_signals() as stop, Progress("extract", total, "images", done=done) as progress:
        try:
            workers.extend(_start(context, job) for job in jobs)
            while not all(worker.closed for worker in workers):
                for worker in workers:
                    _feed(worker, batches)
                for worker in _with_news(workers):
                    done += _receive(worker, failures, progress)
                if stop.requested:
                    raise StoppedEarly(f"stopped at {done:,} of {total:,} images; run the same command to go on")
        finally:
            _end(workers)


def _start(context: multiprocessing.context.SpawnContext, job: Job) -> _Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, job), daemon=True, name=f"extract-{job.number}")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _feed(worker: _Worker, batches: Iterator[list[Task]]) -> None:
    try:
        while worker.batches < BATCHES_AHEAD and not worker.told_to_end:
            batch = next(batches, None)
            worker.connection.send(batch)
            worker.batches += batch is not None
            worker.told_to_end = batch is None
    except (BrokenPipeError, ConnectionResetError):
        worker.told_to_end = True  # it is dead; _receive says so


def _with_news(workers: list[_Worker]) -> list[_Worker]:
    """Workers that have sent something or ended, waiting half a second at most so that a signal is noticed."""
    by_source = {worker.connection: worker for worker in workers if not worker.closed}
    return [by_source[source] for source in wait(list(by_source), timeout=0.5) if isinstance(source, Connection)]


def _receive(worker: _Worker, failures: list[Failure], progress: Progress) -> int:
    """Take one message; returns the images it finished. Raises what the worker raised."""
    try:
        message = worker.connection.recv()
    except (EOFError, ConnectionResetError):
        raise _death(worker) from None
    match message:
        case ("done", int(count), list(failed)):
            worker.batches -= 1
            failures.extend(failed)
            progress.update(count, f"{len(failures)} failed" if failures else "")
            return count
        case ("closed",):
            worker.closed = True
            return 0
        case ("error", MegainterError() as error):
            raise error
        case _:
            raise RuntimeError(f"an extraction worker failed unexpectedly:\n{message[1]}")


def _death(worker: _Worker) -> MegainterError:
    worker.process.join(5)
    code = worker.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with exit code {code}"
    hint = "often memory ran out: try fewer workers; " if code == -signal.SIGKILL else ""
    return MegainterError(
        f"{worker.process.name} (pid {worker.process.pid}) {how}; {hint}what is stored is kept, run the same command to go on"
    )


def _end(workers: list[_Worker]) -> None:
    """End what still runs: SIGTERM, on which a worker commits what it has finished, then SIGKILL."""
    for worker in workers:
        if not worker.closed and worker.process.is_alive():
            worker.process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may set handlers; whoever runs threads handles signals
        return

    def request(number: int, frame: object) -> None:
        stop.requested = True
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _list_failures(output: Path, failures: list[Failure]) -> None:
    """``failed.tsv``: id, path, reason. Tabs and newlines in names are escaped, bytes that are not UTF-8 too."""
    path = output / "failed.tsv"
    if not failures:
        return path.unlink(missing_ok=True)
    escape = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})
    rows = sorted((failure.image_id, failure.path, failure.reason) for failure in failures)
    lines = ["\t".join(cell.translate(escape) for cell in row) for row in [("image_id", "path", "reason"), *rows]]
    write_atomically(path, ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))


def _finish(output: Path, schema: StoreSchema, total: int, failures: list[Failure], max_bad: float, changed: bool) -> Extraction:
    """Seal, unless too many failed."""
    listed = f"{len(failures):,} of {total:,} images failed, listed in {output / 'failed.tsv'}"
    if len(failures) > max_bad * total:
        raise TooManyBadInputsError(f"{listed}: more than {max_bad:.1%}; the others are kept: repair them, or allow more, and run again")
    if failures:
        print(listed, flush=True)
    if changed or not read_store_json(output)["sealed"]:
        seal_store(output)
    with FeatureStore(output) as store:
        return Extraction(len(store), len(failures), store.digest)
