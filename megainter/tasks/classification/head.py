"""What a classifier's logits mean: written into its configuration, and read from them again."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megainter.data.tables.labelled import TaskFacts
from megainter.model.architecture import classification_losses
from megainter.model.configuration import InterBertConfig

# In the words of transformers, where a model's configuration says what its logits mean.
PROBLEM_TYPES = {
    "single_label": "single_label_classification", "multi_label": "multi_label_classification", "regression": "regression",
}  # fmt: skip


def describe_classifier(config: InterBertConfig, task: TaskFacts, images: int) -> None:
    """Write into a model's configuration what its logits mean and how many images an example has."""
    names = dict(enumerate(task.classes or ("value",)))
    config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    config.problem_type = PROBLEM_TYPES[task.problem]  # type: ignore[assignment]
    config.num_images = images


def outcome(logits_EK: Tensor, labels: Tensor, config: Any) -> NDArray[np.float64]:
    """What is kept of the logits of E examples, [3, E]: the prediction (class or value), its probability (1 for values), the loss."""
    logits_EK = logits_EK.float()
    losses = classification_losses(logits_EK, labels, config)
    if config.problem_type == PROBLEM_TYPES["regression"]:
        values = logits_EK[:, 0]
        return torch.stack([values, torch.ones_like(values), losses]).double().cpu().numpy()
    multi = config.problem_type == PROBLEM_TYPES["multi_label"]
    chance, number = (logits_EK.sigmoid() if multi else logits_EK.softmax(1)).max(1)
    return torch.stack([number.float(), chance, losses]).double().cpu().numpy()
