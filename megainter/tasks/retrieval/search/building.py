"""`megainter index`: the vectors of all images and captions, each computed once; a killed run goes on where it was.

Vectors are collected in a hidden folder beside the index, block by block, and the index appears whole at the end.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.mapped import DESCRIPTION, ArrayWriter, note_facts
from megainter.data.matching import rows_in_store, with_regions
from megainter.data.tables.pairs import PAIRS_SCHEMA, Pairs, read_pairs
from megainter.devices import torch_device
from megainter.errors import UsageError
from megainter.files import remove
from megainter.model.folder import model_digest, read_config
from megainter.progress import Progress
from megainter.tasks.retrieval.prefilter.towers import AT_ONCE
from megainter.tasks.retrieval.search.checks import check_index
from megainter.tasks.retrieval.search.index import DTYPES, KEY, STRINGS, Index, IndexFacts, open_index
from megainter.tasks.retrieval.search.options import IndexOptions
from megainter.tasks.retrieval.search.vectors import FirstStage, first_stage_folder, open_first_stage
from megainter.tasks.scoring.file import ScoreFile, open_score_file
from megainter.tasks.scoring.models import USUAL_LENGTH, check_model, scored_model
from megainter.weights import Located

COPIED_AT_ONCE = 65_536  # rows of vectors from the working file to the index
PLACES = ("images", "weights")  # facts that say where something lies, and change no vector


@dataclass(frozen=True)
class Rows:
    """What is indexed. Images are numbered as the pairs number them; ``order`` int64 [I]: their numbers as their records lie in the store,
    ``captions`` int64 [C]: rows of the pairs' table, image by image."""

    pairs: Pairs
    order: NDArray[np.int64]
    captions: NDArray[np.int64]


