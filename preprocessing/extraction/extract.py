"""`megainter extract`: image files in, a sealed feature store out. Resumable, on all cores or GPUs, with a list of what failed and why.

This process reads image headers, hands out batches of equally sized images and watches the workers (`crew`, `worker`): child
processes, or the other ranks of an MPI job (`mpi`).
A batch is what a detector sees in one pass. It depends only on the list of images, never on which worker takes it or on earlier
interruptions, and is stored whole or not at all; so a run that was killed and taken up again ends with the same store, to the digest, as
one that was not.
"""

import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from megainter.data.feature_store.lock import LOOSE, WriterLock, network_filesystem
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.data.feature_store.shard import read_store_json, refuse_live_writers
from megainter.data.feature_store.variety import hardly_varied
from megainter.data.feature_store.writer import create_store, forget, is_sealed, seal_store, stored_ids
from megainter.data.tables.boxes import ImageBoxes, read_boxes
from megainter.devices import devices_named, torch_device, units_of
from megainter.errors import MegainterError, StoppedEarly, TooManyBadInputsError, UsageError
from megainter.files import sha256_of
from megainter.precision import AskedPrecision, Precision, Units, automatic
from megainter.process import StopRequest
from megainter.progress import Progress
from megainter.tolerance import tolerated
from megainter.weights import Located, as_packaged, locate
from preprocessing.detector.detector import Detector, load_detector
from preprocessing.detector.network import Selection
from preprocessing.extraction.changed import note, seen, states, told
from preprocessing.extraction.crew import Expectation, Worker, end, feed, receive, start_child, with_news
from preprocessing.extraction.worker import Failure, Task, WorkerSetup
from preprocessing.failures import write_failures
from preprocessing.images.decode import DRAFT_PIXELS, UnreadableImageError, confined, image_size, silence_pillow
from preprocessing.images.listing import ImageList, ListedImage, list_images, renamed
from preprocessing.scenes.scenes import SCENE_SIZE

SMALLEST_SIDE = 32  # pixels
WINDOW_BATCHES = 8  # images of one size are looked for among this many batches' worth of neighbours in the list
WORKERS_PER_GPU = 2  # one computes while the other prepares its batch
GLANCE = 20  # images whose size tells whether they are such scenes
BATCH_PIXELS = 32_000_000  # of a batch decoded, 100 MB; a worker holds three


@dataclass(frozen=True)
class Extraction:
    """What a finished run says: images in the store, images that failed, and the store's digest."""

    stored: int
    failed: int
    digest: str


