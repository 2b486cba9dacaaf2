"""Weights and moments in whole parameters, however ZeRO has cut them: taken out, averaged, put back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megainter.config.settings import OptimizerConfig
from megainter.training.collective import gathered
from megainter.training.ema import EMA
from megainter.training.optimizer import set_step_count, start_state
from megainter.training.world import World

WEIGHTS = "weights"

# Elements of a checkpoint that are copied to the host between two waits for the device: a quarter of a GB in page-locked memory.
LANDING = 1 << 26


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Our optimiser inside whatever DeepSpeed wrapped around it."""
    optimizer = engine.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@dataclass(frozen=True)
class Piece:
    """The part of one parameter whose fp32 state this rank holds: elements [start, start + numel) of the flattened parameter.

    It lies at ``offset`` of ``flat``, the fp32 tensor that the optimiser updates and keys its state by. ``speaks`` is False where
    another rank holds the same elements and answers for them (stage 0).
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int
    speaks: bool = True

    def view(self, state: Tensor) -> Tensor:
        """The piece's elements in ``state``, a tensor laid out like ``flat``."""
        return state.detach().view(-1).narrow(0, self.offset, self.numel)


def pieces(engine: Any) -> list[Piece]:
    """This rank's pieces, in the order of the module's parameters; a parameter held elsewhere has a piece of 0 elements.

    DeepSpeed's own accessors miss the moments of every group but the first at stages 1 and 2 (it links them after the first
    group's update); the flat tensors themselves are always right.
    """
    return [_piece(engine, name, parameter) for name, parameter in engine.module.named_parameters()]


def pieces_by_flat(engine: Any) -> dict[int, list[tuple[int, Piece]]]:
    """This rank's pieces that are not empty, with the parameter's number, by the id of the flat tensor they lie in."""
    by_flat: dict[int, list[tuple[int, Piece]]] = {}
    for number, piece in enumerate(pieces(engine)):
        if piece.numel:
            by_flat.setdefault(id(piece.flat), []).append((number, piece))
    return by_flat


def _piece(engine: Any, name: str, parameter: Tensor) -> Piece:
    if hasattr(parameter, "ds_id"):
        return _stage3_piece(engine.optimizer, name, parameter)
    if hasattr(parameter, "_hp_mapping"):
        return _stage12_piece(engine.optimizer, name, parameter)
    return Piece(
        name=name, shape=tuple(parameter.shape), start=0, numel=parameter.numel(), flat=parameter, offset=0, speaks=engine.global_rank == 0
    )


def _stage12_piece(optimizer: Any, name: str, parameter: Any) -> Piece:
    mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
    flats = (
        optimizer.single_partition_of_fp32_groups
        if hasattr(optimizer, "single_partition_of_fp32_groups")
        else optimizer.fp32_groups_flat_partition
    )
    if mapping is None:
        return Piece(name=name, shape=shape, start=0, numel=0, flat=flats[0], offset=0)
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Piece(name=name, shape=shape, start=here.start, numel=here.numel, flat=flats[mapping.param_group_index], offset=there.start)


def _stage3_piece(optimizer: Any, name: str, parameter: Any) -> Piece:
    group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = min(padded * optimizer._get_param_partition_rank(parameter), parameter.ds_numel)
    numel = min(padded, parameter.ds_numel - start)  # the last rank's partition is padded
    return Piece(
        name=name,
        shape=tuple(parameter.ds_shape),
        start=start,
        numel=numel,
        flat=optimizer.fp32_partitioned_groups_flat[group],
        offset=offset,
    )


