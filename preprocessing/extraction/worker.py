"""One process of an extraction: it receives batches of images over a link, runs its own detector on them and fills its own shard.

The link is a pipe to the parent process or an MPI rank's link to rank 0.
"""

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from megainter.data.feature_store.record import RegionRecord, StoreSchema, check_record
from megainter.data.feature_store.writer import FeatureStoreWriter
from megainter.data.tables.boxes import ImageBoxes
from megainter.errors import MegainterError, UsageError
from megainter.precision import Precision
from megainter.process import end_with_parent
from preprocessing.detector.detector import Detector, load_detector
from preprocessing.images.decode import Part, UnreadableImageError, confined, load_image, silence_pillow

FRAME_TOLERANCE = 0.02  # relative difference in aspect between an image and the frame in which its boxes were drawn
STOP = "stop"  # sent instead of a batch: keep what is finished and end


@dataclass(frozen=True)
class Task:
    """One image to extract: all of the file ``path`` or the ``part`` of it.

    ``size`` (width, height) from its header, None where that could not be read; ``given`` boxes replace the detector's proposals.
    """

    image_id: str
    path: str
    size: tuple[int, int] | None
    part: Part | None = None
    given: ImageBoxes | None = None


@dataclass(frozen=True)
class Failure:
    """An image that gave no regions, and why."""

    image_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to know. ``options`` are keyword arguments of ``Detector.extract_batch``, or of ``extract_at`` for given boxes.

    ``parent`` is the process with which the worker ends.
    """

    number: int
    images: Path
    store: Path
    schema: StoreSchema
    weights: Path
    device: str
    precision: Precision
    options: dict[str, Any]
    parent: int


class Link(Protocol):
    """What a ``multiprocessing`` connection and an MPI link have in common; ``recv`` raises EOFError where the other side is gone.

    Messages from a worker: ("done", images, [Failure], seconds of work) per batch, ("closed",) at the end, ("stopped",) on request,
    ("alive",) now and then, or ("error", MegainterError), ("crash", traceback). To a worker: a batch, None for no more, or ``STOP``.
    """

    def send(self, message: Any, /) -> None: ...
    def recv(self) -> Any: ...
    def poll(self) -> bool: ...
    def close(self) -> None: ...


Decoded = list[tuple[Task, Image.Image | Failure]]
Readable = list[tuple[Task, Image.Image]]
ExtractBatch = Callable[[Readable], list[RegionRecord]]


class _Terminated(Exception):
    """SIGTERM or ``STOP``: keep what is finished and end."""


def work(link: Link, job: WorkerSetup) -> None:
    """The worker's whole life; the shard's writer commits what is finished however it ends, SIGKILL apart."""
    end_with_parent(job.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _terminate)
    silence_pillow()
    torch.set_num_threads(1)
    try:
        message = _work(link, job)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except _Terminated:  # after the shard was closed
        message = ("stopped",)
    with suppress(BrokenPipeError):  # the parent is gone; nobody is left to tell
        link.send(message)


def _work(link: Link, job: WorkerSetup) -> tuple[Any, ...]:
    """Extract until there is no more; returns the last message."""
    try:
        with FeatureStoreWriter(job.store, job.schema, f"shard-{job.number:05d}") as writer:
            extract = extractor(load_detector(job.weights, job.device, job.precision), job.options)
            for batch in _decoded_batches(link, job.images):
                start = time.monotonic()
                failures = store_batch(batch, extract, writer)
                seconds = time.monotonic() - start
                if seconds > writer.batch_seconds:
                    writer.commit()  # what took so long is not to be lost by a kill
                link.send(("done", len(batch), failures, seconds))
        return ("closed",)
    except (_Terminated, BrokenPipeError):
        return ("stopped",)
    except MegainterError as error:
        return ("error", error)
    except Exception:
        return ("crash", traceback.format_exc())


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _decoded_batches(link: Link, images: Path) -> Iterator[Decoded]:
    """Batches as they are sent, decoded one ahead in a thread; ends with the None that the parent sends, or with the parent."""
    ready: queue.Queue[Decoded | None] = queue.Queue(maxsize=1)

    def decode() -> None:
        with suppress(EOFError, OSError):
            while (tasks := link.recv()) is not None:
                if tasks == STOP:
                    os.kill(os.getpid(), signal.SIGTERM)  # the main thread is at work or waits for the next batch
                    return
                ready.put([(task, decoded(images, task)) for task in tasks])
        ready.put(None)

    threading.Thread(target=decode, daemon=True).start()
    while (batch := ready.get()) is not None:
        yield batch


def decoded(images: Path, task: Task) -> Image.Image | Failure:
    """The picture of a task, or why there is none."""
    try:
        return load_image(confined(images, task.path), draft=True, part=task.part)
    except UnreadableImageError as error:
        return Failure(task.image_id, task.path, error.reason)


def extractor(detector: Detector, options: dict[str, Any]) -> ExtractBatch:
    """Regions of pictures, at their tasks' boxes where they have some, else at the detector's proposals."""

    def extract(batch: Readable) -> list[RegionRecord]:
        images = [image for _, image in batch]
        if batch[0][0].given is None:
            return detector.extract_batch(images, **options)
        return detector.extract_at(images, [_given_boxes(task, image) for task, image in batch], **options)

    return extract


def _given_boxes(task: Task, image: Image.Image) -> np.ndarray:
    """A task's boxes, float32 [n, 4] xyxy, in the pixels of the picture; the whole picture where it has none."""
    frame = task.given
    assert frame is not None
    scale = np.array([image.width / frame.width, image.height / frame.height] * 2, np.float32)
    if abs(scale[0] / scale[1] - 1) > FRAME_TOLERANCE + 1 / min(frame.width, frame.height, image.width, image.height):
        width, height = task.size or image.size
        raise UsageError(f"its boxes were drawn in {frame.width} x {frame.height}, but the image is {width} x {height}, of another aspect")
    if not len(frame.boxes):
        return np.array([[0, 0, image.width, image.height]], np.float32)
    return frame.boxes * scale