def extract(
    images: Path,
    output: Path,
    weights: Path,
    *,
    manifest: Path | None = None,
    min_boxes: int = 10,
    max_boxes: int = 100,
    selection: Selection | None = None,
    min_size: int | None = None,
    max_size: int | None = None,
    workers: int | None = None,
    batch_size: int = 8,
    max_bad: float = 0.01,
    device: str | None = None,
    precision: AskedPrecision = "auto",
    boxes: Path | None = None,
    ids: str | None = None,
    network_disk: bool = False,
    redo_changed: bool = False,
    ranks: Sequence[Worker] = (),
    elsewhere: Sequence[Units] = (),
) -> Extraction:
    """Extract the regions of ``images`` (`preprocessing.images.listing.list_images`) into the feature store ``output``, and seal it.

    The same command goes on where an earlier run stopped. ``workers`` processes (default: one per core, two per GPU), each with its own
    detector on ``device`` (default: the GPUs where there are any), and ``ranks`` beside them, whose devices are ``elsewhere``. ``boxes``,
    a manifest, gives the regions of the images that it names; then nothing is proposed or selected. ``ids``: how an image's id is made of
    the usual one (``image_ids.renamer``), which the store remembers. ``precision`` "auto" is what the store
    was begun in, in a new one the best that all devices compute. ``weights`` may be a name (``weights.locate``), which with its digest
    stands in ``output``/origin.json. Images that fail are listed in ``output``/failed.tsv. Images whose files changed since they were
    extracted are told of, and with ``redo_changed`` extracted anew.

    Raises ``UsageError`` (missing or empty folder, other settings or detector than the store's, a store on a network disk that was not
    asked for by ``network_disk``), ``TooManyBadInputsError`` where more than ``max_bad`` of the images failed (the good ones are kept,
    the store stays unsealed), ``StoppedEarly`` on SIGTERM or SIGINT, ``NoSpaceError``, ``LockedError``, ``DamagedError``, and
    ``MegainterError`` where a worker died.
    """
    _check_settings(min_boxes, max_boxes, selection, workers, batch_size, max_bad)
    _check_sizes(min_size, max_size)
    if device is not None:
        torch_device(device)
    _check_disk(output, network_disk)
    silence_pillow()
    source, given = _source(images, manifest, boxes, ids)
    arithmetic = precision if precision != "auto" else _automatic(output, device, elsewhere)
    found = as_packaged(locate(weights, "detector", "--weights"))
    _warn_of_glyphs(found, source)
    if found.told:
        print(found.told, flush=True)
    detector = load_detector(found.path, "cpu")
    options: dict[str, Any] = {"min_size": min_size, "max_size": max_size}
    options |= {} if boxes else {"min_boxes": min_boxes, "max_boxes": max_boxes, "selection": selection or detector.network.selection}
    settings = options | ({"boxes": sha256_of(boxes)[:16]} if boxes else {}) | ({"precision": arithmetic} if arithmetic != "fp32" else {})
    settings |= {"ids": ids} if ids is not None else {}
    schema = replace(detector.schema(), settings=settings)
    create_store(output, schema)
    with WriterLock(output / "extract.lock"):
        refuse_live_writers(output)
        found.record(output)
        done, before, now = stored_ids(output), seen(output), states(source)
        if changed := [image_id for image_id in done & now.keys() if before.get(image_id, now[image_id]) != now[image_id]]:
            if redo_changed:
                forget(output, changed)
                done -= set(changed)
                before = {image_id: state for image_id, state in before.items() if image_id not in set(changed)}
            else:
                print(told(changed), file=sys.stderr, flush=True)
        total = len(source.items)
        left = sum(item.image_id not in done for item in source.items)
        batch_size = _images_per_pass(detector, device, batch_size)
        devices = _devices(device, workers, -(-left // batch_size))
        devices += [device or "cuda"] * min(len(ranks), max(0, -(-left // batch_size) - 1))
        jobs = [
            WorkerSetup(n, source.root, output, schema, found.again, name, arithmetic, options, os.getpid())
            for n, name in enumerate(devices)
        ]
        failures: list[Failure] = []
        try:
            if jobs:
                _run(jobs, ranks, _batches(source, given, done, batch_size), total, total - left, failures)
        except BaseException:
            with suppress(OSError, MegainterError):  # a full disk must not hide the first error
                _list_failures(output, failures)
                note(output, before, now, stored_ids(output))
            raise
        _list_failures(output, failures)
        note(output, before, now, stored_ids(output))
        return _finish(output, schema, total, failures, max_bad, changed=left > len(failures))


def _automatic(output: Path, device: str | None, elsewhere: Sequence[Units]) -> Precision:
    """What ``precision`` "auto" stands for, said. A store that is there goes on in its own, even slowly: its records are alike."""
    units = [*map(units_of, devices_named(device)), *elsewhere]
    there = (output / "store.json").is_file()
    begun = StoreSchema.from_json(read_store_json(output)["schema"]).settings.get("precision", "fp32") if there else None
    precision, why = automatic(units, begun=begun)
    if begun is not None and begun != precision:
        precision, why = begun, f"precision {begun} (auto), as {output} was begun in; {precision} would be faster here, in another store"
    print(why, flush=True)
    return precision


def _source(
    images: Path, manifest: Path | None, boxes: Path | None, ids: str | None = None
) -> tuple[ImageList, dict[str, ImageBoxes]]:  # fmt: skip
    """The images under the ids that the pattern ``ids`` makes of the usual ones, and the boxes given for them by these ids."""
    source, given = _usual_source(images, manifest, boxes)
    if ids is None:
        return source, given
    new = renamed(source, ids)
    return new, {item.image_id: given[old.image_id] for old, item in zip(source.items, new.items, strict=True)} if given else {}


def _usual_source(images: Path, manifest: Path | None, boxes: Path | None) -> tuple[ImageList, dict[str, ImageBoxes]]:
    """The images, and the boxes given for them by image id: those of a folder are the ones that the boxes name."""
    if boxes is None:
        return list_images(images, manifest), {}
    if manifest is not None:
        raise UsageError(f"boxes {boxes} already say which images to take; leave the manifest {manifest} out")
    given = {image.image_id: image for image in read_boxes(boxes)}
    if images.is_dir() and not any(images.glob("*.tar")):
        return list_images(images, boxes), given
    source = list_images(images)
    items = [item for item in source.items if item.image_id in given]
    if len(items) < len(given):
        absent = min(given.keys() - {item.image_id for item in items})
        raise UsageError(f"{len(given) - len(items):,} of {len(given):,} images of {boxes} are not in {images}, first {absent!r}")
    return ImageList(source.root, items), given


def _check_disk(output: Path, network_disk: bool) -> None:
    kind = network_filesystem(output)
    if kind in LOOSE and not network_disk:
        raise UsageError(
            f"{output} is on a network disk ({kind}), where a crash can damage what is being written: extract to a local disk and "
            f"copy the finished store (rsync -a LOCAL_STORE/ {output}/), or allow it with --network-disk"
        )
    if kind:
        print(f"warning: {output} is on a network disk ({kind}); its writers are told apart by heartbeat", file=sys.stderr, flush=True)


def _check_settings(min_boxes: int, max_boxes: int, selection: str | None, workers: int | None, batch_size: int, max_bad: float) -> None:
    if not 0 < min_boxes <= max_boxes:
        raise UsageError(f"min_boxes {min_boxes} must be positive and at most max_boxes {max_boxes}")
    if selection is not None and selection not in get_args(Selection):
        raise UsageError(f"selection {selection!r} is not one of {', '.join(get_args(Selection))}")
    if (workers is not None and workers < 1) or batch_size < 1 or not 0 <= max_bad <= 1:
        raise UsageError(f"workers {workers} and batch_size {batch_size} must be at least 1, max_bad {max_bad} between 0 and 1")


def _check_sizes(min_size: int | None, max_size: int | None) -> None:
    """Sizes in pixels of the network's input; what is smaller than its coarsest stride shows it nothing."""
    for name, size in (("min_size", min_size), ("max_size", max_size)):
        if size is not None and size < SMALLEST_SIDE:
            raise UsageError(f"{name} {size} is too small: images are brought to at least {SMALLEST_SIDE} pixels a side")
    if min_size is not None and max_size is not None and min_size > max_size:
        raise UsageError(f"min_size {min_size} must be at most max_size {max_size}")


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


def _warn_of_glyphs(found: Located, source: ImageList) -> None:
    """Photos have other sizes than the demo's scenes, whose detector sees nothing else."""
    if found.name != "demo" or all(_size(source.root, item) == (SCENE_SIZE, SCENE_SIZE) for item in source.items[:GLANCE]):
        return
    print(
        "WARNING: the detector demo knows the glyphs of the demo's scenes and nothing else; what it says of photos is noise: give "
        "--weights photos, or a detector of your own",
        file=sys.stderr,
        flush=True,
    )


def _images_per_pass(detector: Detector, device: str | None, asked: int) -> int:
    """Of a GPU as many as were asked for; on a CPU fewer, for what is in work at a stop is lost."""
    on_cpu = all(each.type == "cpu" for each in devices_named(device))
    return min(asked, detector.at_once_on_a_cpu) if on_cpu else asked


def _batches(source: ImageList, given: dict[str, ImageBoxes], done: set[str], batch_size: int) -> Iterator[list[Task]]:
    """Batches of equally sized images, without what is done. Where batches begin does not depend on what is done."""
    window = WINDOW_BATCHES * batch_size
    for start in range(0, len(source.items), window):
        part = source.items[start : start + window]
        if all(item.image_id in done for item in part):
            continue
        by_size: dict[tuple[int, int] | None, list[Task]] = defaultdict(list)
        for item in part:
            size = _size(source.root, item)
            by_size[size].append(Task(item.image_id, item.path, size, item.part, given.get(item.image_id)))
        for size, tasks in by_size.items():
            step = batch_size if size is None else max(1, min(batch_size, BATCH_PIXELS // min(size[0] * size[1], DRAFT_PIXELS)))
            for first in range(0, len(tasks), step):
                if batch := [task for task in tasks[first : first + step] if task.image_id not in done]:
                    yield batch


def _size(root: Path, item: ListedImage) -> tuple[int, int] | None:
    try:
        return image_size(confined(root, item.path), item.part)
    except UnreadableImageError:
        return None  # the worker finds out why


def _run(
    jobs: list[WorkerSetup], ranks: Sequence[Worker], batches: Iterator[list[Task]], total: int, done: int, failures: list[Failure]
) -> None:
    """Have all batches extracted; images that failed are added to ``failures`` as they become known."""
    workers: list[Worker] = []
    helpers = list(ranks)[: len(jobs) - 1]
    with StopRequest((signal.SIGINT, signal.SIGTERM)) as stop, Progress("extract", total, "images", done=done) as progress:
        try:
            for rank, job in zip(helpers, jobs[len(jobs) - len(helpers) :], strict=True):
                rank.link.send(job)
                workers.append(rank)
            for job in jobs[: len(jobs) - len(helpers)]:
                workers.append(start_child(job))
            expectation = Expectation(total - done, workers)
            print(f"extract: {total - done:,} of {total:,} images to do; loading the detector in {expectation.crew}", flush=True)
            while not all(worker.closed for worker in workers):
                for worker in workers:
                    feed(worker, batches)
                for worker in with_news(workers):
                    done += receive(worker, failures, progress, expectation)
                if stop.asked:
                    raise StoppedEarly(f"stopped at {done:,} of {total:,} images; run the same command to go on")
        finally:
            end(workers)


def _list_failures(output: Path, failures: list[Failure]) -> None:
    """``failed.tsv``: id, path, reason."""
    rows = sorted((failure.image_id, failure.path, failure.reason) for failure in failures)
    write_failures(output / "failed.tsv", ("image_id", "path", "reason"), rows)


def _why(failures: Sequence[Failure]) -> str:
    """The reason that most failures have, or the first one where each has its own; "" without any."""
    if not failures:
        return ""
    [(reason, times)] = Counter(failure.reason for failure in failures).most_common(1)
    word = "" if len(failures) == 1 else "most often: " if times > 1 else "first: "
    return f" ({word}{reason:.200})"


def _finish(output: Path, schema: StoreSchema, total: int, failures: list[Failure], max_bad: float, changed: bool) -> Extraction:
    """Seal, unless too many failed."""
    why = _why(failures)
    listed = f"{len(failures):,} of {total:,} images failed{why}, listed in {output / 'failed.tsv'}"
    if len(failures) > tolerated(max_bad, total):
        remedy = "install that" if "pip install" in why else "repair them"
        raise TooManyBadInputsError(
            f"{listed}: more than --max-bad {max_bad:g} of them; the others are kept: {remedy}, or allow more, and run again"
        )
    if failures:
        print(listed, flush=True)
    before = is_sealed(output) and not changed
    if not before:
        seal_store(output)
    with FeatureStore(output) as store:
        if alike := hardly_varied(store):
            print(f"warning: {alike}", file=sys.stderr, flush=True)
        state = "complete before" if before else "sealed"
        others = f" ({len(failures):,} failed and stand in failed.tsv)" if failures else ""
        print(f"{output}: regions of {len(store):,} images{others}, {state}, digest {store.digest[:16]}", flush=True)
        return Extraction(len(store), len(failures), store.digest)