def flat_state(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """The optimiser's state of one flat tensor: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``ema`` where there is one."""
    return inner_optimizer(engine).state[flat]


def _kept(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """What a checkpoint keeps of one flat tensor, by kind: the weights themselves and the state that is laid out like them."""
    return {WEIGHTS: flat, **{kind: state for kind, state in flat_state(engine, flat).items() if kind != "step"}}


def start_optimizer_state(engine: Any, settings: OptimizerConfig, averaged: bool) -> None:
    """Create the Adam state as zeros at its first step: some stages have run an empty step by now, which shifts the bias correction."""
    optimizer = inner_optimizer(engine)
    flats = [flat for group in optimizer.param_groups for flat in group["params"]] + [piece.flat for piece in pieces(engine)]
    own = list({id(flat): flat for flat in flats}.values())
    start_state(optimizer, own, settings)
    if averaged:
        for flat in own:
            optimizer.state[flat][EMA] = flat.detach().clone()


def _assembled(piece: Piece, local: Tensor, owner: int, world: World) -> Tensor | None:
    """One parameter's tensor from all ranks' pieces, on rank ``owner`` and still on its device; None elsewhere. Collective.

    Added up as integers over zeros, so that every bit arrives as it left.
    """
    buffer = _mine_over_zeros(piece, local, world)
    if world.size > 1:
        dist.reduce(buffer.view(torch.int32), dst=owner)
    return buffer.view(piece.shape) if world.rank == owner else None


def _land(waiting: list[tuple[Tensor, Tensor]]) -> None:
    """Copy float32 tensors to their places in the host's memory; the host waits for the device once for all of them."""
    on_device = [(place, tensor) for place, tensor in waiting if tensor.device.type != "cpu"]
    for place, tensor in waiting:
        if tensor.device.type == "cpu":
            place.copy_(tensor.view(place.shape))
    waiting.clear()
    if not on_device:
        return
    landing = torch.empty(sum(tensor.numel() for _, tensor in on_device), dtype=torch.float32, pin_memory=True)
    parts = landing.split([tensor.numel() for _, tensor in on_device])
    for part, (_, tensor) in zip(parts, on_device, strict=True):
        part.copy_(tensor.view(-1), non_blocking=True)
    torch.cuda.current_stream(on_device[0][1].device).synchronize()
    for part, (place, _) in zip(parts, on_device, strict=True):
        place.copy_(part.view(place.shape))


def _mine_over_zeros(piece: Piece, local: Tensor, world: World) -> Tensor:
    buffer = torch.zeros(math.prod(piece.shape), dtype=torch.float32, device=world.device)
    if piece.speaks:
        buffer.narrow(0, piece.start, piece.numel).copy_(piece.view(local))
    return buffer


def whole_parameter(piece: Piece, local: Tensor, world: World) -> Tensor:
    """One parameter's fp32 tensor from all ranks' pieces, on every rank: added up as integers over zeros. Collective."""
    buffer = _mine_over_zeros(piece, local, world)
    if world.size > 1:
        dist.all_reduce(buffer.view(torch.int32))
    return buffer.view(piece.shape)


@dataclass(frozen=True)
class Dealt:
    """Which rank writes a parameter; ``whole``: it holds all of it, so that nothing need be sent."""

    owner: int
    whole: bool


def deal(engine: Any, world: World) -> list[Dealt]:
    """Deal the module's parameters, in their order, to ranks that hold them, so that each writes about as many bytes. Collective.

    At stages 1 and 2 all but a few lie on one rank; at stage 3 each is cut over all.
    """
    own = pieces(engine)
    held = gathered([piece.numel for piece in own])
    load, dealt = [0] * world.size, []
    for number, piece in enumerate(own):
        total = math.prod(piece.shape)
        holders = [rank for rank in range(world.size) if held[rank][number] == total]
        owner = min(holders or range(world.size), key=load.__getitem__)
        load[owner] += total
        dealt.append(Dealt(owner, whole=bool(holders)))
    return dealt


def owned_shapes(engine: Any, world: World, dealt: Sequence[Dealt]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of this rank's share of the whole state: {"weights" | "exp_avg" | "exp_avg_sq" | "ema": {parameter name: shape}}."""
    own = pieces(engine)
    mine = {piece.name: piece.shape for piece, share in zip(own, dealt, strict=True) if share.owner == world.rank}
    return {kind: dict(mine) for kind in _kept(engine, own[0].flat)}


def copy_state(engine: Any, world: World, dealt: Sequence[Dealt], places: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy this rank's share of the fp32 state to ``places``, float32 CPU tensors of the shapes of ``owned_shapes``. Collective.

    Names are those of ``engine.module``.
    """
    waiting: list[tuple[Tensor, Tensor]] = []  # place, tensor on the device
    for piece, share in zip(pieces(engine), dealt, strict=True):
        for kind, local in _kept(engine, piece.flat).items():
            if not share.whole:
                tensor = _assembled(piece, local, share.owner, world)
            else:
                tensor = piece.view(local) if share.owner == world.rank else None
            if tensor is not None:
                waiting.append((places[kind][piece.name], tensor))
            if sum(tensor.numel() for _, tensor in waiting) > LANDING:
                _land(waiting)
    _land(waiting)


def owned_state(engine: Any, world: World) -> dict[str, dict[str, Tensor]]:
    """This rank's share of the whole fp32 state, in tensors of its own (``copy_state``). Collective."""
    dealt = deal(engine, world)
    places = {
        kind: {name: torch.empty(shape) for name, shape in shapes.items()} for kind, shapes in owned_shapes(engine, world, dealt).items()
    }
    copy_state(engine, world, dealt, places)
    return places


def restore_state(engine: Any, read: Callable[[str, str], Tensor], step: int) -> None:
    """Put fp32 weights, moments, moving average and step count of a checkpoint in place; ``read(kind, name)`` gives a whole tensor.

    The module's working weights must hold the same weights already (they were loaded before the engine was built).
    """
    for piece in pieces(engine):
        for kind, local in _kept(engine, piece.flat).items():
            if piece.numel:
                piece.view(local).copy_(read(kind, piece.name).view(-1).narrow(0, piece.start, piece.numel))
    engine.global_steps = step
    set_step_count(inner_optimizer(engine), step)


def update_count(engine: Any) -> int:
    """Updates the optimiser has made: fewer than the finished steps where gradients were not finite. Waits for the device."""
    on_device = 0 if isinstance(engine.updates, str) else engine.updates.count_left_out()
    return int(engine.global_steps - engine.skipped_steps - on_device)