def store_batch(batch: Decoded, extract: ExtractBatch, writer: FeatureStoreWriter) -> list[Failure]:
    """Extract and store a batch in one transaction; returns the images that failed."""
    failures = [image for _, image in batch if isinstance(image, Failure)]
    by_size: dict[tuple[int, int], Readable] = {}
    for task, image in batch:
        if not isinstance(image, Failure):
            by_size.setdefault(image.size, []).append((task, image))
    writer.add_all([pair for part in by_size.values() for pair in _records(part, extract, writer.schema, failures)])
    return failures


def _records(batch: Readable, extract: ExtractBatch, schema: StoreSchema, failures: list[Failure]) -> list[tuple[str, RegionRecord]]:
    """Records of a batch. A batch that fails (memory of the device, an odd image) is halved until the one image at fault is known."""
    try:
        pairs = [(task.image_id, in_file_pixels(record, task)) for (task, _), record in zip(batch, extract(batch), strict=True)]
        for image_id, record in pairs:
            check_record(image_id, record, schema)
        return pairs
    except (RuntimeError, ValueError, UsageError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(batch) == 1:
            task = batch[0][0]
            failures.append(Failure(task.image_id, task.path, str(error).splitlines()[0] if str(error) else type(error).__name__))
            return []
    half = len(batch) // 2
    return _records(batch[:half], extract, schema, failures) + _records(batch[half:], extract, schema, failures)


def in_file_pixels(record: RegionRecord, task: Task) -> RegionRecord:
    """Boxes in the pixels of the file, also where a large JPEG was decoded smaller."""
    if task.size is None or task.size == (record.width, record.height):
        return record
    width, height = task.size
    scale = np.array([width / record.width, height / record.height] * 2, np.float32)
    return replace(record, boxes=record.boxes * scale, width=width, height=height)
