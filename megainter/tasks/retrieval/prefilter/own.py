"""The model's own vectors as the first stage: one checkpoint that was pretrained with image-text contrast holds both stages."""

from collections.abc import Sequence
from pathlib import Path

import torch

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import NumericsError
from megainter.model.heads import LARGEST_SCALE
from megainter.model.interbert import InterBertForRetrieval
from megainter.model.processor import InterBertProcessor
from megainter.progress import Progress
from megainter.tasks.scoring.models import load_model

AT_ONCE = 1024  # images that are read together


class OwnVectors:
    """The vectors of the model in ``folder``, in fp32 on ``device``; ``scale`` is what their products are multiplied by in training."""

    def __init__(self, folder: Path, vocabulary: Vocabulary, max_text_tokens: int, max_regions: int, device: torch.device) -> None:
        self.model = load_model(folder, InterBertForRetrieval)
        self.model.to(device)  # type: ignore[arg-type]
        self.processor = InterBertProcessor(vocabulary, self.model.config.region_feature_size, max_text_tokens, max_regions)
        self.device = device

    @property
    def scale(self) -> float:
        """At most 100, as in training."""
        assert self.model.itc_head is not None  # as encoding sees to
        return min(float(self.model.itc_head.log_scale.detach().exp()), LARGEST_SCALE)

    def captions(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [C, D] on the device, of length 1."""
        return _finite(self.model.encode_texts(texts, self.processor), "captions").to(self.device)

    def images(self, store: FeatureStore, image_ids: Sequence[str]) -> torch.Tensor:
        """float32 [I, D] on the device, of length 1; every record is read once."""
        parts = []
        with Progress("reading images", len(image_ids), "images") as progress:
            for start in range(0, len(image_ids), AT_ONCE):
                some = image_ids[start : start + AT_ONCE]
                parts.append(self.model.encode_images(store.views(some, self.processor.max_regions), self.processor))
                progress.update(len(some))
        return _finite(torch.cat(parts), "images").to(self.device)


def _finite(vectors: torch.Tensor, of: str) -> torch.Tensor:
    if not bool(vectors.isfinite().all()):
        raise NumericsError(f"the model's vectors of {of} are not finite: its weights are not; take an earlier checkpoint")
    return vectors
