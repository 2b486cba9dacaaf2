"""Fine-tuning for image-text retrieval, from a pretrained model to the folder that `megainter evaluate retrieval` takes.

As the released code does it: four pairs for every caption, each judged for itself by the matching head of pretraining, and the mean over
all of them; or, as ViLBERT does, the own pair against the others of its caption. The model is validated by recall on a gallery of held-out
images.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.matching import with_regions
from megainter.data.stream.negatives import require_two_images
from megainter.data.tables.pairs import Pairs, has_split, read_pairs
from megainter.data.text.token_table import build_token_table, open_token_table, table_key
from megainter.errors import UsageError
from megainter.model.configuration import NEARNESS, InterBertConfig
from megainter.model.detector import require_same_detector
from megainter.model.flops import alone_flops
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.contrast import CONTRAST, contrasting
from megainter.tasks.retrieval.batches import GroupSettings, RetrievalBatch, RetrievalStream
from megainter.tasks.retrieval.learning import learn_both
from megainter.tasks.retrieval.negatives import open_towers, renewal_of
from megainter.tasks.retrieval.neighbours import NEIGHBOURS, build_neighbours, open_neighbours
from megainter.tasks.retrieval.objective import RetrievalStep
from megainter.tasks.retrieval.recall import HeldOut, open_held_out, recall_figures
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.scoring.models import USUAL_LENGTH
from megainter.tasks.starting import Start, finetune_job, inputs_flops, open_start
from megainter.training.collective import on_first_rank
from megainter.training.job import Job
from megainter.training.world import World


def finetune(config: RetrievalConfig) -> Path:
    """Fine-tune as ``config`` says, alone or as one rank of any launcher; returns the folder of the result (``tasks.starting``)."""
    if group_settings(config).group < 2:
        raise UsageError("all four numbers of pairs in [data] are 0: with its own pair alone a caption teaches nothing")
    return finetune_job(config, lambda world: open_job(config, world), lambda model: learn_both(model, config))


def group_settings(config: RetrievalConfig, contrast: bool = False) -> GroupSettings:
    """The pairs beside a caption's own, the portions of a step, and whether there is contrast."""
    data, training = config.data, config.training
    return GroupSettings(
        seed=training.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        random_captions=data.random_captions,
        random_images=data.random_images,
        hard_captions=data.hard_captions,
        hard_images=data.hard_images,
        micro_tokens=training.micro_tokens,
        contrast=contrast,
        hard_share=data.hard_share,
        from_candidates=data.hard_from == "first_stage",
    )


def open_job(config: RetrievalConfig, world: World) -> Job:
    """Open the starting model, captions and regions on every rank. Collective."""
    data = config.data
    store = FeatureStore(data.store)
    start = open_start(config.model, config.output, data.max_text_tokens, data.max_regions, store, data.other_detector, vectors=True)
    contrast = _contrast_weight(config, start)
    fresh = _with_vectors(config, start.config, contrast > 0)
    lengths = start.config.max_text_tokens or USUAL_LENGTH, start.config.max_regions or USUAL_LENGTH
    start.config.max_text_tokens, start.config.max_regions = lengths

    # What it is trained and validated on.
    pairs = with_regions(read_pairs(data.pairs, split=data.split), store, data.max_bad, data.pairs)
    require_two_images(pairs.image_numbers, str(data.pairs))
    stream = _stream(config, start, pairs, store, world)
    held_out, validation = _held_out(config, start, store), config.validation
    towers = open_towers(config, start, store, world)
    renewal = renewal_of(config, stream, towers)

    group, weights = stream.settings.group, (1.0, *([contrast] if contrast else []))
    told = f"{len(pairs):,} captions of {len(pairs.image_ids):,} images, {group} pairs for each caption ({data.objective})"
    return Job(
        objectives=(data.objective, CONTRAST)[: len(weights)],
        weights=weights,
        batches=stream,
        accumulation=stream.steps.accumulation,
        samples=len(pairs),
        sample_ids=stream.sample_ids,
        places=stream.places,
        shown=stream.shown,
        build_model=lambda saved: start.build(InterBertForRetrieval, saved, fresh),
        build_step=lambda model: RetrievalStep(model, weights),
        flops=_forward_flops,
        vocabulary=start.vocabulary_file,
        lowercase=start.vocabulary.lowercase,
        digests={"pairs": pairs.digest, "store": store.digest, "vocabulary": start.vocabulary.digest}
        | ({"prefilter": towers.digest} if towers is not None else {}),
        detector=start.config.detector,
        started=(told, _told_of(held_out, config)),
        workers=data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=(lambda trained, world: recall_figures(trained, held_out, validation.candidates, world)) if held_out else None,
        validate_every=validation.every_steps,
        best=validation.best_by if held_out is not None else None,
        prepare_step=contrasting(config.training.global_batch, config.training.seed, world) if contrast else None,
        renew=renewal,
        renew_every=renewal.every if renewal is not None else 0,
    )


