"""Image-text retrieval: every caption of a gallery against every image, scored by the matching head (paper section on retrieval).

Zero-shot with a model as pretraining left it, or with a fine-tuned one. The official code ranks images for captions alone, in a gallery
of exactly 1,000 images; here both directions and any size, a large one by candidates that a light dual encoder chooses. The score is the
log-odds of "matched".
"""

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.text.vocabulary import Vocabulary
from megainter.devices import torch_device
from megainter.errors import NumericsError, UsageError
from megainter.files import require_file_place, sha256_of, write_json
from megainter.model.folder import model_digest, read_config
from megainter.precision import Precision
from megainter.tasks.retrieval.both import sum_of
from megainter.tasks.retrieval.gallery import Gallery, read_gallery, tokenize
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.pairs import CandidatesToScore, PairsToScore, pairs_to_score
from megainter.tasks.retrieval.prefilter.candidates import Candidates, choose_candidates, found_shares, rank_candidates
from megainter.tasks.retrieval.prefilter.own import OwnVectors
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
from megainter.tasks.scoring.models import USUAL_LENGTH, check_model, choose_devices, choose_precision, keep_reports, scored_model
from megainter.tasks.scoring.running import run
from megainter.weights import Located

TOP = 10  # best images kept for each caption


def evaluate(model: Path, options: RetrievalEvaluation) -> RetrievalReport:
    """Score every caption against every image of a gallery, rank both ways, and write the figures to ``options.output`` (JSON).

    ``model`` is a Hugging Face folder with its vocab.txt. The gallery is the first ``images`` images of ``split`` with the first
    ``captions_per_image`` captions of each. Ties count against the model (`rank_scores`). ``processes``: None takes one per GPU, or as
    many cores as the work is worth; the scores are bit-equal for any number. ``max_regions`` and ``max_text_tokens``: None takes what the
    model was trained with, as its folder states it, else 36. ``batch_pairs`` pairs go through the model at once; a GPU
    wants thousands. Beside the JSON, ``<output>.top.parquet`` lists the best images of each caption; ``scores`` takes the whole
    matrix, one row per caption. Started again after a kill, the same call goes on where it was.

    With ``prefilter`` the dual encoder in ``prefilter_model``, or where none is given the model by its own vectors, chooses so many images
    for every caption and captions for every image, and only the union of these pairs is scored (``scores`` then has one row per pair).
    A query is ranked among its own candidates; where the right one is not among them, its rank is counted as the last of the gallery. The
    figures are of InterBERT's order; beside them stand those of the first stage's and of both together.

    ``folds`` also cuts the gallery into so many parts of consecutive images and gives the mean of their recalls: with 5 of COCO's 5,000
    images its "1K" figures, from the scores of the "5K" ones.

    Raises ``UsageError`` for inputs that do not fit each other, ``TooManyBadInputsError`` where ``images`` is None and more than
    ``max_bad`` of the split's images have no regions, ``NumericsError`` naming the pair for a score that is not a number.
    """
    top = options.output.with_name(f"{options.output.stem}.top.parquet")
    _check(options, top)
    found = scored_model(model)
    keep_reports(options.output, found.path, options.replace, options.scores)
    inputs = open_inputs(found, options)
    choose_devices(options.device, inputs.precision, options.processes, 1, 1)  # refuses before long work

    # The pairs to score: all, or those that a first stage chooses.
    gallery, everything = inputs.gallery, inputs.job
    stage, chosen = choose_candidates_of(inputs, options) if options.prefilter is not None else (None, None)
    job = everything if chosen is None else CandidatesToScore(everything, chosen.keys)
    shape = (len(gallery.image_ids), len(gallery.rows)) if chosen is None else (len(chosen.keys), 1)
    devices = choose_devices(options.device, inputs.precision, options.processes, shape[0] * shape[1], len(job))

    # Scores, kept on the disk until the report is written.
    facts = inputs.facts | {"split": options.split, "device": devices[0].type}
    with open_score_file(options.output, _plan(facts, inputs, chosen), *shape, len(job)) as file:
        seconds, pace = run(job, file, devices, "pairs", lambda chunk, scores: _require_numbers(scores, job, chunk, gallery))
        ranks = _ranks(file.scores, gallery, chosen)
        write_top(top, gallery, ranks)
        if options.scores is not None and chosen is None:
            write_scores(options.scores, file.scores, gallery)
        elif options.scores is not None and chosen is not None:
            write_pair_scores(options.scores, file.scores[:, 0], chosen.keys, gallery)
        report = RetrievalReport(
            **facts,
            text_to_image=text_to_image(ranks),
            image_to_text=image_to_text(ranks, gallery.image_of_caption),
            processes=len(devices),
            seconds=seconds,
            pairs_per_second=pace,
            top=top.name,
            top_sha256=sha256_of(top),
            scores=str(options.scores) if options.scores is not None else None,
            prefilter=stage,
            both_stages=None if stage is None or chosen is None else _both_stages(file.scores[:, 0], inputs, chosen, stage),
            folds=None if options.folds is None else mean_over_folds(file.scores, gallery.image_of_caption, options.folds),
        )
        write_json(options.output, asdict(report))
    print(summary(report), flush=True)
    return report


