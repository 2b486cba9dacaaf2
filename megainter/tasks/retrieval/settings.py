"""Settings of fine-tuning for retrieval."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megainter.config.settings import (
    STRICT,
    FinetuneConfig,
    NotNegative,
    Positive,
    Probability,
    RecallName,
    StartConfig,
    TrainingConfig,
)


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
    """Pairs of the own image with a caption that is hard for it (data.hard_from)."""
    hard_images: NotNegative = 0
    """Pairs of the caption with an image that is hard for it."""
    hard_from: Literal["features", "first_stage"] = "features"
    """What is hard: captions and images of images with similar features (the released code), or what a first stage lets through."""
    hard_share: Probability = 1.0
    """Share of the hard pairs that are hard; the rest of them is random."""
    neighbours: Positive = 99
    """Similar images of an image, for data.hard_from "features": so many, nearest by the mean of their regions' features."""
    candidates: Positive = 50
    """Captions of an image and images of a caption, for data.hard_from "first_stage": so many, the nearest wrong ones by vectors."""
    renew_steps: NotNegative = 500
    """Steps after which they are chosen anew by the model's own vectors; 0: those of the start stay."""
    prefilter_model: Path | None = None
    """Folder that `megainter finetune prefilter` made, whose vectors choose candidates; none: the model's own, with training.itc_weight."""
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
    candidates: Annotated[int, Field(ge=10)] | None = None
    """Images of a caption and captions of an image that matching looks at, the nearest by the model's own vectors; none: all pairs."""
    best_by: RecallName = "text_to_image_r_at_1"
    """Figure by which best/ is chosen: that of matching, of the model's own vectors, or of the sum of both."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT)
class RetrievalTraining(TrainingConfig):
    """How long and in what portions, exactly one of ``steps`` and ``epochs``; and whether vectors are trained."""

    itc_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the image-text contrast loss over all captions of a step; none: 1 where the start has vectors, else 0, no vectors."""


@dataclass(frozen=True, config=STRICT)
class RetrievalStart(StartConfig):
    """The model that fine-tuning starts from, and what of it may be changed; none: as the model has it."""

    itc_size: Positive = 256
    """Width of the vectors of a text alone and an image alone, where training.itc_weight asks for them and the start has none."""
    itc_pooling: Literal["first", "mean"] = "first"
    """What these fresh vectors are made of: the pooled first token and global region, or the means of all tokens and regions."""
    itc_regions: Literal["states", "mean_feature", "first_feature"] = "states"
    """What fresh vectors of images are made of: what layers make of their regions, or the mean or the first region feature."""
    itm_similarity: bool | None = None
    """Whether matching also weighs how near the vectors of a pair are once both sides have seen each other; none: as the start has it."""
    itm_vectors: bool | None = None
    """Whether matching also weighs how near the vectors of a pair are, each side alone; none: as the start has it."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class RetrievalConfig(FinetuneConfig):
    """A whole fine-tuning run."""

    verb: ClassVar[str] = "finetune retrieval"

    data: RetrievalData
    training: RetrievalTraining
    model: RetrievalStart
    validation: RetrievalValidation = dataclasses.field(default_factory=RetrievalValidation)
