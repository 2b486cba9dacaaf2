"""Texts and images' regions to padded tensors with transformers' tokenizer: the processor that a model's folder carries along.

The same tensors as `model.processor` makes of a store's records, from plain arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from megainter.data.packed import region_rows
from megainter.errors import UsageError
from megainter.model.processor import USUAL_LENGTH, mask_of, padded_rows


@dataclass(frozen=True)
class ImageRegions:
    """Regions of one image: ``features`` [n, F], ``boxes`` float32 [n, 4] xyxy in pixels, ``width`` and ``height`` of the image."""

    features: np.ndarray
    boxes: np.ndarray
    width: int
    height: int

    def __len__(self) -> int:
        return len(self.boxes)


class InterBertProcessor(ProcessorMixin):
    """What turns texts and regions into inputs.

    Texts are cut to ``max_text_tokens`` tokens, [CLS] and [SEP] included; of an image the first ``max_regions`` regions are taken, after
    the global region. "[MASK]" and the other special tokens in a text are these tokens; with ``split_special_tokens`` they are ordinary
    text.
    """

    def __init__(
        self,
        tokenizer: Any,
        region_feature_size: int,
        max_text_tokens: int = USUAL_LENGTH,
        max_regions: int = USUAL_LENGTH,
        split_special_tokens: bool = False,
    ) -> None:
        super().__init__(tokenizer)
        self.region_feature_size = region_feature_size
        self.max_text_tokens = min(max_text_tokens, tokenizer.model_max_length)
        self.max_regions = max_regions
        self.split_special_tokens = split_special_tokens

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        region_features: Sequence[Any] | None = None,
        boxes: Sequence[Any] | None = None,
        image_sizes: Sequence[tuple[int, int]] | None = None,
    ) -> BatchFeature:
        """Texts and images row by row as padded tensors, by the names of the models' ``forward``.

        Of each image ``region_features`` [n, F] and ``boxes`` [n, 4] (xyxy in pixels), arrays or tensors, most confident first, and its
        size (width, height). ``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [B, T]; ``region_features`` [B, R, F] as given,
        ``region_locations`` float32 [B, R, 5], ``region_mask`` int64 [B, R], row 0 the global region. What is not given is left out.
        ``UsageError`` where they do not go together.
        """
        images = self._images(region_features, boxes, image_sizes)
        texts = [text] if isinstance(text, str) else text
        if texts is None and images is None:
            raise UsageError("give text, or region_features with boxes and image_sizes, or both")
        if texts is not None and images is not None and len(texts) != len(images):
            raise UsageError(f"{len(texts)} texts and {len(images)} images do not go together row by row")
        made: dict[str, torch.Tensor] = {}
        if texts is not None:
            made |= self._tokens(list(texts))
        if images is not None:
            features, locations, lengths = region_rows(images, self.max_regions)
            made |= {"region_features": padded_rows(features, lengths), "region_mask": mask_of(lengths)}
            made["region_locations"] = padded_rows(locations, lengths)
        return BatchFeature(made)

    def _tokens(self, texts: list[str]) -> dict[str, torch.Tensor]:
        made = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_text_tokens,
            return_tensors="pt",
            return_token_type_ids=True,
            split_special_tokens=self.split_special_tokens,
        )
        return {name: made[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def _images(
        self, features: Sequence[Any] | None, boxes: Sequence[Any] | None, sizes: Sequence[tuple[int, int]] | None
    ) -> list[ImageRegions] | None:
        if features is None and boxes is None and sizes is None:
            return None
        if features is None or boxes is None or sizes is None or not len(features) == len(boxes) == len(sizes):
            raise UsageError("region_features, boxes and image_sizes belong together, one of each for every image")
        images = [
            ImageRegions(_array(own), _array(places).astype(np.float32).reshape(-1, 4), int(width), int(height))
            for own, places, (width, height) in zip(features, boxes, sizes, strict=True)
        ]
        for image in images:
            if image.features.ndim != 2 or image.features.shape[1] != self.region_feature_size:
                raise UsageError(f"region_features of an image are {list(image.features.shape)}, not [n, {self.region_feature_size}]")
            if len(image.features) != len(image.boxes):
                raise UsageError(f"an image has {len(image.features)} region_features and {len(image.boxes)} boxes")
        return images


def _array(values: Any) -> np.ndarray:
    """A NumPy array of an array or a tensor; bfloat16, which NumPy does not have, as float32."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
        return values.numpy()
    return np.asarray(values)
