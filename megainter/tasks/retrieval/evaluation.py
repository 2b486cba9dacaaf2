"""Image-text retrieval: every caption of a gallery against every image, scored by the matching head (paper section on retrieval).

Zero-shot with a model as pretraining left it, or with a fine-tuned one. The official code ranks images for captions alone, in a gallery
of exactly 1,000 images; here both directions and any size, a large one by candidates that a light dual encoder chooses. The score is the
log-odds of "matched".
"""

import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.text.vocabulary import Vocabulary
from megainter.devices import torch_device
from megainter.errors import NumericsError, UsageError
from megainter.files import require_file_place, write_json
from megainter.model.folder import model_digest, read_config
from megainter.precision import AskedPrecision
from megainter.tasks.retrieval.gallery import Gallery, read_gallery, tokenize
from megainter.tasks.retrieval.pairs import CandidateJob, Job, make_job
from megainter.tasks.retrieval.prefilter.candidates import Candidates, choose_candidates, found_shares, rank_candidates
from megainter.tasks.retrieval.prefilter.towers import DualEncoder, caption_vectors, image_vectors, load_prefilter, prefilter_digest
from megainter.tasks.retrieval.ranking import (
    RECALL_AT,
    Ranks,
    image_to_text,
    mean_over_folds,
    rank_scores,
    text_to_image,
)
from megainter.tasks.retrieval.report import BothStages, FirstStage, RetrievalReport, summary, write_pair_scores, write_scores, write_top
from megainter.tasks.scoring.file import open_score_file
from megainter.tasks.scoring.models import USUAL_LENGTH, check_model, choose_devices, choose_precision
from megainter.tasks.scoring.running import run

TOP = 10  # best images kept for each caption


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
        first = torch_device(device)
        stage, chosen = _first_stage(prefilter_model, encoder.to(first), prefilter, gallery, vocabulary, feature_store, first)
    job = everything if chosen is None else CandidateJob(everything, chosen.keys)
    shape = (len(gallery.image_ids), len(gallery.rows)) if chosen is None else (len(chosen.keys), 1)
    devices = choose_devices(device, arithmetic, processes, shape[0] * shape[1], len(job))
    facts: dict[str, Any] = {"split": split, "max_regions": max_regions, "max_text_tokens": max_text_tokens, "precision": arithmetic}
    facts |= {"model": str(model), "pairs": str(pairs), "store": str(store), "device": devices[0].type}
    facts |= {"model_digest": model_digest(model), "pairs_digest": gallery.pairs.digest, "store_digest": feature_store.digest}
    facts |= {"images": len(gallery.image_ids), "captions": len(gallery.rows), "missing_images": gallery.missing_images}
    with open_score_file(output, _plan(facts, vocabulary, gallery, everything, chosen), *shape, len(job)) as file:
        seconds, pace = run(job, file, devices, "pairs", lambda chunk, scores: _require_numbers(scores, job, chunk, gallery))
        ranks = _ranks(file.scores, gallery, chosen)
        write_top(top, gallery, ranks)
        if scores is not None and chosen is None:
            write_scores(scores, file.scores, gallery)
        elif scores is not None and chosen is not None:
            write_pair_scores(scores, file.scores[:, 0], chosen.keys, gallery)
        report = RetrievalReport(
            **facts,
            text_to_image=text_to_image(ranks),
            image_to_text=image_to_text(ranks, gallery.image_of_caption),
            processes=len(devices),
            seconds=seconds,
            pairs_per_second=pace,
            top=top.name,
            scores=str(scores) if scores is not None else None,
            prefilter=stage,
            both_stages=None if stage is None or chosen is None else _both_stages(file.scores[:, 0], gallery, chosen, stage.scale),
            folds=None if folds is None else mean_over_folds(file.scores, gallery.image_of_caption, folds),
        )
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


def _length(option: str, given: int | None, trained: int | None, folder: Path) -> int:
    """What the user gave, else what the model was trained with, said where it is neither."""
    if given is None and trained is None:
        print(f"{folder} does not say what it was trained with: {option} {USUAL_LENGTH} is taken", flush=True)
    return given or trained or USUAL_LENGTH


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
