"""Wrong pairs that the first stage lets through: what the second stage has to tell apart where both search together.

For each image the captions, and for each caption the images, that are nearest by vectors and wrong. The vectors are those of the model as
it is trained, and then made anew every so many steps; or those of a light first stage, which stay as they are.

Shape letters: C captions and I images of the training data, D width of a vector, K candidates that are kept.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megainter.data.feature_store.reader import FeatureStore
from megainter.errors import UsageError
from megainter.files import aside, remove
from megainter.tasks.retrieval.batches import RetrievalStream, WrongCandidates
from megainter.tasks.retrieval.prefilter.candidates import Nearest, nearest
from megainter.tasks.retrieval.prefilter.towers import image_vectors, load_prefilter, prefilter_digest
from megainter.tasks.retrieval.recall import vectors_alone
from megainter.tasks.retrieval.search.vectors import Towers
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.starting import Start
from megainter.training import checkpoint
from megainter.training.collective import on_first_rank
from megainter.training.loop import log
from megainter.training.renewing import FOLDER
from megainter.training.world import World


def wrong_candidates(captions_CD: Tensor, images_ID: Tensor, image_numbers: NDArray[np.integer], keep: int) -> WrongCandidates:
    """The ``keep`` nearest wrong images of each caption and wrong captions of each image; fewer where there are not as many.

    ``image_numbers`` [C]: the image of each caption. Vectors float32 on one device.
    """
    most = int(np.bincount(image_numbers).max())  # captions of an image
    images = nearest(captions_CD, images_ID, keep + 1)
    captions = nearest(images_ID, captions_CD, keep + most)
    own_C = images.numbers == image_numbers[:, None]
    own_I = image_numbers[captions.numbers] == np.arange(len(images_ID))[:, None]
    keep_captions, keep_images = min(keep, len(captions_CD) - most), min(keep, len(images_ID) - 1)
    return WrongCandidates(captions=_without(captions, own_I, keep_captions), images=_without(images, own_C, keep_images))


def _without(found: Nearest, own: NDArray[np.bool_], keep: int) -> NDArray[np.int32]:
    """int32 [Q, keep]: the best that are not a query's ``own``, best first; of equal ones the first."""
    order = np.argsort(np.where(own, np.inf, -found.scores), axis=1, kind="stable")[:, :keep]
    return np.take_along_axis(found.numbers, order, axis=1)


def own_vectors(trained: Any, stream: RetrievalStream) -> tuple[Tensor, Tensor]:
    """Vectors float32 [C, D] and [I, D] of all captions and images of ``stream``, by the model as it is. Collective; equal on all ranks."""
    trained.eval()
    captions_CD, _ = vectors_alone(trained, stream.tokens.lengths[np.arange(len(stream.tokens))], stream.texts_alone, side=0)
    images_ID, _ = vectors_alone(trained, stream.region_counts, stream.images_alone, side=1)
    trained.train()
    return captions_CD, images_ID


def tower_vectors(towers: Towers, stream: RetrievalStream) -> tuple[Tensor, Tensor]:
    """Vectors float32 [C, D] and [I, D] of all captions and images of ``stream``, by a light first stage. In one process."""
    captions_CD = torch.from_numpy(towers.encode_texts(stream.pairs.captions(range(len(stream.pairs))))).to(towers.device)
    return captions_CD, image_vectors(towers.encoder, stream.store, stream.pairs.image_ids, towers.device)


@dataclass(frozen=True)
class Renewal:
    """Gives ``stream`` its candidates, ``keep`` of each, and new ones ``every`` so many steps (0: those of the start stay).

    They are functions of the weights at the step they are made at, and lie in ``folder`` as long as a checkpoint goes on with them. Those
    of ``towers`` do not hang on the weights; where they are missing they are made again as they were.
    """

    stream: RetrievalStream
    towers: Towers | None
    folder: Path
    every: int
    keep: int

    def __call__(self, trained: Any, step: int) -> None:
        """Before ``step``, the first of a stretch or of a run that goes on. Collective."""
        made_at = step // self.every * self.every if self.every else 0
        there = self.folder / checkpoint.step_name(made_at)
        if made_at == step or not on_first_rank(there.is_dir):
            if made_at != step and self.towers is None:
                log.warning("%s is gone: candidates are made of step %d, so that the run goes on otherwise than it would have", there, step)
            self._make(trained, there, step)
        arrays = (np.load(there / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("captions", "images"))
        self.stream.candidates = WrongCandidates(*arrays)

    def _make(self, trained: Any, there: Path, step: int) -> None:
        start = time.monotonic()
        vectors = own_vectors(trained, self.stream) if self.towers is None else partial(tower_vectors, self.towers, self.stream)

        def write() -> None:
            captions, images = vectors() if callable(vectors) else vectors
            found = wrong_candidates(captions, images, self.stream.pairs.image_numbers, self.keep)
            self.folder.mkdir(parents=True, exist_ok=True)
            with aside(there) as made:
                made.mkdir()
                for name, numbers in vars(found).items():
                    np.save(made / f"{name}.npy", numbers, allow_pickle=False)
            self._forget()

        on_first_rank(write)
        log.info("candidates of the first stage at step %d, in %.1f s", step, time.monotonic() - start)

    def _forget(self) -> None:
        """Remove what no checkpoint goes on from: a save under way is of a later step than those that stand."""
        saved = min((path.name for path in (self.folder.parent / "checkpoints").glob("step_*")), default="")
        known = sorted(path.name for path in self.folder.glob("step_*"))  # in the order of the steps
        needed = max((name for name in known if name <= saved), default="")
        for name in known:
            if name < needed:
                remove(self.folder / name)


def open_towers(config: RetrievalConfig, start: Start, store: FeatureStore, world: World) -> Towers | None:
    """The light first stage of ``data.prefilter_model``; None where there is none. ``UsageError`` where candidates have no vectors, and for
    a prefilter that does not fit, or that nothing uses."""
    data, folder = config.data, config.data.prefilter_model
    if folder is not None:
        return Towers(load_prefilter(folder, start.vocabulary, store), start.vocabulary, world.device, prefilter_digest(folder))
    if data.hard_from == "first_stage" and not start.config.itc_size:
        raise UsageError(
            'data.hard_from "first_stage" needs vectors: give data.prefilter_model, a folder that `megainter finetune prefilter` made, '
            "or training.itc_weight above 0"
        )
    return None


def renewal_of(config: RetrievalConfig, stream: RetrievalStream, towers: Towers | None) -> Renewal | None:
    """What gives ``stream`` its candidates; None where no hard pairs are drawn from them."""
    data, settings = config.data, stream.settings
    if not (settings.has_hard and settings.from_candidates):
        return None
    every = data.renew_steps if towers is None else 0
    return Renewal(stream, towers, config.output / FOLDER, every, data.candidates)
