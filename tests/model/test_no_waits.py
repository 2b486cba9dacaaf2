"""No host waits for its GPU in forward, loss and backward: every step and every score on a GPU that refuses to be waited for."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from megainter import InterBertForMultipleChoice, InterBertForPreTraining, InterBertForRetrieval, InterBertForSequenceClassification
from megainter.model.grid import embed_captions, embed_images, score_grid
from megainter.tasks.classification.batches import LabelledBatch
from megainter.tasks.classification.objective import ClassificationStep
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.tasks.retrieval.batches import RetrievalBatch
from megainter.tasks.retrieval.objective import RetrievalStep
from megainter.tasks.vcr.batches import ChoiceBatch
from megainter.tasks.vcr.objective import ChoiceStep
from tests.fake_gpu import GPU, Waits, fake_gpu
from tests.model.tiny import packed_batch, tiny_config

DROPPING = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "region_hidden_dropout_prob": 0.2}


def pretraining(objective: str = "class") -> tuple[nn.Module, PretrainBatch, int]:
    config = tiny_config(region_objective=objective, **DROPPING)
    width = 7 if objective == "class" else 10
    inputs = packed_batch()
    labels = torch.tensor([3, 4, 5]), torch.rand(2, width).softmax(-1), torch.tensor([0, 1, 0, 1])
    batch = PretrainBatch(inputs, torch.tensor([1, 3, 7]), labels[0], torch.tensor([1, 6]), labels[1], labels[2])
    return PretrainingStep(InterBertForPreTraining(config), ObjectiveWeights()), batch, 3


def retrieval(listwise: bool) -> tuple[nn.Module, RetrievalBatch, int]:
    return RetrievalStep(InterBertForRetrieval(tiny_config(**DROPPING))), RetrievalBatch(packed_batch(), 2, listwise), 1


def choices() -> tuple[nn.Module, ChoiceBatch, int]:
    batch = ChoiceBatch(packed_batch(), torch.tensor([2]), torch.tensor([1]), 2)
    return ChoiceStep(InterBertForMultipleChoice(tiny_config(**DROPPING)), (1.0, 0.5)), batch, 2


def classes(labels: Tensor, **changes: object) -> tuple[nn.Module, LabelledBatch, int]:
    model = InterBertForSequenceClassification(tiny_config(num_labels=3, **DROPPING, **changes))
    return ClassificationStep(model), LabelledBatch(packed_batch(), labels), 1


STEPS: dict[str, Callable[[], tuple[nn.Module, object, int]]] = {
    "pretraining": pretraining,
    "pretraining on features": lambda: pretraining("feature"),
    "retrieval, pairs": lambda: retrieval(False),
    "retrieval, lists": lambda: retrieval(True),
    "vcr": choices,
    "classes": lambda: classes(torch.tensor([0, 2, 1, 1]), problem_type="single_label_classification"),
    "soft labels": lambda: classes(torch.rand(4, 3), problem_type="multi_label_classification"),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_waits_for_nothing(name: str, dtype: torch.dtype) -> None:
    with fake_gpu():
        step, batch, kinds = STEPS[name]()
        step = step.to(dtype).to_empty(device=GPU).train()
        loss, tallies = step(batch.to(GPU), torch.ones(kinds, device=GPU))  # type: ignore[attr-defined]
        loss.backward()
        assert (loss.device, tallies.device) == (GPU, GPU)
        missing = [name for name, parameter in step.named_parameters() if parameter.grad is None]
        assert missing == []


def test_scoring_waits_for_nothing() -> None:
    with fake_gpu():
        model = InterBertForRetrieval(tiny_config()).to_empty(device=GPU).eval()
        inputs = packed_batch().to(GPU)
        captions = embed_captions(model, inputs.input_ids, inputs.text_lengths)
        images = embed_images(model, inputs.region_features, inputs.region_locations, inputs.region_lengths)
        scores = score_grid(model, captions, images)
        assert (scores.device, scores.shape) == (GPU, (4, 4))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool((x > 0).all()), lambda x: x.cpu(), lambda x: x.tolist(),
        lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.masked_select(x > 0), lambda x: torch.tensor([1.0], device=GPU),
        lambda x: x.new_tensor([1.0]), lambda x: x.to("cpu", non_blocking=True), lambda x: x[torch.tensor([0, 1])],
        lambda x: x + torch.ones(4), lambda x: x.numpy(), lambda x: torch.ones(4).to(GPU), lambda x: x[[0, 1]],
        lambda x: torch.repeat_interleave(x, torch.ones(4, dtype=torch.long, device=GPU)),
        lambda x: torch.ones(4).copy_(x), lambda x: x.copy_(torch.ones(4)), lambda x: torch.unique(x), lambda x: x.__setitem__(x > 0, 1.0),
    ],
)  # fmt: skip
def test_what_waits_is_refused(wait: Callable[[Tensor], object]) -> None:
    with fake_gpu(), pytest.raises(Waits):
        wait(torch.ones(4, device=GPU))


def test_what_does_not_wait_passes() -> None:
    with fake_gpu():
        x = torch.ones(4, device=GPU)
        x = torch.where(x > 0, x, 0.0) + torch.ones(4).to(GPU, non_blocking=True) * torch.tensor(2.0)
        assert (x.shape, x.device, x.is_cuda) == ((4,), GPU, True)
