"""Image-text retrieval: every caption of a gallery against every image, scored by the matching head (paper section on retrieval).

Zero-shot with a model as pretraining left it, or with a fine-tuned one. The official code ranks images for captions alone, in a gallery
of exactly 1,000 images; here both directions and any size, a large one by candidates that a light dual encoder chooses. The score is the
log-odds of "matched".
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from megainter.data.feature_store import FeatureStore
from megainter.data.text import Vocabulary
from megainter.devices import devices_named, torch_device, units_of
from megainter.errors import NumericsError, UsageError
from megainter.files import fsync_folder, require_file_place, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import model_digest, read_config, read_vocabulary
from megainter.precision import AskedPrecision, Precision, automatic
from megainter.progress import Progress
from megainter.tasks.candidates import Candidates, choose_candidates, found_shares, rank_candidates
from megainter.tasks.gallery import Gallery, read_gallery, tokenize
from megainter.tasks.prefilter import DualEncoder, caption_vectors, image_vectors, load_prefilter, prefilter_digest
from megainter.tasks.ranking import BLOCK_BYTES, RECALL_AT, Folds, Ranks, Recall, image_to_text, mean_over_folds, rank_scores, text_to_image
from megainter.tasks.score_file import ScoreFile, open_score_file
from megainter.tasks.scoring import DTYPES, CandidateJob, Job, make_job, score_chunks

TOP = 10  # best images kept for each caption
PAIRS_PER_GROUP = 1 << 20  # of scores written in one go
USUAL_LENGTH = 36  # regions and tokens where the model's folder does not say what it was trained with
PAIRS_WORTH_A_PROCESS = 10_000  # on CPU: starting one costs about as much as scoring these


@dataclass(frozen=True)
class FirstStage:
    """What the dual encoder chose for InterBERT, and what that costs: see `evaluate`.

    ``bound_text_to_image``: share of captions whose own image is among their candidates; ``bound_image_to_text``: share of images with an
    own caption among theirs. No recall can be above these. ``text_to_image`` and ``image_to_text`` are the dual encoder's own recalls.
    ``candidates`` of each query, ``pairs`` in all; ``seconds`` for vectors and candidates. ``scale``: what a dot product of its vectors is
    multiplied by to be the logit it was trained with.
    """

    model: str
    model_digest: str
    candidates: int
    pairs: int
    bound_text_to_image: float
    bound_image_to_text: float
    text_to_image: Recall
    image_to_text: Recall
    scale: float
    seconds: float


@dataclass(frozen=True)
class BothStages:
    """Recalls where candidates are ranked by the sum of InterBERT's log-odds and the dual encoder's logit."""

    text_to_image: Recall
    image_to_text: Recall


@dataclass(frozen=True)
class RetrievalReport:
    """What ``evaluate`` measured, as it stands in the JSON file.

    ``top`` and ``scores`` name Parquet files: the best images of each caption (beside the JSON), and all scores if asked for.
    ``seconds`` and ``pairs_per_second`` are of this run alone: pairs that an interrupted run had scored are not counted.
    """

    text_to_image: Recall
    image_to_text: Recall
    images: int
    captions: int
    missing_images: int
    split: str | None
    max_regions: int
    max_text_tokens: int
    precision: str
    model: str
    model_digest: str
    pairs: str
    pairs_digest: str
    store: str
    store_digest: str
    device: str
    processes: int
    seconds: float
    pairs_per_second: float
    top: str
    scores: str | None
    prefilter: FirstStage | None
    both_stages: BothStages | None
    folds: Folds | None


def evaluate(
    model: Path,
    pairs: Path,
    store: Path,
    *,
    output: Path,
    split: str | None = "test",
    images: int | None = None,
    captions_per_image: int | None = None,
    max_regions: int | None = None,
    max_text_tokens: int | None = None,
    batch_pairs: int = 256,
    processes: int | None = None,
    precision: AskedPrecision = "auto",
    device: str = "auto",
    scores: Path | None = None,
    prefilter: int | None = None,
    prefilter_model: Path | None = None,
    max_missing: float = 0.01,
    folds: int | None = None,
) -> RetrievalReport:
    """Score every caption against every image of a gallery, rank both ways, and write the figures to ``output`` (JSON).

    ``model`` is a Hugging Face folder with its vocab.txt. The gallery is the first ``images`` images of ``split`` with the first
    ``captions_per_image`` captions of each. Ties count against the model (`rank_scores`). ``processes``: None takes one per GPU, or as
    many cores as the work is worth; the scores are bit-equal for any number. ``max_regions`` and ``max_text_tokens``: None takes what the
    model was trained with, as its folder states it, else 36. ``batch_pairs`` pairs go through the model at once; a GPU
    wants thousands. Beside the JSON, ``<output>.top.parquet`` lists the best images of each caption; ``scores`` takes the whole
    matrix, one row per caption. Started again after a kill, the same call goes on where it was.

    With ``prefilter`` the dual encoder in ``prefilter_model`` chooses so many images for every caption and captions for every image, and
    only the union of these pairs is scored (``scores`` then has one row per pair). A query is ranked among its own candidates; where the
    right one is not among them, its rank is counted as the last of the gallery. The figures are of InterBERT's order; beside them stand
    those of the first stage's and of both together.

    ``folds`` also cuts the gallery into so many parts of consecutive images and gives the mean of their recalls: with 5 of COCO's 5,000
    images its "1K" figures, from the scores of the "5K" ones.

    Raises ``UsageError`` for inputs that do not fit each other, ``TooManyBadInputsError`` where ``images`` is None and more than
    ``max_missing`` of the split's images have no regions, ``NumericsError`` naming the pair for a score that is not a number.
    """
    _check_numbers({"--batch-pairs": batch_pairs, "--max-regions": max_regions, "--processes": processes})
    _check_prefilter(prefilter, prefilter_model)
    if folds is not None and prefilter is not None:
        raise UsageError("--folds needs every score; leave out --prefilter, or give --images for one fold")
    top = output.with_name(f"{output.stem}.top.parquet")
    _check_places({"--output": output, "--output's list of best images": top, "--scores": scores})
    config = read_config(model)
    max_regions = _length("--max-regions", max_regions, config.max_regions, model)
    max_text_tokens = _length("--max-text-tokens", max_text_tokens, config.max_text_tokens, model)
    feature_store = FeatureStore(store)
    vocabulary = check_model(model, config, feature_store, max_text_tokens)
    encoder = load_prefilter(prefilter_model, vocabulary, feature_store) if prefilter_model is not None else None
    if not 0 <= max_missing <= 1:
        raise UsageError(f"--max-missing is {max_missing}; give a share, 0 to 1")
    gallery = read_gallery(pairs, feature_store, split, images, captions_per_image, max_missing)
    if folds is not None and (folds < 1 or len(gallery.image_ids) % folds):
        raise UsageError(f"--folds is {folds}; give a number that divides the gallery's {len(gallery.image_ids):,} images")
    if gallery.missing_images:
        print(f"left out: {gallery.missing_images:,} images of {pairs} that have no regions in {store}", flush=True)
    tokens = tokenize(gallery.texts(), vocabulary, max_text_tokens)
    arithmetic = choose_precision(precision, device)
    everything = make_job(model, feature_store, gallery.image_ids, tokens, max_regions, batch_pairs, arithmetic)
    choose_devices(device, arithmetic, processes, 1, 1)  # refuses before long work
    stage, chosen = None, None
    if encoder is not None and prefilter is not None and prefilter_model is not None:
        where = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
        stage, chosen = _first_stage(prefilter_model, encoder.to(where), prefilter, gallery, vocabulary, feature_store, where)
    job = everything if chosen is None else CandidateJob(everything, chosen.keys)
    shape = (len(gallery.image_ids), len(gallery.rows)) if chosen is None else (len(chosen.keys), 1)
    devices = choose_devices(device, arithmetic, processes, shape[0] * shape[1], len(job))
    facts: dict[str, Any] = {"split": split, "max_regions": max_regions, "max_text_tokens": max_text_tokens, "precision": arithmetic}
    facts |= {"model": str(model), "pairs": str(pairs), "store": str(store), "device": devices[0].type}
    facts |= {"model_digest": model_digest(model), "pairs_digest": gallery.pairs.digest, "store_digest": feature_store.digest}
    facts |= {"images": len(gallery.image_ids), "captions": len(gallery.rows), "missing_images": gallery.missing_images}
    with open_score_file(output, _plan(facts, vocabulary, gallery, everything, chosen), *shape, len(job)) as file:
        speed = _score(job, gallery, file, devices)
        ranks = _ranks(file.scores, gallery, chosen)
        write_top(top, gallery, ranks)
        if scores is not None and chosen is None:
            write_scores(scores, file.scores, gallery)
        elif scores is not None and chosen is not None:
            write_pair_scores(scores, file.scores[:, 0], chosen.keys, gallery)
        recalls: dict[str, Any] = {"text_to_image": text_to_image(ranks), "image_to_text": image_to_text(ranks, gallery.image_of_caption)}
        files: dict[str, Any] = {"top": top.name, "scores": str(scores) if scores is not None else None}
        together = None if stage is None or chosen is None else _both_stages(file.scores[:, 0], gallery, chosen, stage.scale)
        parts = None if folds is None else mean_over_folds(file.scores, gallery.image_of_caption, folds)
        more: dict[str, Any] = {"prefilter": stage, "both_stages": together, "folds": parts}
        report = RetrievalReport(**recalls, **facts, **speed, **files, **more, processes=len(devices))
        write_json(output, asdict(report))
    print(summary(report), flush=True)
    return report


def _first_stage(
    folder: Path, encoder: DualEncoder, keep: int, gallery: Gallery, vocabulary: Vocabulary, store: FeatureStore, device: torch.device
) -> tuple[FirstStage, Candidates]:
    """Choose the candidates of every query, and see how well that went."""
    start = time.monotonic()
    captions = caption_vectors(encoder, tokenize(gallery.texts(), vocabulary, encoder.settings.max_text_tokens), device)
    chosen = choose_candidates(captions, image_vectors(encoder, store, gallery.image_ids, device), keep)
    seconds = time.monotonic() - start
    ranks = rank_candidates(chosen, gallery.image_of_caption, chosen.images.scores, chosen.captions.scores)
    bounds = found_shares(chosen, gallery.image_of_caption)
    own = text_to_image(ranks), image_to_text(ranks, gallery.image_of_caption)
    scale = float(encoder.log_scale.detach().exp())
    return FirstStage(str(folder), prefilter_digest(folder), keep, len(chosen.keys), *bounds, *own, scale, round(seconds, 3)), chosen


def _both_stages(scores_P: NDArray[np.float32], gallery: Gallery, chosen: Candidates, scale: float) -> BothStages:
    of_captions = chosen.scores_of_captions(scores_P) + np.float32(scale) * chosen.images.scores
    of_images = chosen.scores_of_images(scores_P) + np.float32(scale) * chosen.captions.scores
    ranks = rank_candidates(chosen, gallery.image_of_caption, of_captions, of_images)
    return BothStages(text_to_image(ranks), image_to_text(ranks, gallery.image_of_caption))


def _ranks(scores: NDArray[np.float32], gallery: Gallery, chosen: Candidates | None) -> Ranks:
    if chosen is None:
        return rank_scores(scores, gallery.image_of_caption, TOP)
    flat = scores[:, 0]
    return rank_candidates(chosen, gallery.image_of_caption, chosen.scores_of_captions(flat), chosen.scores_of_images(flat), TOP)


def summary(report: RetrievalReport) -> str:
    """Two lines for people, one for each direction; and with a first stage three on what it did."""
    both = (("text to image", report.text_to_image), ("image to text", report.image_to_text))
    lines = []
    for name, recall in both:
        rank = f"median rank {recall.median_rank} of {recall.candidates:,}"
        lines.append(f"{name}: {_recalls(recall)}, {rank} ({recall.queries:,} queries; chance R@1 {recall.chance_at_1:.2%})")
    first = report.prefilter
    if first is not None:
        share = first.pairs / (report.images * report.captions)
        found = f"text to image {first.bound_text_to_image:.1%}, image to text {first.bound_image_to_text:.1%}"
        lines.append(f"first stage: {first.candidates:,} candidates each, {share:.1%} of all pairs; the right one is among them: {found}")
        lines.append(f"first stage alone: {_both_ways(first)}")
    if report.both_stages is not None:
        lines.append(f"both stages together: {_both_ways(report.both_stages)}")
    if report.folds is not None:
        ways = (("text to image", report.folds.text_to_image), ("image to text", report.folds.image_to_text))
        means = "; ".join(f"{name} " + ", ".join(f"R@{k} {way[f'r_at_{k}']:.1%}" for k in RECALL_AT) for name, way in ways)
        lines.append(f"mean of {report.folds.count} folds of {report.images // report.folds.count:,} images: {means}")
    return "\n".join(lines)


def _both_ways(found: FirstStage | BothStages) -> str:
    return f"text to image {_recalls(found.text_to_image)}; image to text {_recalls(found.image_to_text)}"


def _recalls(recall: Recall) -> str:
    return ", ".join(f"R@{k} {getattr(recall, f'r_at_{k}'):.1%}" for k in RECALL_AT)


def _length(option: str, given: int | None, trained: int | None, folder: Path) -> int:
    """What the user gave, else what the model was trained with, said where it is neither."""
    if given is None and trained is None:
        print(f"{folder} does not say what it was trained with: {option} {USUAL_LENGTH} is taken", flush=True)
    return given or trained or USUAL_LENGTH


def check_model(folder: Path, config: InterBertConfig, store: FeatureStore, max_text_tokens: int) -> Vocabulary:
    """The model's vocabulary, once model, vocabulary, store and text length are known to fit each other; ``UsageError`` if not."""
    if config.region_feature_size != store.schema.feature_size:
        raise UsageError(
            f"{folder} takes {config.region_feature_size}-d region features, and {store.path} has {store.schema.feature_size}-d ones"
        )
    if not 3 <= max_text_tokens <= config.max_position_embeddings:
        raise UsageError(
            f"--max-text-tokens is {max_text_tokens}; give 3 to {config.max_position_embeddings}, what {folder} has positions for"
        )
    return read_vocabulary(folder, config)


