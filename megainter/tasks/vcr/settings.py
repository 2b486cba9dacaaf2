"""Settings of fine-tuning for VCR."""

import dataclasses
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from megainter.config.settings import STRICT, FinetuneConfig, NotNegative, Positive, Probability, StartConfig, TrainingConfig


@dataclass(frozen=True, config=STRICT)
class VcrData:
    """What is read, and how much of it the model sees."""

    questions: Path
    """Questions: what `megainter prepare vcr` wrote."""
    store: Path
    """Regions that the detector found: what `megainter extract` wrote."""
    objects_store: Path | None = None
    """Regions of the annotated boxes: what `megainter extract --boxes` wrote; none: the model does not see them."""
    split: str = "train"
    """Split of the questions that is trained on."""
    mode: Literal["joint", "answer", "rationale"] = "joint"
    """What is learned: answers (Q->A), rationales given the right answer (QA->R), or both in every step."""
    max_answer_tokens: Annotated[int, Field(ge=8)] = 60
    """Longest question with an answer, in tokens, [CLS] and [SEP] included; the longer part is cut first."""
    max_rationale_tokens: Annotated[int, Field(ge=8)] = 80
    """Longest question with its answer and a rationale, in tokens, [CLS] and [SEP] included; the longer part is cut first."""
    max_regions: Positive = 99
    """Most regions of an image, without the global region; annotated ones come before the detector's."""
    max_objects: Positive | None = None
    """Most annotated regions among an image's regions; none: as many as there is room for."""
    max_bad: Probability = 0.01
    """Share of images that may lack regions in a store, their questions left out; one may in any case, unless this is 0."""
    other_detector: bool = False
    """true: take regions of another detector than the starting model was trained on, which is refused otherwise."""
    workers: NotNegative = 2
    """Loader processes of each rank; 0: the rank loads for itself."""


@dataclass(frozen=True, config=STRICT)
class VcrTraining(TrainingConfig):
    """How long and in what portions (samples are questions with their four choices), exactly one of ``steps`` and ``epochs``."""

    answer_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the answers' loss in joint training."""
    rationale_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the rationales' loss in joint training."""


@dataclass(frozen=True, config=STRICT)
class VcrModel(StartConfig):
    """The model that fine-tuning starts from, and what of it may be changed; None: as the model has it."""

    tie_objects: bool = False
    """true: a word that names an object gets the embedding of the object's region added (needs data.objects_store)."""


@dataclass(frozen=True, config=STRICT)
class VcrValidation:
    """Accuracies on held-out questions, by which the best checkpoint is chosen; paths default to those of the training data."""

    questions: Path | None = None
    """Questions; none: those of the training data."""
    store: Path | None = None
    """The detector's regions; none: those of the training data."""
    objects_store: Path | None = None
    """Regions of the annotated boxes; none: those of the training data."""
    split: str = "val"
    """Split of the questions; where it has none there is no validation."""
    samples: Positive = 2000
    """Questions, the first of the split; all where there are fewer."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class VcrConfig(FinetuneConfig):
    """A whole fine-tuning run."""

    verb: ClassVar[str] = "finetune vcr"

    data: VcrData
    training: VcrTraining
    model: VcrModel
    validation: VcrValidation = dataclasses.field(default_factory=VcrValidation)
