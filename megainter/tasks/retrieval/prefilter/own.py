"""The model's own vectors as the first stage: one checkpoint that was pretrained with image-text contrast holds both stages."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import NumericsError
from megainter.model.folder import model_digest
from megainter.model.heads import LARGEST_SCALE
from megainter.model.interbert import InterBertForRetrieval
from megainter.model.processor import InterBertProcessor
from megainter.progress import Progress
from megainter.tasks.scoring.models import load_model

AT_ONCE = 1024  # images that are read together


class OwnVectors:
    """Vectors float32 of length 1 on the CPU, of the model in ``folder``, computed in fp32 on ``device``.

    ``size`` D of them, ``scale`` from a dot product to a logit, as in training; ``most`` regions of an image that are looked at, ``digest``
    of what computes them. ``UsageError`` for a model without vectors.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, max_text_tokens: int, max_regions: int, device: torch.device) -> None:
        self.model = load_model(folder, InterBertForRetrieval)
        self.model.to(device)  # type: ignore[arg-type]
        size = self.model.config.region_feature_size
        self.processor = InterBertProcessor(vocabulary, size, max_text_tokens, max_regions, split_special_tokens=True)
        self.size, self.most, self.digest = self.model.config.itc_size, max_regions, model_digest(folder)

    @property
    def scale(self) -> float:
        """At most 100."""
        assert self.model.itc_head is not None
        return min(float(self.model.itc_head.log_scale.detach().exp()), LARGEST_SCALE)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """[n, D]; ``NumericsError`` where the weights are not finite."""
        return _finite(self.model.encode_texts(texts, self.processor), "captions").numpy()

    def encode_images(self, images: Sequence[RegionRecord | RegionViews]) -> NDArray[np.float32]:
        """[n, D]; ``NumericsError`` where the weights are not finite."""
        return _finite(self.model.encode_images(images, self.processor), "images").numpy()

    def images_of(self, store: FeatureStore, image_ids: Sequence[str]) -> NDArray[np.float32]:
        """[I, D]; every record is read once."""
        parts = []
        with Progress("reading images", len(image_ids), "images") as progress:
            for start in range(0, len(image_ids), AT_ONCE):
                some = image_ids[start : start + AT_ONCE]
                parts.append(self.encode_images(store.views(some, self.most)))
                progress.update(len(some))
        return np.concatenate(parts)


def _finite(vectors: torch.Tensor, of: str) -> torch.Tensor:
    if not bool(vectors.isfinite().all()):
        raise NumericsError(f"the model's vectors of {of} are not finite: its weights are not; take an earlier checkpoint")
    return vectors
