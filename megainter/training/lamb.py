"""LAMB (You et al. 2019, arXiv 1904.00962, algorithm 2): Adam whose update of a tensor is as long as the tensor itself, times the rate.

Choices that implementations differ in:

- The ratio ||weights|| / ||update|| is not clamped (the paper's phi is taken as the identity), and 1 where either norm is 0, as in NVIDIA
  apex's ``FusedLAMB``. DeepSpeed's ``FusedLamb`` clamps it to [0.01, 10]. So what decays moves by the rate times its norm, whatever its
  gradient.
- What does not decay (biases and norms in BERT's recipe) has ratio 1, as in ``FusedLAMB`` without ``use_nvlamb``; NVLAMB and
  DeepSpeed adapt every tensor.
- Adam's direction has bias correction, as in algorithm 2 and both of the others.

Norms are those of the parameters as the model has them, also where ZeRO keeps flat tensors with pieces of several.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megainter.training.clipping import chunk_owners, squared_norms


@dataclass(frozen=True)
class Place:
    """Elements [offset, offset + numel) of a flat tensor: a piece, or the whole, of parameter ``number``."""

    number: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Layout:
    """Where the pieces of ``parameters`` parameters lie: ``places`` and ``owners`` (of their chunks) by the id of the flat tensor.

    ``sharded``: pieces of one parameter lie on several ranks. ``device`` is that of the process group.
    """

    places: Mapping[int, Sequence[Place]]
    owners: Mapping[int, Tensor]
    parameters: int
    device: torch.device
    sharded: bool


def layout_of(places: Mapping[int, Sequence[Place]], parameters: int, device: torch.device, sharded: bool) -> Layout:
    """The layout of ``places`` (by the id of the flat tensor, none of them empty), its index tensors put on ``device`` once."""
    owners = {flat: chunk_owners((place.number, place.numel) for place in held).to(device) for flat, held in places.items()}
    return Layout(places, owners, parameters, device, sharded)


class Lamb(torch.optim.Optimizer):
    """LAMB over fp32 tensors that are parameters, or, after ``lay_out``, hold pieces of them.

    A step leaves the update in the gradients, which costs no memory beyond Adam's. A tensor's state is ``step`` (float32, scalar),
    ``exp_avg`` and ``exp_avg_sq`` (as the tensor). A ``step`` of infinity means no bias correction.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._layout: Layout | None = None

    def lay_out(self, layout: Layout) -> None:
        """Take the norms of parameters as ``layout`` has them, from now on; steps are then collective where it is sharded.

        Every rank must step the same groups in the same order, and each group must hold a tensor with a gradient on all or none.
        """
        self._layout = layout

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._layout or self._whole_tensors()
        for group in self.param_groups:
            flats = [flat for flat in group["params"] if flat.grad is not None]
            if not flats:
                continue
            updates = self._directions(group, flats)
            if group["weight_decay"]:
                torch._foreach_add_(updates, flats, alpha=group["weight_decay"])
                _scale_to_weights(flats, updates, layout)
            torch._foreach_add_(flats, updates, alpha=-group["lr"])
        return loss

    def _whole_tensors(self) -> Layout:
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        places = {id(tensor): [Place(number, 0, tensor.numel())] for number, tensor in enumerate(tensors) if tensor.numel()}
        return layout_of(places, len(tensors), tensors[0].device, sharded=False)

    def _directions(self, group: dict[str, Any], flats: list[Tensor]) -> list[Tensor]:
        """Adam's directions m' / (sqrt(v') + eps) in place of the gradients, and the moments moved on."""
        (beta1, beta2), states = group["betas"], [self._state(flat) for flat in flats]
        first, second = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        updates = [flat.grad for flat in flats if flat.grad is not None]
        torch._foreach_lerp_(first, updates, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, updates, updates, 1 - beta2)
        torch._foreach_add_([state["step"] for state in states], 1.0)
        steps = torch.stack([state["step"] for state in states]).double()
        torch._foreach_copy_(updates, second)
        torch._foreach_sqrt_(updates)
        torch._foreach_div_(updates, list((1 - beta2**steps).sqrt().float().unbind()))
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_mul_(updates, list((1 - beta1**steps).float().unbind()))
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        return updates

    def _state(self, flat: Tensor) -> dict[str, Tensor]:
        state = self.state[flat]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state |= {key: torch.zeros_like(flat, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        return state


def _scale_to_weights(flats: list[Tensor], updates: list[Tensor], layout: Layout) -> None:
    """Multiply each parameter's update by ||weights|| / ||update||, or by 1 where one of them is 0. Collective where sharded."""
    places = [layout.places.get(id(flat), ()) for flat in flats]
    none = torch.empty(0, dtype=torch.long, device=layout.device)
    owners = torch.cat([none, *(layout.owners[id(flat)] for flat in flats if id(flat) in layout.owners)])
    weights, pieces = _views(flats, places), _views(updates, places)
    squares = torch.stack([squared_norms(views, owners, layout.parameters) for views in (weights, pieces)])
    if layout.sharded:
        dist.all_reduce(squares)
    of_weights, of_updates = squares.sqrt()
    ratios = torch.where((of_weights > 0) & (of_updates > 0), of_weights / of_updates, 1.0).to(flats[0])
    numbers = [place.number for held in places for place in held]
    if pieces:
        by_number = ratios.unbind()
        torch._foreach_mul_(pieces, [by_number[number] for number in numbers])


def _views(tensors: list[Tensor], places: list[Sequence[Place]]) -> list[Tensor]:
    return [tensor.view(-1).narrow(0, place.offset, place.numel) for tensor, held in zip(tensors, places) for place in held]
