"""What crosses between host and device arrives as it was, in order, and pinned where a GPU is to read it without waiting."""

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from torch import Tensor

from megainter import transfers
from megainter.data.packed import PackedInputs
from megainter.data.stream.loader import make_loader
from megainter.tasks.classification.batches import LabelledBatch
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.retrieval.batches import RetrievalBatch
from megainter.tasks.vcr.batches import ChoiceBatch
from megainter.training.arrival import Arrivals
from megainter.training.stopping import StopVote

CPU = torch.device("cpu")


def inputs() -> PackedInputs:
    lengths = torch.tensor([2, 3])
    ids = torch.arange(5)
    return PackedInputs(ids, ids, lengths, torch.rand(4, 8), torch.rand(4, 5), torch.tensor([1, 3]), torch.full((5,), -1))


BATCHES: list[Callable[[], object]] = [
    lambda: PretrainBatch(inputs(), torch.tensor([1]), torch.tensor([4]), torch.tensor([2]), torch.rand(1, 6), torch.tensor([0, 1])),
    lambda: RetrievalBatch(inputs(), 2, False),
    lambda: LabelledBatch(inputs(), torch.tensor([0, 1])),
    lambda: ChoiceBatch(inputs(), torch.tensor([0]), torch.tensor([0]), 1),
]


def rows(value: object) -> list[tuple[str, Tensor]]:
    """All tensors of a batch with their names, the lengths left out: they stay on the CPU."""
    if isinstance(value, Tensor):
        return [("", value)]
    if not is_dataclass(value):
        return []
    named = [(field.name, getattr(value, field.name)) for field in fields(value) if field.name not in ("text_lengths", "region_lengths")]
    return [(f"{name}.{inner}", tensor) for name, part in named for inner, tensor in rows(part)]


@pytest.mark.parametrize("make", BATCHES)
def test_every_tensor_of_every_batch_is_pinned(make: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned.append(id(copy := tensor.clone()))
        copies.append(copy)
        return copy

    copies: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = make()
    after = batch.pin_memory()  # type: ignore[attr-defined]
    assert [name for name, tensor in rows(after) if id(tensor) not in pinned] == []
    assert all(torch.equal(a[1], b[1]) for a, b in zip(rows(batch), rows(after), strict=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert all(id(tensor) in pinned for made in make_loader([[batch]], 0, 1, workers=0) for one in made for _, tensor in rows(one))


@dataclass(frozen=True)
class Sent:
    """A batch that tells when it was sent."""

    number: int
    order: list[str]

    def to(self, device: torch.device) -> "Sent":
        self.order.append(f"sent {self.number}")
        return replace(self)


def test_the_next_micro_batch_is_sent_before_the_last_is_computed() -> None:
    order: list[str] = []
    for batch, here in Arrivals(CPU).each([Sent(number, order) for number in range(3)]):  # type: ignore[arg-type]
        assert batch.number == here.number  # type: ignore[attr-defined]
        order.append(f"computed {here.number}")
    assert order == ["sent 0", "sent 1", "computed 0", "sent 2", "computed 1", "computed 2"]


def test_a_wish_to_stop_is_heard_at_once_on_a_cpu() -> None:
    vote = StopVote(CPU)
    assert [vote.passed(torch.tensor(wishes)) for wishes in (0.0, 2.0, 0.0)] == [False, True, False]


def test_tensors_that_are_sent_together_arrive_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.arange(6).view(2, 3), torch.rand(4), torch.zeros(0, dtype=torch.int64), torch.tensor(3), torch.rand(2, 2, 1)]
    there = transfers.sent_together(tensors, torch.device("meta"))
    assert [(t.shape, t.dtype, t.device.type) for t in there] == [(t.shape, t.dtype, "meta") for t in tensors]
    copies: list[torch.dtype] = []

    class Elsewhere:  # a device that is not the CPU by its type, and whose memory can be read here
        type = "elsewhere"

    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda x, device, **how: copies.append(x.dtype) or to(x, CPU))
    there = transfers.sent_together(tensors, Elsewhere())  # type: ignore[arg-type]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors, there, strict=True))
    assert sorted(map(str, copies)) == ["torch.float32", "torch.int64"]


def test_what_is_read_at_once_is_what_was_there_to_the_bit() -> None:
    values = [torch.rand(2, 3), torch.tensor([float("nan")]), torch.rand(4, dtype=torch.float64), torch.tensor([3.4e38, 1e-45])]
    for value, found in zip(values, transfers.read(*values), strict=True):
        assert found.dtype == value.dtype
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


def test_constants_stay_float32_in_a_module_of_half_precision() -> None:
    weights = transfers.Constants((0.3, 1.0))
    assert weights.on(CPU).dtype == torch.float32
    assert weights.on(CPU) is weights.on(CPU)
