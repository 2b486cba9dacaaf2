"""Fine-tuning for image-text retrieval, from a pretrained model to the folder that `megainter evaluate retrieval` takes.

As the released code does it: four pairs for every caption, each judged for itself by the matching head of pretraining, and the mean over
all of them; or, as ViLBERT does, the own pair against the others of its caption. The model is validated by recall on a gallery of held-out
images.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.matching import with_regions
from megainter.data.packed import region_rows
from megainter.data.stream.negatives import require_two_images
from megainter.data.tables.pairs import Pairs, has_split, read_pairs
from megainter.data.text.token_table import build_token_table, open_token_table, table_key
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import require_same_detector
from megainter.model.flops import alone_flops
from megainter.model.grid import EmbeddedRows, embed_captions, embed_images, score_grid
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.contrast import CONTRAST, contrasting
from megainter.tasks.retrieval.batches import GroupSettings, RetrievalBatch, RetrievalStream
from megainter.tasks.retrieval.gallery import Gallery, Tokens, read_gallery, tokenize
from megainter.tasks.retrieval.learning import learn_both
from megainter.tasks.retrieval.negatives import open_towers, renewal_of
from megainter.tasks.retrieval.neighbours import NEIGHBOURS, build_neighbours, open_neighbours
from megainter.tasks.retrieval.objective import RetrievalStep
from megainter.tasks.retrieval.ranking import image_to_text, rank_scores, text_to_image
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.scoring.models import USUAL_LENGTH
from megainter.tasks.starting import Start, finetune_job, inputs_flops, open_start
from megainter.training.collective import on_first_rank, summed
from megainter.training.job import Job
from megainter.training.world import World

PAIRS_AT_ONCE = 256  # in validation


def finetune(config: RetrievalConfig) -> Path:
    """Fine-tune as ``config`` says, alone or as one rank of any launcher; returns the folder of the result (``tasks.starting``)."""
    if group_settings(config).group < 2:
        raise UsageError("all four numbers of pairs in [data] are 0: with its own pair alone a caption teaches nothing")
    return finetune_job(config, lambda world: open_job(config, world), lambda model: _complete(model, config))


def _complete(model: Path, config: RetrievalConfig) -> None:
    """Let the model in this folder learn how much each stage counts, where there is a gallery to learn it on."""
    held_out = _gallery(config, FeatureStore(config.data.store))
    if held_out is not None:
        learn_both(model, config, len(held_out[0].image_ids))


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
    contrast, fresh = _contrast_weight(config, start), r"(?!)" if start.config.itc_size else "itc_head"
    start.config.itc_size = (start.config.itc_size or config.model.itc_size) if contrast else 0
    lengths = start.config.max_text_tokens or USUAL_LENGTH, start.config.max_regions or USUAL_LENGTH
    start.config.max_text_tokens, start.config.max_regions = lengths

    # What it is trained and validated on.
    pairs = with_regions(read_pairs(data.pairs, split=data.split), store, data.max_bad, data.pairs)
    require_two_images(pairs.image_numbers, str(data.pairs))
    stream = _stream(config, start, pairs, store, world)
    gallery = _gallery(config, store)
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
        started=(told, _told_of(gallery, config)),
        workers=data.workers,
        gradient_checkpointing=config.model.gradient_checkpointing,
        validate=_validation(start, gallery) if gallery is not None else None,
        validate_every=config.validation.every_steps,
        best="text_to_image_r_at_1" if gallery is not None else None,
        prepare_step=contrasting(config.training.global_batch, config.training.seed, world) if contrast else None,
        renew=renewal,
        renew_every=renewal.every if renewal is not None else 0,
    )


def _contrast_weight(config: RetrievalConfig, start: Start) -> float:
    """As the settings say, else 1 for a model that has vectors, whose fine-tuning would spoil them without."""
    given = config.training.itc_weight
    return given if given is not None else float(start.config.itc_size > 0)


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


def _gallery(config: RetrievalConfig, store: FeatureStore) -> tuple[Gallery, FeatureStore] | None:
    """The validation gallery and its store; None where the split has no captions."""
    wanted, path = config.validation, config.validation.pairs or config.data.pairs
    if wanted.pairs is None and not has_split(path, wanted.split):
        return None
    own = FeatureStore(wanted.store) if wanted.store is not None else store
    require_same_detector(store, own, "validation.store")
    available = len(read_gallery(path, own, wanted.split, None, 1, config.data.max_bad, "--data.max_bad").image_ids)
    return read_gallery(path, own, wanted.split, min(wanted.images, available), wanted.captions_per_image), own


def _told_of(gallery: tuple[Gallery, FeatureStore] | None, config: RetrievalConfig) -> str:
    if gallery is None:
        return f"no captions of split {config.validation.split!r}: no validation, the last checkpoint is the result"
    captions, images = f"{len(gallery[0].rows):,}", f"{len(gallery[0].image_ids):,}"
    return f"validation: {captions} captions against {images} images of split {config.validation.split!r}"


def _validation(start: Start, held_out: tuple[Gallery, FeatureStore]) -> Callable[[Any, World], dict[str, float]]:
    """The function that measures recall both ways; see ``Job.validate``."""
    gallery, own = held_out
    assert start.config.max_text_tokens is not None
    assert start.config.max_regions is not None
    tokens, max_regions = tokenize(gallery.texts(), start.vocabulary, start.config.max_text_tokens), start.config.max_regions

    def validate(trained: Any, world: World) -> dict[str, float]:
        scores = gallery_scores(trained.module.model, gallery, tokens, own, max_regions, world)
        ranks = rank_scores(scores, gallery.image_of_caption)
        both = (("text_to_image", text_to_image(ranks)), ("image_to_text", image_to_text(ranks, gallery.image_of_caption)))
        return {f"{name}_r_at_{k}": getattr(recall, f"r_at_{k}") for name, recall in both for k in (1, 5, 10)}

    return validate


@torch.no_grad()
def gallery_scores(
    model: InterBertForRetrieval, gallery: Gallery, tokens: Tokens, store: FeatureStore, max_regions: int, world: World
) -> NDArray[np.float32]:
    """Log-odds float32 [I, C] of every caption against every image, images shared out over ranks. Collective; the same on every rank.

    All ranks run as many forwards (the last may repeat images): at ZeRO stage 3 they gather weights together.
    """
    images, captions = len(gallery.image_ids), len(gallery.rows)
    total = torch.zeros(images, captions, device=world.device)
    order = np.argsort(tokens.lengths, kind="stable")
    for mine in _image_turns(images, world):
        numbers = mine if len(mine) else np.zeros(1, dtype=np.int64)
        features, locations, lengths = region_rows(store.views([gallery.image_ids[i] for i in numbers], max_regions), max_regions)
        embedded = embed_images(model, features.to(world.device), locations.to(world.device), lengths)
        for start in range(0, captions, PAIRS_AT_ONCE):
            some = order[start : start + PAIRS_AT_ONCE]
            scores = score_grid(model, _captions(model, tokens, some, world), embedded)
            if len(mine):
                total[mine[0], some] = scores[0]
    return summed(total).cpu().numpy()


def _image_turns(images: int, world: World) -> Iterator[NDArray[np.int64]]:
    """This rank's images, one at a time; in the last turn some ranks have none."""
    for first in range(0, images, world.size):
        number = first + world.rank
        yield np.arange(number, min(number + 1, images), dtype=np.int64)


def _captions(model: InterBertForRetrieval, tokens: Tokens, numbers: NDArray[np.int64], world: World) -> EmbeddedRows:
    ids, lengths = tokens.take(numbers)
    return embed_captions(model, ids.to(world.device), lengths)
