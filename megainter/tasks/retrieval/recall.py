"""Recall on a small gallery while a model is trained: by vectors where it has them, by matching, and by both.

Ranks share out the work, and all of them run as many forwards: at ZeRO stage 3 they gather weights together. Shape letters: I images and C
captions of the gallery, D width of a vector.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs, images_alone, region_rows, texts_alone
from megainter.data.text.vocabulary import Vocabulary
from megainter.model.grid import EmbeddedRows, embed_captions, embed_images, score_grid
from megainter.tasks.contrast import scale_of
from megainter.tasks.retrieval.both import Sum
from megainter.tasks.retrieval.gallery import Gallery, Tokens, read_gallery, tokenize
from megainter.tasks.retrieval.prefilter.candidates import Candidates, candidates_among, rank_candidates
from megainter.tasks.retrieval.ranking import RECALL_AT, Ranks, image_to_text, rank_scores, text_to_image
from megainter.training.collective import summed
from megainter.training.world import World

PAIRS_AT_ONCE = 256
FEW_IMAGES = 50  # of a gallery: one image more or less that is found is 2 % and more
ALONE_AT_ONCE = 128  # captions or images of a forward


@dataclass(frozen=True)
class HeldOut:
    """A gallery that is ready to be measured on, and where its regions are."""

    gallery: Gallery
    tokens: Tokens
    store: FeatureStore
    max_regions: int

    def told(self, split: str) -> str:
        """What recall is measured on, for the log, and whether that is too little to say much."""
        captions, images = len(self.gallery.rows), len(self.gallery.image_ids)
        few = f"; so few say little: by chance R@1 is {1 / images:.3f}" if images < FEW_IMAGES else ""
        return f"validation: {captions:,} captions against {images:,} images of split {split!r}{few}"


def open_held_out(
    pairs: Path,
    store: FeatureStore,
    split: str,
    images: int,
    captions_per_image: int,
    vocabulary: Vocabulary,
    max_text_tokens: int,
    max_regions: int,
    max_bad: float,
) -> HeldOut:
    """The first ``images`` images of a split that have regions (all, where there are fewer) and the first captions of each."""
    gallery = read_gallery(pairs, store, split, min(images, available_images(pairs, store, split, max_bad)), captions_per_image)
    return HeldOut(gallery, tokenize(gallery.texts(), vocabulary, max_text_tokens), store, max_regions)


def available_images(pairs: Path, store: FeatureStore, split: str, max_bad: float) -> int:
    """How many images of a split have regions; ``TooManyBadInputsError`` where more than ``max_bad`` have none."""
    return len(read_gallery(pairs, store, split, None, 1, max_bad, "--data.max_bad").image_ids)


@torch.no_grad()
def recall_figures(trained: Any, held_out: HeldOut, candidates: int | None, world: World) -> dict[str, float]:
    """Recalls at 1, 5 and 10 both ways, by name: of matching, and for a model with vectors also of these (``vectors_``) and of the sum of
    both (``both_``), as `megainter evaluate retrieval` has them. Collective; the same on every rank.

    ``candidates``: matching looks at so many images of each caption and captions of each image alone, the nearest by vectors; None: at all
    pairs. The engine ``trained`` is in evaluation mode.
    """
    gallery, model = held_out.gallery, trained.module.model
    own = gallery.image_of_caption
    if model.itc_head is None:
        return _named("", rank_scores(gallery_scores(model, held_out, world), own), own)

    # By vectors, of which the nearest are candidates.
    captions_CD, log_scale = vectors_alone(trained, held_out.tokens.lengths, lambda some: _texts(held_out, some), side=0)
    counts = held_out.store.region_counts(gallery.image_ids).clip(max=held_out.max_regions)
    images_ID, _ = vectors_alone(trained, counts, lambda some: images_alone(*_regions(held_out, some)), side=1)
    logits_IC = (scale_of(log_scale) * images_ID @ captions_CD.T).cpu().numpy()
    figures = _named("vectors_", rank_scores(logits_IC, own), own)
    if candidates is None:
        scores_IC = gallery_scores(model, held_out, world)
        return (
            figures | _named("", rank_scores(scores_IC, own), own) | _named("both_", rank_scores(Sum().of(scores_IC, logits_IC), own), own)
        )

    # By matching among them.
    chosen = candidates_among(captions_CD, images_ID, candidates)
    wanted = np.zeros(logits_IC.size, np.bool_)
    wanted[chosen.keys] = True
    scores_P = gallery_scores(model, held_out, world, wanted.reshape(logits_IC.shape)).ravel()[chosen.keys]
    for name, values_P in (("", scores_P), ("both_", Sum().of(scores_P, logits_IC.ravel()[chosen.keys]))):
        figures |= _named(name, _ranks_among(chosen, own, values_P), own)
    return figures


def _ranks_among(chosen: Candidates, own: NDArray[np.integer], values_P: NDArray[np.float32]) -> Ranks:
    return rank_candidates(chosen, own, chosen.scores_of_captions(values_P), chosen.scores_of_images(values_P))


def _named(prefix: str, ranks: Ranks, own: NDArray[np.integer]) -> dict[str, float]:
    both = (("text_to_image", text_to_image(ranks)), ("image_to_text", image_to_text(ranks, own)))
    return {f"{prefix}{name}_r_at_{k}": getattr(recall, f"r_at_{k}") for name, recall in both for k in RECALL_AT}


@torch.no_grad()
def vectors_alone(trained: Any, lengths: NDArray[np.integer], pack: Callable[[Int64s], PackedInputs], side: int) -> tuple[Tensor, Tensor]:
    """Vectors float32 [n, D] of n texts (``side`` 0) or images (1) of these ``lengths``, and the logarithm of the scale [1]. Collective;
    equal on all ranks. ``pack(numbers)`` gives some of them, each alone. The engine ``trained`` is in evaluation mode."""
    model, device = trained.module.model, trained.device
    vectors, log_scale = torch.zeros(len(lengths), model.config.itc_size, device=device), torch.zeros(1, device=device)
    for numbers, counts in _turns(lengths):
        *found, log_scale = model.vectors_packed(pack(numbers).to(device))
        if counts:
            vectors[torch.from_numpy(numbers).to(device)] = found[side]
    dist.all_reduce(vectors)  # every row is one rank's, and zero in all others
    return vectors, log_scale


def _turns(lengths: NDArray[np.integer]) -> list[tuple[Int64s, bool]]:
    """This process's numbers for each forward, those of like length together; the last may count for nothing, where others have more."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    order = np.argsort(lengths, kind="stable").astype(np.int64)
    blocks = [order[start : start + ALONE_AT_ONCE] for start in range(0, len(order), ALONE_AT_ONCE)]
    mine = blocks[rank::ranks]
    return [(block, True) for block in mine] + [(order[:1], False)] * (-(-len(blocks) // ranks) - len(mine))


@torch.no_grad()
def gallery_scores(model: Any, held_out: HeldOut, world: World, wanted_IC: NDArray[np.bool_] | None = None) -> NDArray[np.float32]:
    """Log-odds float32 [I, C] of the wanted pairs (None: of all), else 0; images shared out over ranks. Collective; the same on every
    rank. All ranks run as many forwards (some may repeat a pair)."""
    images, captions = len(held_out.gallery.image_ids), len(held_out.gallery.rows)
    total = torch.zeros(images, captions, device=world.device)
    order = np.argsort(held_out.tokens.lengths, kind="stable")
    most = captions if wanted_IC is None else int(wanted_IC.sum(axis=1).max())
    for mine in _image_turns(images, world):
        numbers = mine if len(mine) else np.zeros(1, dtype=np.int64)
        features, locations, lengths = _regions(held_out, numbers)
        embedded = embed_images(model, features.to(world.device), locations.to(world.device), lengths)
        asked = order if wanted_IC is None else order[wanted_IC[numbers[0], order]]
        for start in range(0, most, PAIRS_AT_ONCE):
            some = asked[start : start + PAIRS_AT_ONCE]
            scores = score_grid(model, _captions(model, held_out.tokens, some if len(some) else order[:1], world), embedded)
            if len(mine) and len(some):
                total[mine[0], some] = scores[0]
    return summed(total).cpu().numpy()


def _image_turns(images: int, world: World) -> Iterator[NDArray[np.int64]]:
    """This rank's images, one at a time; in the last turn some ranks have none."""
    for first in range(0, images, world.size):
        number = first + world.rank
        yield np.arange(number, min(number + 1, images), dtype=np.int64)


def _captions(model: Any, tokens: Tokens, numbers: NDArray[np.int64], world: World) -> EmbeddedRows:
    ids, lengths = tokens.take(numbers)
    return embed_captions(model, ids.to(world.device), lengths)


def _texts(held_out: HeldOut, numbers: Int64s) -> PackedInputs:
    return texts_alone(*held_out.tokens.take(numbers), held_out.store.schema.feature_size)


def _regions(held_out: HeldOut, numbers: Int64s) -> tuple[Tensor, Tensor, Tensor]:
    ids = [held_out.gallery.image_ids[number] for number in numbers]
    return region_rows(held_out.store.views(ids, held_out.max_regions), held_out.max_regions)