@dataclass(frozen=True)
class Inputs:
    """What an evaluation reads, opened and known to fit together; ``job`` is all pairs, ``encoder`` a separate first stage."""

    gallery: Gallery
    job: PairsToScore
    store: FeatureStore
    vocabulary: Vocabulary
    encoder: DualEncoder | None
    precision: Precision
    facts: dict[str, Any]


def open_inputs(found: Located, options: RetrievalEvaluation) -> Inputs:
    """Open model, store, gallery and a separate first stage; ``UsageError`` where they do not fit each other."""
    model, config = found.path, read_config(found.path)
    max_regions = _length("--max-regions", options.max_regions, config.max_regions, model)
    max_text_tokens = _length("--max-text-tokens", options.max_text_tokens, config.max_text_tokens, model)
    store = FeatureStore(options.store)
    vocabulary = check_model(model, config, store, max_text_tokens, options.other_detector)
    first, other = options.prefilter_model, options.other_detector
    encoder = load_prefilter(first, vocabulary, store, other) if first is not None else None
    if options.prefilter is not None and encoder is None and not config.itc_size:
        raise UsageError(
            f"--prefilter: {model} has no vectors of its own (pretrained with training.itc_weight above 0); give --prefilter-model, "
            "a folder that `megainter finetune prefilter` made"
        )

    gallery = read_gallery(options.pairs, store, options.split, options.images, options.captions_per_image, options.max_bad)
    if options.folds is not None and len(gallery.image_ids) % options.folds:
        raise UsageError(f"--folds is {options.folds}; give a number that divides the gallery's {len(gallery.image_ids):,} images")
    if gallery.missing_images:
        print(f"left out: {gallery.missing_images:,} images of {options.pairs} that have no regions in {options.store}", flush=True)

    precision = choose_precision(options.precision, options.device)
    tokens = tokenize(gallery.texts(), vocabulary, max_text_tokens)
    job = pairs_to_score(model, store, gallery.image_ids, tokens, max_regions, options.batch_pairs, precision)
    facts: dict[str, Any] = {
        "max_regions": max_regions, "max_text_tokens": max_text_tokens, "precision": precision, "model": found.name,
        "pairs": str(options.pairs), "store": str(options.store), "model_digest": model_digest(model), "pairs_digest": gallery.pairs.digest,
        "store_digest": store.digest, "images": len(gallery.image_ids), "captions": len(gallery.rows),
        "missing_images": gallery.missing_images,
    }  # fmt: skip
    return Inputs(gallery=gallery, job=job, store=store, vocabulary=vocabulary, encoder=encoder, precision=precision, facts=facts)


