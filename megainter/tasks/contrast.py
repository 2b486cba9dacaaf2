"""Image-text contrast over the global batch: every caption against every image of a step, whatever ranks and micro-batches hold them.

A pass without gradients gives all vectors, each rank those of its samples; all ranks then compare all of them, and the micro-batches take
the gradient by their own samples' vectors from there (GradCache, arXiv 2101.06983). So the loss and its gradient depend neither on the
number of ranks nor on the cut into micro-batches, and no more than one micro-batch's activations are kept.

Shape letters: N samples of the global batch, in the order of the sequence, B a block of them, D width of a vector.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megainter.model.heads import LARGEST_SCALE
from megainter.training.arrival import Arrivals
from megainter.training.loop import dropout_seed
from megainter.training.world import World
from megainter.transfers import sent

CONTRAST = "itc"  # name of the objective
BLOCK = 1024  # captions or images that are compared with all others at once
Batch = TypeVar("Batch")  # a micro-batch whose ``sides`` have places, keys and answers
PrepareStep = Callable[[Any, int, dict[int, list[Any]]], dict[int, list[Any]]]


@dataclass(frozen=True)
class Answers:
    """What the comparison over the global batch said of the samples of a micro-batch: ``losses`` and ``right`` float32 [S], the mean of
    both directions; and the gradient of the sum of all losses, ``text_gradient`` and ``region_gradient`` float32 [S, D] by the samples'
    vectors, ``scale_gradient`` [1] their share of that by the logarithm of the scale."""

    losses: Tensor
    right: Tensor
    text_gradient: Tensor
    region_gradient: Tensor
    scale_gradient: Tensor

    def to(self, device: torch.device | str) -> "Answers":
        """The same on ``device``."""
        return Answers(*(tensor.to(device, non_blocking=True) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Vectors:
    """What is compared: ``texts`` and ``regions`` float32 [N, D] of length 1, ``log_scale`` [1], and ``keys`` int64 [N, 3] (see ``Sides``),
    all on one device and equal on all ranks."""

    texts: Tensor
    regions: Tensor
    log_scale: Tensor
    keys: Tensor


def excluded(keys_B: Tensor, keys_N: Tensor) -> Tensor:
    """bool [B, N]: pairs that are no wrong answers, of one image or with texts that read the same; a sample and itself among them."""
    same_image = keys_B[:, None, 0] == keys_N[None, :, 0]
    return same_image | (keys_B[:, None, 1] == keys_N[None, :, 1])


def scale_of(log_scale: Tensor) -> Tensor:
    """What dot products are multiplied by: at most 100, as in CLIP."""
    return log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()


def compare(vectors: Vectors, block: int = BLOCK) -> Answers:
    """Which of the N images belongs to a caption, and which of the captions to an image: cross entropy over all, both ways, in fp32.

    A sample's loss is the mean of both ways; the gradients are those of the sum over samples. Samples of the same image, and those whose
    text reads the same, are left out of each other's answers. ``block`` rows are compared at a time, so that N x N is never in memory.
    """
    with torch.enable_grad():
        texts, regions, log_scale = (tensor.detach().requires_grad_() for tensor in (vectors.texts, vectors.regions, vectors.log_scale))
        losses, right = torch.zeros(len(texts), device=texts.device), torch.zeros(len(texts), device=texts.device)
        for asking, answering in ((texts, regions), (regions, texts)):
            for start in range(0, len(texts), block):
                own = torch.arange(start, min(start + block, len(texts)), device=texts.device)
                wrong = excluded(vectors.keys[own], vectors.keys).scatter(1, own[:, None], False)
                logits = (scale_of(log_scale) * asking[own] @ answering.T).masked_fill(wrong, -math.inf)
                loss = F.cross_entropy(logits, own, reduction="none") / 2
                loss.sum().backward()
                losses[own] += loss.detach()
                right[own] += (logits.argmax(1) == own).float() / 2
    assert texts.grad is not None
    assert regions.grad is not None
    assert log_scale.grad is not None
    return Answers(losses, right, texts.grad, regions.grad, log_scale.grad)


Redraw = Callable[[list[Any], Vectors], list[Any]]


@torch.no_grad()
def add_vectors(gathering: "Gathering", trained: Any, arrivals: Arrivals, batches: Sequence[Any], seed: Callable[[int], Any]) -> None:
    """Add the vectors of a rank's micro-batches of a step, by a pass without gradients.

    ``seed(micro)`` seeds dropout as for the micro-batch's own pass, so that its vectors are these, to the bit.
    """
    for micro, (batch, here) in enumerate(arrivals.each(batches)):
        seed(micro)
        gathering.add(batch, trained(here, None))


class Gathering:
    """Collects the vectors of this process's samples by their places among N, and gives those of all processes."""

    def __init__(self, samples: int, world: World) -> None:
        self._vectors: Tensor | None = None
        self._keys = torch.zeros(samples, 3, dtype=torch.int64)
        self._log_scale = torch.zeros(1, device=world.device)
        self._samples, self._world = samples, world

    def add(self, batch: Any, made: tuple[Tensor, Tensor, Tensor]) -> None:
        """What the model made of a micro-batch's sides; a filler's is nobody's."""
        texts, regions, self._log_scale = made
        if self._vectors is None:
            self._vectors = torch.zeros(self._samples, 2, texts.shape[1], device=self._world.device)
        if batch.counted and batch.sides is not None:
            self._vectors[sent(batch.sides.places, self._world.device)] = torch.stack([texts, regions], dim=1)
            self._keys[batch.sides.places] = batch.sides.keys

    def all(self) -> Vectors:
        """The vectors of all N. Every place is one process's, and zero in all others: the sum is theirs to the bit. Collective."""
        assert self._vectors is not None
        keys = sent(self._keys, self._world.device)
        for tensor in (self._vectors, keys):
            dist.all_reduce(tensor)
        return Vectors(self._vectors[:, 0], self._vectors[:, 1], self._log_scale.detach(), keys)


