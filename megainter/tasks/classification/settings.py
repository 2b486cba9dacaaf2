"""Settings of a classifier's fine-tuning."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from megainter.config.settings import STRICT, FinetuneConfig, NotNegative, Positive, Probability


@dataclass(frozen=True, config=STRICT)
class ClassificationData:
    """What is read: labelled examples, and the regions of their images where they have some."""

    examples: Path
    """Labelled examples: what `megainter prepare examples` wrote."""
    store: Path | None = None
    """Regions: what `megainter extract` wrote; for examples with images."""
    split: str = "train"
    """Split of the examples that is trained on."""
    max_text_tokens: Annotated[int, Field(ge=5)] = 128
    """Longest text or pair of texts in tokens, [CLS] and [SEP] included; longer ones are cut."""
    max_regions: Positive | None = None
    """Most regions of an image; none: as the model was trained."""
    max_bad: Probability = 0.01
    """Share of images that may lack regions in the store, their examples left out; one may in any case, unless this is 0."""
    other_detector: bool = False
    """true: take regions of another detector than the starting model was trained on, which is refused otherwise."""
    workers: NotNegative = 2
    """Loader processes of each rank; 0: the rank loads for itself."""


@dataclass(frozen=True, config=STRICT)
class ClassificationValidation:
    """Figures on held-out examples; ``examples`` and ``store`` default to those of the training data."""

    examples: Path | None = None
    """Labelled examples; none: those of the training data."""
    store: Path | None = None
    """Regions; none: those of the training data."""
    split: str = "val"
    """Split of the examples; where it has none there is no validation."""
    figure: str | None = None
    """By which the best checkpoint is chosen; none: as the task is usually reported."""
    batch: Positive = 64
    """Examples of one forward."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class ClassificationConfig(FinetuneConfig):
    """A whole fine-tuning run."""

    verb: ClassVar[str] = "finetune classification"

    data: ClassificationData
    validation: ClassificationValidation = dataclasses.field(default_factory=ClassificationValidation)
