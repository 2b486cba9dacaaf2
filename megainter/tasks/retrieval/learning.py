"""The end of fine-tuning for retrieval: how much each stage counts is learned on the validation gallery (``both.py``)."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.tables.pairs import has_split
from megainter.files import renew_checksums, write_json
from megainter.model.folder import read_config
from megainter.tasks.retrieval.both import FILE, Learned, fit
from megainter.tasks.retrieval.evaluation import choose_candidates_of, open_inputs
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.pairs import CandidatesToScore
from megainter.tasks.retrieval.recall import available_images
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.scoring.models import choose_devices
from megainter.tasks.scoring.processes import score_chunks
from megainter.training.loop import log
from megainter.weights import Located

FEWEST_CAPTIONS = 50  # of fewer, chance decides: three that are told apart in any case gave the first stage a weight of 61


def learn_both(model: Path, config: RetrievalConfig) -> None:
    """Write ``both_stages.json`` into the model's folder, by the gallery that the run was validated on, in this process.

    Nothing is written where there is none, where the model has no first stage, neither vectors of its own nor ``data.prefilter_model``,
    where that finds nothing right, and where there are fewer than ``FEWEST_CAPTIONS``.
    """
    data, validation = config.data, config.validation
    pairs, store = validation.pairs or data.pairs, validation.store or data.store
    if (data.prefilter_model is None and not read_config(model).itc_size) or not has_split(pairs, validation.split):
        return
    images = min(validation.images, available_images(pairs, FeatureStore(store), validation.split, data.max_bad))
    asked = RetrievalEvaluation(
        pairs=pairs,
        store=store,
        output=model / FILE,
        split=validation.split,
        images=images,
        captions_per_image=validation.captions_per_image,
        prefilter=data.candidates,
        prefilter_model=data.prefilter_model,
    )

    # Candidates and their log-odds, as an evaluation has them.
    inputs = open_inputs(Located(model, str(model)), asked)
    stage, chosen = choose_candidates_of(inputs, asked)
    captions = len(inputs.gallery.rows)
    if captions < FEWEST_CAPTIONS:
        log.warning("%d validation captions are too few to learn how much each stage counts by: both count alike", captions)
        return
    job = CandidatesToScore(inputs.job, chosen.keys)
    devices = choose_devices("auto", inputs.precision, 1 if torch.cuda.is_available() else None, len(chosen.keys), len(job))
    scores = np.empty(len(chosen.keys), np.float32)
    for chunk, found in score_chunks(job, list(range(len(job))), devices):
        scores[job.places(chunk)] = found[:, 0]

    # What they teach.
    learned = fit(chosen, inputs.gallery.image_of_caption, scores, stage.scale)
    if learned is None:
        log.warning("the first stage has no right answer among its candidates: how much it counts beside the second stays 1")
        return
    facts = Learned(
        weight=learned.weight,
        temperature=learned.temperature,
        first_stage=stage.model_digest,
        pairs_digest=inputs.gallery.pairs.digest,
        split=validation.split,
        images=images,
        captions=captions,
        candidates=data.candidates,
    )
    write_json(model / FILE, asdict(facts))
    renew_checksums(model)
    log.info("the first stage counts %.3f beside the second's 1, at a temperature of %.3f", learned.weight, learned.temperature)