def choose_candidates_of(inputs: Inputs, options: RetrievalEvaluation) -> tuple[FirstStage, Candidates]:
    """Choose the candidates of every query, and see how well that went."""
    assert options.prefilter is not None
    start, gallery, device, model = time.monotonic(), inputs.gallery, torch_device(options.device), inputs.job.model
    if options.prefilter_model is None:
        own = OwnVectors(model, inputs.vocabulary, inputs.facts["max_text_tokens"], inputs.facts["max_regions"], device)
        made = own.encode_texts(gallery.texts()), own.images_of(inputs.store, gallery.image_ids)
        captions, images = (torch.from_numpy(vectors).to(device) for vectors in made)
        folder, digest, scale = inputs.facts["model"], own.digest, own.scale
    else:
        assert inputs.encoder is not None  # as it was opened with the rest
        encoder = inputs.encoder.to(device)
        captions = caption_vectors(encoder, tokenize(gallery.texts(), inputs.vocabulary, encoder.settings.max_text_tokens), device)
        images, scale = image_vectors(encoder, inputs.store, gallery.image_ids, device), float(encoder.log_scale.detach().exp())
        folder, digest = options.prefilter_model, prefilter_digest(options.prefilter_model)
    chosen = choose_candidates(captions, images, options.prefilter)
    seconds = time.monotonic() - start

    ranks = rank_candidates(chosen, gallery.image_of_caption, chosen.images.scores, chosen.captions.scores)
    of_captions, of_images = found_shares(chosen, gallery.image_of_caption)
    stage = FirstStage(
        model=str(folder),
        model_digest=digest,
        candidates=options.prefilter,
        pairs=len(chosen.keys),
        bound_text_to_image=of_captions,
        bound_image_to_text=of_images,
        text_to_image=text_to_image(ranks),
        image_to_text=image_to_text(ranks, gallery.image_of_caption),
        scale=scale,
        seconds=round(seconds, 3),
    )
    return stage, chosen


def _both_stages(scores_P: NDArray[np.float32], inputs: Inputs, chosen: Candidates, stage: FirstStage) -> BothStages:
    both, told = sum_of(inputs.job.model, stage.model_digest)
    if told is not None:
        print(told, flush=True)
    of_captions = both.of(chosen.scores_of_captions(scores_P), np.float32(stage.scale) * chosen.images.scores)
    of_images = both.of(chosen.scores_of_images(scores_P), np.float32(stage.scale) * chosen.captions.scores)
    image_of_caption = inputs.gallery.image_of_caption
    ranks = rank_candidates(chosen, image_of_caption, of_captions, of_images)
    return BothStages(both.weight, both.temperature, text_to_image(ranks), image_to_text(ranks, image_of_caption))


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


def _check(options: RetrievalEvaluation, top: Path) -> None:
    """``UsageError`` for numbers that cannot be, options that need each other, and places that cannot be written."""
    numbers = {"--batch-pairs": options.batch_pairs, "--max-regions": options.max_regions, "--processes": options.processes}
    for name, number in (numbers | {"--folds": options.folds}).items():
        if number is not None and number < 1:
            raise UsageError(f"{name} is {number}; give at least 1")
    if not 0 <= options.max_bad <= 1:
        raise UsageError(f"--max-bad is {options.max_bad}; give a share, 0 to 1")

    if options.prefilter is None and options.prefilter_model is not None:
        raise UsageError("--prefilter-model is the folder of a first stage; give --prefilter (how many candidates) with it")
    if options.prefilter is not None and options.prefilter < max(RECALL_AT):
        raise UsageError(f"--prefilter is {options.prefilter}; give at least {max(RECALL_AT)}, or R@{max(RECALL_AT)} would mean nothing")
    if options.folds is not None and options.prefilter is not None:
        raise UsageError("--folds needs every score; leave out --prefilter, or give --images for one fold")

    for option, path in (("--output", options.output), ("--output's list of best images", top), ("--scores", options.scores)):
        if path is not None:
            require_file_place(path, option)


def _plan(facts: dict[str, Any], inputs: Inputs, chosen: Candidates | None) -> dict[str, Any]:
    """Everything the scores depend on: scores of an interrupted run are used only under the same plan."""
    return facts | {
        "vocabulary": inputs.vocabulary.digest,
        "selection": hashlib.sha256(inputs.gallery.rows.tobytes()).hexdigest(),
        "batch_pairs": inputs.job.batch_pairs,
        "candidates": hashlib.sha256(chosen.keys.tobytes()).hexdigest() if chosen is not None else None,
        "torch": str(torch.__version__),
    }


def _require_numbers(scores: NDArray[np.float32], job: PairsToScore | CandidatesToScore, chunk: int, gallery: Gallery) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        row, column = (int(number) for number in bad[0])
        image, caption = job.pair(chunk, row, column)
        pair_id = gallery.pairs.pair_id(int(gallery.rows[caption]))
        raise NumericsError(
            f"the score of caption {pair_id!r} and image {gallery.image_ids[image]!r} is {scores[row, column]}: the model's weights are "
            "not finite, or --precision is too narrow for them"
        )