def choose_precision(asked: AskedPrecision, device: str) -> Precision:
    """What ``asked`` stands for on ``device``: of "auto" a line says which and why. ``UsageError`` for a device that is not here."""
    if asked != "auto":
        return asked
    if device != "auto":
        torch_device(device)
    precision, why = automatic([units_of(each) for each in devices_named(device)])
    print(why, flush=True)
    return precision


def choose_devices(device: str, precision: str, processes: int | None, pairs: int, chunks: int) -> list[torch.device]:
    """One device for each process: GPUs in turn, or the CPU as often as there are cores and work for them."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device(device)
    if precision not in DTYPES or (precision == "fp16" and device == "cpu"):
        raise UsageError(f"--precision {precision} is not possible on {device}; give fp32 or bf16")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        return [torch.device("cuda", number % gpus) for number in range(min(processes or gpus, chunks))]
    worth = 1 if device != "cpu" else max(1, min(len(os.sched_getaffinity(0)), pairs // PAIRS_WORTH_A_PROCESS))
    return [torch.device(device)] * min(processes or worth, chunks)


def _check_numbers(numbers: dict[str, int | None]) -> None:
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; give at least 1")


def _check_prefilter(prefilter: int | None, folder: Path | None) -> None:
    if (prefilter is None) != (folder is None):
        raise UsageError("--prefilter (how many candidates) and --prefilter-model (its folder) go together; give both or neither")
    if prefilter is not None and prefilter < max(RECALL_AT):
        raise UsageError(f"--prefilter is {prefilter}; give at least {max(RECALL_AT)}, or R@{max(RECALL_AT)} would mean nothing")


def _check_places(places: dict[str, Path | None]) -> None:
    for option, path in places.items():
        if path is not None:
            require_file_place(path, option)


def _plan(facts: dict[str, Any], vocabulary: Vocabulary, gallery: Gallery, job: Job, chosen: Candidates | None) -> dict[str, Any]:
    """Everything the scores depend on: scores of an interrupted run are used only under the same plan."""
    selection = hashlib.sha256(gallery.rows.tobytes()).hexdigest()
    return facts | {
        "vocabulary": vocabulary.digest,
        "selection": selection,
        "batch_pairs": job.batch_pairs,
        "candidates": hashlib.sha256(chosen.keys.tobytes()).hexdigest() if chosen is not None else None,
        "torch": str(torch.__version__),
    }


def _score(job: Job | CandidateJob, gallery: Gallery, file: ScoreFile, devices: list[torch.device]) -> dict[str, Any]:
    """Score what is not done yet; returns the seconds it took and the pairs per second."""
    todo, total = file.todo(), file.scores.size
    left = sum(job.pairs(chunk) for chunk in todo)
    with Progress("scoring", total, "pairs", done=total - left) as progress:
        start = time.monotonic()
        for chunk, scores in score_chunks(job, todo, devices):
            _require_numbers(scores, job, chunk, gallery)
            file.put(chunk, job.places(chunk), scores)
            progress.update(scores.size)
        seconds = time.monotonic() - start
    return {"seconds": round(seconds, 3), "pairs_per_second": round(left / max(seconds, 1e-9), 1)}


def _require_numbers(scores: NDArray[np.float32], job: Job | CandidateJob, chunk: int, gallery: Gallery) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = (int(number) for number in bad[0])
        image, caption = job.pair(chunk, row, column)
        pair_id = gallery.pairs.pair_id(int(gallery.rows[caption]))
        raise NumericsError(
            f"the score of caption {pair_id!r} and image {gallery.image_ids[image]!r} is {scores[row, column]}: the model's weights are "
            "not finite, or --precision is too narrow for them"
        )


def write_top(path: Path, gallery: Gallery, ranks: Ranks) -> None:
    """One row per caption: pair_id, image_id (its own), rank of the own image, and the best images with their scores, best first."""
    flat = pa.array(gallery.image_ids).take(pa.array(ranks.top_images.ravel()))
    width = ranks.top_images.shape[1]
    columns = {
        "pair_id": gallery.pairs.table.column("pair_id").take(gallery.rows),
        "image_id": pa.array(gallery.image_ids).take(pa.array(gallery.image_of_caption)),
        "caption": gallery.pairs.table.column("caption").take(gallery.rows),
        "rank": pa.array(ranks.caption_ranks),
        "images": pa.FixedSizeListArray.from_arrays(flat, width),
        "scores": pa.FixedSizeListArray.from_arrays(pa.array(ranks.top_scores.ravel()), width),
    }
    table = pa.table(columns)
    _write_parquet(path, table.schema, lambda writer: writer.write_table(table))


def write_scores(path: Path, scores_IC: NDArray[np.float32], gallery: Gallery) -> None:
    """The whole matrix: one row per caption with pair_id, image_id (its own) and scores float32 [I], images as the metadata lists them."""
    images = len(gallery.image_ids)
    schema = pa.schema(
        [("pair_id", pa.string()), ("image_id", pa.string()), ("scores", pa.list_(pa.float32(), images))],
        metadata={"images": json.dumps(gallery.image_ids)},
    )
    own = pa.array(gallery.image_ids).take(pa.array(gallery.image_of_caption))
    pair_ids = gallery.pairs.table.column("pair_id").take(gallery.rows).combine_chunks()
    rows = max(1, BLOCK_BYTES // (4 * images))

    def write(writer: pq.ParquetWriter) -> None:
        for start in range(0, len(gallery.rows), rows):
            block = np.ascontiguousarray(scores_IC[:, start : start + rows].T)
            values = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), images)
            writer.write_batch(pa.record_batch([pair_ids[start : start + rows], own[start : start + rows], values], schema=schema))

    _write_parquet(path, schema, write)


def write_pair_scores(path: Path, scores_P: NDArray[np.float32], keys_P: NDArray[np.int64], gallery: Gallery) -> None:
    """One row per scored pair: pair_id (the caption), image_id and score float32, image by image."""
    image_ids = pa.array(gallery.image_ids)
    pair_ids = gallery.pairs.table.column("pair_id").take(gallery.rows).combine_chunks()
    schema = pa.schema([("pair_id", pa.string()), ("image_id", pa.string()), ("score", pa.float32())])

    def write(writer: pq.ParquetWriter) -> None:
        for start in range(0, len(keys_P), PAIRS_PER_GROUP):
            images, captions = np.divmod(keys_P[start : start + PAIRS_PER_GROUP], len(gallery.rows))
            columns = [pair_ids.take(pa.array(captions)), image_ids.take(pa.array(images)), pa.array(scores_P[start : start + len(images)])]
            writer.write_batch(pa.record_batch(columns, schema=schema))

    _write_parquet(path, schema, write)


def _write_parquet(path: Path, schema: pa.Schema, write: Callable[[pq.ParquetWriter], None]) -> None:
    """Written aside and renamed, so that the file is whole or not there."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            write(writer)
        os.replace(aside, path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