def _contrast_weight(config: RetrievalConfig, start: Start) -> float:
    """As the settings say, else 1 for a model that has vectors, whose fine-tuning would spoil them without."""
    given = config.training.itc_weight
    return given if given is not None else float(start.config.itc_size > 0)


def _with_vectors(config: RetrievalConfig, model: InterBertConfig, contrast: bool) -> str:
    """Give ``model``'s configuration the vectors and the similarity that are asked for. Returns what fresh parameters' names begin with."""
    asked = config.model
    fresh = [] if model.itc_size else ["itc_head"]
    for name in NEARNESS:
        had, wanted = getattr(model, name), getattr(asked, name)
        if wanted is None:
            wanted = had
        if wanted and not contrast:
            remedy = f"give training.itc_weight above 0, or model.{name} false"
            raise UsageError(f"matching would weigh how near vectors are ({name}), and none are trained: {remedy}")
        setattr(model, name, wanted)
        fresh += [name] if wanted and not had else []
    if not model.itc_size:
        model.itc_pooling, model.itc_regions = asked.itc_pooling, asked.itc_regions
    model.itc_size = (model.itc_size or asked.itc_size) if contrast else 0
    return "|".join(fresh) or r"(?!)"


def _forward_flops(config: InterBertConfig, batch: RetrievalBatch) -> int:
    """The pass of pairs, and with contrast that of both sides alone; the one before it, without gradients, does not count."""
    pairs, sides = inputs_flops(config, batch.inputs), batch.sides
    return pairs if sides is None else pairs + alone_flops(config, sides.text_lengths, sides.region_lengths)


def _stream(config: RetrievalConfig, start: Start, pairs: Pairs, store: FeatureStore, world: World) -> RetrievalStream:
    assert start.config.max_text_tokens is not None
    assert start.config.max_regions is not None
    max_tokens, max_regions = start.config.max_text_tokens, start.config.max_regions
    settings = group_settings(config, contrast=start.config.itc_size > 0)
    path = config.output / "cache" / "tokens-train.arrow"

    def build() -> None:
        build_token_table(pairs, start.vocabulary, max_tokens, path)

    on_first_rank(build)
    tokens = open_token_table(path, table_key(pairs, start.vocabulary, max_tokens))
    neighbours = _neighbours(config, pairs, store, max_regions) if settings.needs_neighbours else None
    facts, listwise = start.vocabulary.facts, config.data.objective == "listwise"
    return RetrievalStream(
        pairs=pairs,
        store=store,
        tokens=tokens,
        vocabulary=facts,
        settings=settings,
        max_regions=max_regions,
        listwise=listwise,
        neighbours=neighbours,
        rank=world.rank,
        world_size=world.size,
    )


def _neighbours(config: RetrievalConfig, pairs: Pairs, store: FeatureStore, max_regions: int) -> NDArray[np.int32]:
    """Similar images of every image, found once by rank 0 and kept in the run folder. Collective."""
    folder = config.output / "cache" / NEIGHBOURS
    return open_neighbours(folder, on_first_rank(lambda: build_neighbours(pairs, store, max_regions, config.data.neighbours, folder)))


def _held_out(config: RetrievalConfig, start: Start, store: FeatureStore) -> HeldOut | None:
    """The validation gallery; None where the split has no captions."""
    wanted, path = config.validation, config.validation.pairs or config.data.pairs
    if not start.config.itc_size and (wanted.candidates is not None or wanted.best_by != "text_to_image_r_at_1"):
        named = "validation.candidates" if wanted.candidates is not None else f"validation.best_by {wanted.best_by}"
        raise UsageError(f"{named} needs a model with vectors of its own; leave it out, or give training.itc_weight above 0")
    if wanted.pairs is None and not has_split(path, wanted.split):
        return None
    own = FeatureStore(wanted.store) if wanted.store is not None else store
    require_same_detector(store, own, "validation.store")
    assert start.config.max_text_tokens is not None
    assert start.config.max_regions is not None
    return open_held_out(
        path, own, wanted.split, wanted.images, wanted.captions_per_image,
        start.vocabulary, start.config.max_text_tokens, start.config.max_regions, config.data.max_bad,
    )  # fmt: skip


def _told_of(held_out: HeldOut | None, config: RetrievalConfig) -> str:
    if held_out is None:
        return f"no captions of split {config.validation.split!r}: no validation, the last checkpoint is the result"
    return held_out.told(config.validation.split)