def build_index(model: Path, options: IndexOptions) -> Index:
    """Write the index ``options.output`` for a model's folder, or one by name, and open it.

    An index that is there and was made from the same is kept. Raises ``UsageError`` for inputs that do not fit each other and for an output
    that holds something else, ``TooManyBadInputsError`` where more than ``max_bad`` of the images have no regions,
    ``LockedError`` where another process writes the same index, ``NoSpaceError``.
    """
    check_index(model, options)
    found = scored_model(model)
    model, store = found.path, FeatureStore(options.store)
    config = read_config(model)
    vocabulary = check_model(model, config, store, config.max_text_tokens or USUAL_LENGTH, options.other_detector)
    folder = first_stage_folder(model, options.prefilter_model)
    stage = open_first_stage(folder, vocabulary, store, torch_device(options.device), options.other_detector)

    # What is indexed, and from what.
    pairs, missing = _pairs(options, store)
    rows = _rows(pairs, store)
    facts = _facts(found, folder, options, store, pairs, stage, missing)
    if (there := _already(options.output, facts)) is not None:
        print(f"{options.output}: complete before", flush=True)
        return there

    # Vectors block by block, then the folder as a whole.
    chunks = -(-len(rows.order) // AT_ONCE) + -(-len(rows.captions) // AT_ONCE)
    with open_score_file(options.output, _plan(facts, rows), len(rows.order) + len(rows.captions), stage.size, chunks) as file:
        _fill(file, rows, store, stage)
        _publish(options.output, facts, rows, file)
    index = open_index(options.output)
    print(summary(index), flush=True)
    return index


def _pairs(options: IndexOptions, store: FeatureStore) -> tuple[Pairs, int]:
    """The captions whose images have regions, and how many have not; without a table none, of all images."""
    if options.pairs is None:
        return Pairs(PAIRS_SCHEMA.empty_table(), np.zeros(0, np.int32), list(store.ids), ""), 0
    everything = read_pairs(options.pairs, options.split)
    pairs = with_regions(everything, store, options.max_bad, options.pairs, "--max-bad")
    return pairs, len(everything) - len(pairs)


def summary(index: Index) -> str:
    """One line: what is in an index, and its size."""
    size = sum(path.stat().st_size for path in index.path.iterdir())
    facts = index.facts
    left_out = f", {facts.missing:,} captions left out" if facts.missing else ""
    return f"{index.path}: {facts.image_count:,} images, {facts.caption_count:,} captions{left_out}, {size / 1e6:,.1f} MB"


def _rows(pairs: Pairs, store: FeatureStore) -> Rows:
    rank = np.empty(len(store), np.int64)
    rank[store.rows_in_storage_order()] = np.arange(len(store))
    order = np.argsort(rank[rows_in_store(pairs, store)], kind="stable")
    return Rows(pairs, order.astype(np.int64), np.argsort(pairs.image_numbers, kind="stable").astype(np.int64))


def _facts(
    found: Located, prefilter: Path, options: IndexOptions, store: FeatureStore, pairs: Pairs, stage: FirstStage, missing: int
) -> IndexFacts:
    # A model by name is noted by it: the cache may be emptied, and the name finds the same one again.
    model = found.name if found.digests else str(found.path.resolve())
    return IndexFacts(
        model=model,
        model_digest=model_digest(found.path),
        prefilter=model if prefilter == found.path else str(prefilter.resolve()),
        prefilter_digest=stage.digest,
        store=str(options.store.resolve()),
        store_digest=store.digest,
        detector=store.schema.detector,
        pairs=str(options.pairs.resolve()) if options.pairs is not None else None,
        pairs_digest=pairs.digest if options.pairs is not None else None,
        split=options.split,
        image_count=len(pairs.image_ids),
        caption_count=len(pairs),
        missing=missing,
        vector_size=stage.size,
        scale=stage.scale,
        images=str(options.images.resolve()) if options.images is not None else None,
        weights=_named(options.weights) if options.weights is not None else None,
    )


def _named(weights: Path) -> str:
    """Where a file is, or the name that stands for it."""
    return str(weights.resolve() if weights.exists() else weights)


def _already(output: Path, facts: IndexFacts) -> Index | None:
    """The index that is at ``output`` already; ``UsageError`` where it was made from something else."""
    if not (output / DESCRIPTION).is_file():
        return None
    there = open_index(output)
    one, other = asdict(there.facts), asdict(facts)
    differing = {name for name in one if one[name] != other[name]}
    if differing - set(PLACES):
        what = ", ".join(name for name in one if name in differing)
        raise UsageError(f"{output} is an index of something else ({what} differ); name a new --output, or delete it")
    if differing:
        note_facts(output, other)
        return open_index(output)
    return there


def _plan(facts: IndexFacts, rows: Rows) -> dict[str, Any]:
    """Everything the vectors depend on: those of an interrupted run are used only under the same plan."""
    order = hashlib.sha256(rows.order.tobytes()).hexdigest()
    return {name: value for name, value in asdict(facts).items() if name not in PLACES} | {"order": order, "at_once": AT_ONCE}


def _fill(file: ScoreFile, rows: Rows, store: FeatureStore, stage: FirstStage) -> None:
    """Compute the chunks that are not done: first those of images, as they lie in the store, then those of captions."""
    images, captions, texts = len(rows.order), len(rows.captions), rows.pairs.table.column("caption")
    of_images, todo = -(-images // AT_ONCE), file.todo()
    counts = [min(AT_ONCE, images - start) for start in range(0, images, AT_ONCE)]
    counts += [min(AT_ONCE, captions - start) for start in range(0, captions, AT_ONCE)]
    done = images + captions - sum(counts[chunk] for chunk in todo)
    with Progress("vectors", images + captions, "images and captions", done=done) as progress:
        for chunk in todo:
            if chunk < of_images:
                numbers = rows.order[chunk * AT_ONCE : (chunk + 1) * AT_ONCE]
                places, vectors = numbers, stage.encode_images(store.views([rows.pairs.image_ids[n] for n in numbers], stage.most))
            else:
                first = (chunk - of_images) * AT_ONCE
                some = rows.captions[first : first + AT_ONCE]
                places, vectors = images + first + np.arange(len(some)), stage.encode_texts(texts.take(some).to_pylist())
            file.put(chunk, places, vectors)
            progress.update(counts[chunk])


def _publish(output: Path, facts: IndexFacts, rows: Rows, file: ScoreFile) -> None:
    """Put the index in its place, whole."""
    for left in output.parent.glob(f".{output.name}.*.partial"):  # of a run that was killed here: this one has the lock
        remove(left)
    pairs, images = rows.pairs, len(rows.order)
    image_of_caption = pairs.image_numbers[rows.captions]
    with ArrayWriter(output, DTYPES, STRINGS) as writer:
        for name, first, end in (("image_vectors", 0, images), ("caption_vectors", images, len(file.scores))):
            for start in range(first, end, COPIED_AT_ONCE):
                writer.append(name, file.scores[start : min(start + COPIED_AT_ONCE, end)].ravel())
        writer.append("image_of_caption", image_of_caption)
        writer.append("caption_starts", np.searchsorted(image_of_caption, np.arange(images + 1)))

        columns = {"image_ids": pa.array(pairs.image_ids), "files": _files(rows, image_of_caption)}
        columns |= {f"{name}s": pairs.table.column(name).take(rows.captions) for name in ("pair_id", "caption")}
        for name, column in columns.items():
            for part in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
                writer.append_strings(name, part)
        writer.publish(KEY, asdict(facts))


def _files(rows: Rows, image_of_caption: NDArray[np.int32]) -> pa.Array | pa.ChunkedArray:
    """Each image's file as its first caption's row says; "" without captions."""
    images = len(rows.order)
    if not len(rows.captions):
        return pa.array([""] * images)
    first_rows = rows.captions[np.searchsorted(image_of_caption, np.arange(images))]
    return rows.pairs.table.column("image").take(pa.array(first_rows))
