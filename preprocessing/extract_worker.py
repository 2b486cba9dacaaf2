"""One process of an extraction: it receives batches of images over a pipe, runs its own detector on them and fills its own shard."""

import ctypes
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megainter.data.feature_store import FeatureStoreWriter, RegionRecord, StoreSchema
from megainter.data.record import check_record
from megainter.errors import MegainterError, UsageError
from preprocessing.detector import load_detector
from preprocessing.images import UnreadableImageError, confined, load_image, silence_pillow

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Task:
    """One image to extract; ``size`` (width, height) from its header, None where that could not be read."""

    image_id: str
    path: str
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Failure:
    """An image that gave no regions, and why."""

    image_id: str
    path: str
    reason: str


@dataclass(frozen=True)
class Job:
    """What a worker needs to know. ``options`` are keyword arguments of ``Detector.extract_batch``."""

    number: int
    images: Path
    store: Path
    schema: StoreSchema
    weights: Path
    device: str
    options: dict[str, Any]
    parent: int


# Messages to the parent: ("done", images, [Failure]) per batch, ("closed",) at the end, or ("error", MegainterError), ("crash", traceback).
Decoded = list[tuple[Task, Image.Image | Failure]]
ExtractBatch = Callable[[list[Image.Image]], list[RegionRecord]]


class _Terminated(Exception):
    """SIGTERM from the parent: keep what is finished and end."""


def work(connection: Connection, job: Job) -> None:
    """The worker's whole life; the shard's writer commits what is finished however it ends, SIGKILL apart."""
    _end_with_parent(job.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _terminate)
    silence_pillow()
    torch.set_num_threads(1)
    try:
        with FeatureStoreWriter(job.store, job.schema, f"shard-{job.number:05d}") as writer:
            detector = load_detector(job.weights, job.device)
            for batch in _decoded_batches(connection, job.images):
                failures = _store_batch(batch, lambda images: detector.extract_batch(images, **job.options), writer)
                connection.send(("done", len(batch), failures))
        connection.send(("closed",))
    except _Terminated:
        pass
    except MegainterError as error:
        connection.send(("error", error))
    except BrokenPipeError:
        pass  # the parent is gone; nobody is left to tell
    except Exception:
        connection.send(("crash", traceback.format_exc()))


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Terminated


def _end_with_parent(parent: int) -> None:
    """Where the parent is killed, its shards must be free at once for the run that goes on; transactions make SIGKILL harmless."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _decoded_batches(connection: Connection, images: Path) -> Iterator[Decoded]:
    """Batches as they are sent, decoded one ahead in a thread; ends with the None that the parent sends, or with the parent."""
    ready: queue.Queue[Decoded | None] = queue.Queue(maxsize=1)

    def decode() -> None:
        try:
            while (tasks := connection.recv()) is not None:
                ready.put([(task, _decode(images, task)) for task in tasks])
        except (EOFError, OSError):
            pass
        ready.put(None)

    threading.Thread(target=decode, daemon=True).start()
    while (batch := ready.get()) is not None:
        yield batch


def _decode(images: Path, task: Task) -> Image.Image | Failure:
    try:
        return load_image(confined(images, task.path), draft=True)
    except UnreadableImageError as error:
        return Failure(task.image_id, task.path, error.reason)


def _store_batch(batch: Decoded, extract: ExtractBatch, writer: FeatureStoreWriter) -> list[Failure]:
    """Extract and store a batch in one transaction; returns the images that failed."""
    failures = [image for _, image in batch if isinstance(image, Failure)]
    readable = [(task, image) for task, image in batch if not isinstance(image, Failure)]
    records = _records(readable, extract, writer.schema, failures) if readable else []
    writer.add_all(records)
    return failures


def _records(
    batch: Sequence[tuple[Task, Image.Image]], extract: ExtractBatch, schema: StoreSchema, failures: list[Failure]
) -> list[tuple[str, RegionRecord]]:
    """Records of a batch. A batch that fails (memory of the device, an odd image) is halved until the one image at fault is known."""
    try:
        records = extract([image for _, image in batch])
        pairs = [(task.image_id, _in_file_pixels(record, task)) for (task, _), record in zip(batch, records, strict=True)]
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


def _in_file_pixels(record: RegionRecord, task: Task) -> RegionRecord:
    """Boxes in the pixels of the file, also where a large JPEG was decoded smaller."""
    if task.size is None or task.size == (record.width, record.height):
        return record
    width, height = task.size
    scale = np.array([width / record.width, height / record.height] * 2, np.float32)
    return replace(record, boxes=record.boxes * scale, width=width, height=height)