def compare_in_steps(vectors: Vectors, samples: int) -> Tensor:
    """Sums of losses and of right answers, float32 [2], where ``samples`` at a time are compared, in order."""
    sums = torch.zeros(2, device=vectors.texts.device)
    for start in range(0, len(vectors.texts), samples):
        here = slice(start, start + samples)
        some = compare(Vectors(vectors.texts[here], vectors.regions[here], vectors.log_scale, vectors.keys[here]))
        sums += torch.stack([some.losses.sum(), some.right.sum()])
    return sums


def contrasting(samples: int, seed: int, world: World, redraw: Redraw | None = None) -> PrepareStep:
    """What comes before a step that contrasts its ``samples`` (``Job.prepare_step``): all vectors, and what each sample is told.

    ``seed`` is the run's: dropout falls on the vectors as it will in the step. ``redraw(batches, vectors)`` gives a rank's micro-batches
    with other pairs, drawn by the vectors.
    """
    arrivals = Arrivals(world.device)

    def prepare(trained: Any, step: int, by_rank: dict[int, list[Any]]) -> dict[int, list[Any]]:
        gathering = Gathering(samples, world)
        for rank, batches in by_rank.items():
            add_vectors(gathering, trained, arrivals, batches, partial(_seed_dropout, seed, step, rank))
        vectors = gathering.all()
        answers = compare(vectors)
        if redraw is not None:
            by_rank = {rank: redraw(batches, vectors) for rank, batches in by_rank.items()}
        return {rank: answered(batches, answers) for rank, batches in by_rank.items()}

    return prepare


def _seed_dropout(seed: int, step: int, rank: int, micro: int) -> None:
    torch.manual_seed(dropout_seed(seed, step, micro, rank))


def answered(batches: Sequence[Batch], answers: Answers) -> list[Batch]:
    """This rank's micro-batches with what the comparison said of their samples."""
    return [_answered(batch, answers) for batch in batches]


def _answered(batch: Any, answers: Answers) -> Any:
    assert batch.sides is not None
    places = sent(batch.sides.places, answers.losses.device)
    share = len(batch.sides.places) / len(answers.losses)  # of the scale's gradient: micro-batches of all ranks add up to it
    own = Answers(
        losses=answers.losses[places],
        right=answers.right[places],
        text_gradient=answers.text_gradient[places],
        region_gradient=answers.region_gradient[places],
        scale_gradient=answers.scale_gradient * share,
    )
    return replace(batch, sides=replace(batch.sides, answers=own))


def contrast_sums(model: Any, batch: Any) -> list[Tensor]:
    """The contrast's loss sum of a micro-batch's samples, float32 [], and how many are right, [1]; zeros where nothing was compared.

    The sum's value is what the comparison over the global batch said; its gradient is that of the whole comparison by these samples'
    vectors, of which all others see theirs as constants (GradCache, arXiv 2101.06983). ``model`` gives them by ``vectors_packed``.
    """
    answers = batch.sides.answers
    if answers is None:  # validation compares for itself
        nothing = batch.inputs.region_features.new_zeros(1, dtype=torch.float32)
        return [nothing[0], nothing]
    texts, regions, scale = model.vectors_packed(batch.sides.inputs(batch.inputs))
    pulled = (texts * answers.text_gradient).sum() + (regions * answers.region_gradient).sum() + (scale * answers.scale_gradient).sum()
    return [answers.losses.sum() + (pulled - pulled.detach()), answers.right.sum()[None]]
