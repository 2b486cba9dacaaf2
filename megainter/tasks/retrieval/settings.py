"""Settings of fine-tuning for retrieval."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megainter.config.settings import STRICT, FinetuneConfig, NotNegative, Positive, Probability


@dataclass(frozen=True, config=STRICT)
class RetrievalData:
    """What is read, and which pairs stand beside a caption's own."""

    pairs: Path
    """Captions: what `megainter prepare` wrote."""
    store: Path
    """Regions: what `megainter extract` wrote."""
    split: str = "train"
    """Split of the captions that is trained on."""
    max_text_tokens: Annotated[int, Field(ge=4)] | None = None
    """Longest caption in tokens; none: as the model was trained."""
    max_regions: Positive | None = None
    """Most regions of an image; none: as the model was trained."""
    objective: Literal["matching", "listwise"] = "matching"
    """Judge every pair for itself (the released code), or the own pair against the others of its caption (ViLBERT)."""
    random_captions: NotNegative = 1
    """Pairs of the own image with a caption of any other image."""
    random_images: NotNegative = 1
    """Pairs of the caption with any other image."""
    hard_captions: NotNegative = 1
    """Pairs of the own image with a caption of a similar image."""
    hard_images: NotNegative = 0
    """Pairs of the caption with a similar image."""
    neighbours: Positive = 99
    """Similar images of an image: so many, nearest by the mean of their regions' features."""
    max_bad: Probability = 0.01
    """Share of images that may lack regions in the store, their captions left out; one may in any case, unless this is 0."""
    other_detector: bool = False
    """true: take regions of another detector than the starting model was trained on, which is refused otherwise."""
    workers: NotNegative = 2
    """Loader processes of each rank; 0: the rank loads for itself."""


@dataclass(frozen=True, config=STRICT)
class RetrievalValidation:
    """Recall on a gallery, by which the best checkpoint is chosen; ``pairs`` and ``store`` default to those of the training data."""

    pairs: Path | None = None
    """Captions; none: those of the training data."""
    store: Path | None = None
    """Regions; none: those of the training data."""
    split: str = "val"
    """Split of the captions; where it has none there is no validation."""
    images: Positive = 200
    """Images of the gallery, the first of the split; all where there are fewer."""
    captions_per_image: Positive = 1
    """Captions of each image that are looked for."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RetrievalConfig(FinetuneConfig):
    """A whole fine-tuning run."""

    verb: ClassVar[str] = "finetune retrieval"

    data: RetrievalData
    validation: RetrievalValidation = dataclasses.field(default_factory=RetrievalValidation)
