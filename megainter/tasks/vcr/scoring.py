"""Probabilities of VCR's choices, chunk by chunk, by one or several processes.

A chunk is the next so many items; on CPU every process computes with one thread. So the figures are bit-equal whoever computes them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.model.interbert import InterBertForMultipleChoice
from megainter.tasks.scoring.models import DTYPES, load_model
from megainter.tasks.vcr.batches import ChoiceSource, ChoiceToMake
from megainter.tasks.vcr.objective import choice_logits


@dataclass(frozen=True)
class ChoicesToScore:
    """Everything a process needs to score any chunk of ``items``."""

    model: Path
    examples: ChoiceSource
    items: list[ChoiceToMake]
    batch_questions: int
    precision: str

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_questions)

    def places(self, chunk: int) -> NDArray[np.int64]:
        """Numbers of the items of a chunk."""
        first = chunk * self.batch_questions
        return np.arange(first, min(first + self.batch_questions, len(self.items)))

    def units(self, chunk: int) -> int:
        """Items of a chunk."""
        return len(self.places(chunk))

    def scorer(self, device: torch.device) -> "ChoiceScorer":
        return ChoiceScorer(self, device)


class ChoiceScorer:
    """The model on one device, and the chunks it scores."""

    def __init__(self, work: ChoicesToScore, device: torch.device) -> None:
        self.work, self.device = work, device
        self.model = load_model(work.model, InterBertForMultipleChoice)
        # nn.Module's own method: the wrapper around it in transformers has no usable type
        torch.nn.Module.to(self.model, device=device, dtype=DTYPES[work.precision])

    @torch.inference_mode()
    def score(self, chunk: int) -> NDArray[np.float32]:
        """Probabilities [items of the chunk, 4]."""
        examples = [self.work.examples.of(self.work.items[int(place)]) for place in self.work.places(chunk)]
        logits = choice_logits(self.model, self.work.examples.collate(examples).to(self.device).inputs)
        probabilities: NDArray[np.float32] = logits.softmax(-1).cpu().numpy()
        return probabilities
