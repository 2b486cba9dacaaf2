"""What DeepSpeed does around a step, in few launches and without waiting for the device: functions bound over methods of a built engine.

DeepSpeed 0.19 walks over parameters: it casts, copies, adds, checks and measures each gradient by itself, and asks the device several
times a step whether gradients are finite. Here lists of tensors go to one call, the norm is taken over flat gradients, and whether a step
counts stays on the device, where torch's fused AdamW reads it. In fp16 the host must know it, for the loss scale: it waits once a step.

The norm is exact to fp32 (``clipping``); DeepSpeed's own misses it by up to a thousandth on the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megainter.training.clipping import total_norm
from megainter.training.same_host import everyones
from megainter.training.spikes import SpikeWindow

READ = ("0.19.8",)  # releases of DeepSpeed whose methods were read and are replaced; others do their own work
_EPSILON = 1e-6  # DeepSpeed's and torch's, added to the norm before dividing by it
_PIECE = 1 << 17  # elements
_STAGE3_SUMS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"

# What is used of each wrapper; one without it (a JSON of the user's may ask for another kind) keeps its own methods.
_USED = {
    "BF16_Optimizer": (
        "bf16_groups", "fp32_groups_gradients", "fp32_groups_has_gradients", "fp32_groups_gradient_flat_partition",
        "fp32_groups_flat_partition", "update_hp_grads", "zero_grad", "update_lp_params", "_lazy_init_hp_params_optimizer_state",
        "bf16_groups_flat", "bf16_partitioned_groups", "fp32_groups_gradients_flat", "fp32_groups_actual_gradients_flat",
        "fp32_groups_gradient_dict", "immediate_grad_update", "create_grad_acc_hooks", "non_expert_gradients", "_split_flat_tensor",
        "_update_storage_to_flattened_tensor",
    ),
    "DeepSpeedZeroOptimizer": (
        "bit16_groups", "single_partition_of_fp32_groups", "averaged_gradients", "all_grad_tensors", "partition_size", "loss_scale",
        "flatten_dense_tensors_aligned", "_get_preflattened_grad_partition", "_release_preflattened_grad_buffers", "_update_scale",
        "allreduce_bucket", "allreduce_and_copy_with_multiple_ranks", "unflatten", "update_lp_params", "micro_step_id", "zero_grad",
        "_lazy_init_hp_params_optimizer_state",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        "fp16_groups", "averaged_gradients", "partition_grads", "has_overflow", "_get_norm_groups", "_pre_step", "_post_step", "zero_grad",
        "_partition_all_parameters", "_prepare_sub_group", "_optimizer_step", "_reassign_or_swap_out_partitioned_parameters",
        "_release_sub_group", "fp32_partitioned_groups_flat", "_offload_boundary_param_ids", "micro_step_id", _STAGE3_SUMS,
    ),
}  # fmt: skip
_SPECIAL = ("cpu_offload", "offload_optimizer", "zenflow", "has_moe_layers", "use_muon", "torch_autocast_gradscaler")


class Updates:
    """The optimiser's steps of one engine, and how many were left out because their gradient was not finite."""

    def __init__(self, inner: torch.optim.Optimizer, clip_norm: float, sharded: bool, scaled: bool) -> None:
        self.inner, self.clip_norm, self.sharded = inner, clip_norm, sharded
        self.by_kernel = type(inner) is torch.optim.AdamW and bool(inner.defaults["fused"])
        self.on_device = self.by_kernel and not scaled  # whether a step that cannot be made is left out without the host's knowing
        self.left_out: Tensor | None = None  # float32 []: 1 where the last step was left out, else 0
        self._count: Tensor | None = None
        self.spikes: SpikeWindow | None = None  # by which a step that is a spike is left out
        self.spiked = False  # whether the host has left the last step out for that, or because it was to hold it
        self.loss: Tensor | None = None  # float32 []: that of the coming step, by which it is judged; None: it is not
        self.judged: Tensor | None = None  # what ``spikes`` says of the last step
        self.hold = False  # whether the coming step is to be left out whatever it is
        self.norm_seen: Tensor | None = None  # float32 []: the norm of the last step, times the loss scale
        self.scale_seen = 1.0  # that loss scale

    def forget(self) -> None:
        """Count anew, as after a start."""
        self.left_out = self._count = self.judged = None

    def count_left_out(self) -> int:
        """Steps left out on the device so far; waits for it."""
        return int(self._count) if self._count is not None else 0

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients together, of all ranks' where they are shared out: float32 [], collective."""
        return total_norm(gradients, self.sharded)

    def fits(self, norm: Tensor, loss_scale: float = 1.0) -> bool:
        """Whether a step with gradients of this norm is to be made; always True where the device leaves it out by itself."""
        self.norm_seen, self.scale_seen = norm, loss_scale
        finite, spike = torch.isfinite(norm), self._spike(norm, loss_scale)
        if self.hold:
            spike = torch.ones_like(finite)
        if not self.on_device:
            fits, self.spiked = (finite.item(), False) if spike is None else torch.stack([finite, spike]).tolist()
            return bool(fits) and not self.spiked
        left_out = ~finite if spike is None else ~finite | spike
        self.inner.found_inf = self.left_out = left_out.float()  # type: ignore[attr-defined]  # 1: its kernel does nothing
        self._count = self.left_out if self._count is None else self._count + self.left_out
        return True

    def _spike(self, norm: Tensor, loss_scale: float) -> Tensor | None:
        """Whether the step is to be left out as a spike, bool []; None where that is not asked."""
        if self.spikes is None or self.loss is None:
            return None
        self.judged, self.loss = self.spikes.judge(self.loss, norm / loss_scale), None
        return self.judged[0] > 0

    def step(self, flats: Sequence[Tensor], norm: Tensor, loss_scale: float, step: Callable[[], Any]) -> None:
        """Clip the gradients of ``flats`` by the ``norm`` of all, undo their loss scale, and ``step``."""
        factor = (norm / loss_scale + _EPSILON).div(self.clip_norm).clamp(min=1.0) * loss_scale if self.clip_norm else None
        if self.by_kernel and factor is not None:
            self.inner.grad_scale = factor  # type: ignore[attr-defined]  # the kernel divides by it as it reads
        elif factor is not None or loss_scale != 1.0:
            gradients = [flat.grad for flat in flats if flat.grad is not None]
            torch._foreach_mul_(gradients, 1.0 / (loss_scale if factor is None else factor))
        step()


def join(engine: Any, inner: torch.optim.Optimizer, sharded: bool, release: str) -> Updates | str:
    """Bind the functions that fit ``engine`` of this ``release`` of DeepSpeed; or why its own stay. ``sharded``: ZeRO on several ranks.

    At stage 0, where DeepSpeed makes every update whatever its gradient, it is left out where that is not finite, in any release.
    """
    wrapper = type(engine.optimizer).__name__
    if engine.optimizer is inner:
        updates = _guard_stage0(engine, Updates(inner, float(engine.gradient_clipping()), sharded=False, scaled=False))
        return _join_stage0(engine, updates) if release in READ else updates
    if release not in READ:
        return f"what takes its place is written for {', '.join(READ)}"
    if wrapper not in _USED:
        return f"its {wrapper} is not one that was read"
    optimizer = engine.optimizer
    if missing := [name for name in _USED[wrapper] if not hasattr(optimizer, name)]:
        return f"its {wrapper} has no {missing[0]}"
    if special := [name for name in _SPECIAL if getattr(optimizer, name, None)]:
        return f"{special[0]} has an order of its own"
    scaled = getattr(optimizer, "dtype", None) == torch.float16
    updates = Updates(inner, float(engine.gradient_clipping()), sharded, scaled)
    if wrapper == "BF16_Optimizer":
        return _join_bf16(engine, updates)
    return _join_stages12(optimizer, updates) if wrapper == "DeepSpeedZeroOptimizer" else _join_stage3(optimizer, updates)


def _join_stage0(engine: Any, updates: Updates) -> Updates:
    """Stage 0: gradients are the parameters' own, whole on every rank."""

    def allreduce_and_copy(small_bucket: list[Tensor], dp_group: Any, dp_world_size: Any = None) -> None:
        if dist.get_world_size(dp_group) > 1:
            reduced = engine.allreduce_bucket(small_bucket, dp_group, dp_world_size)
            torch._foreach_copy_(small_bucket, list(engine.unflatten(reduced, small_bucket)))

    engine.allreduce_and_copy = allreduce_and_copy
    return updates


def _guard_stage0(engine: Any, updates: Updates) -> Updates:
    """Clip in the optimiser's own step, which is not made where the gradient's norm is not finite."""
    optimizer = updates.inner
    make_step = optimizer.step

    @torch.no_grad()
    def step(closure: Any = None) -> None:
        gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
        engine._global_grad_norm = norm = updates.norm(gradients)
        optimizer.overflow = not updates.fits(norm)  # type: ignore[attr-defined]  # the engine counts what the host leaves out by it
        if optimizer.overflow:  # type: ignore[attr-defined]
            return
        if updates.clip_norm:
            torch._foreach_mul_(gradients, (updates.clip_norm / (norm + _EPSILON)).clamp(max=1.0))
        make_step()

    engine.clip_fp32_gradients, optimizer.step = lambda: None, step  # type: ignore[assignment,method-assign]
    return updates


def _join_bf16(engine: Any, updates: Updates) -> Updates:
    """Stage 1 in bf16: fp32 sums of the micro-batches' gradients, of whole parameters; each rank updates its part."""
    optimizer, reduce_all = engine.optimizer, engine.buffered_allreduce_fallback
    on_cpu = _on_cpu(optimizer)
    memory = _shared_memory(optimizer) if updates.sharded and on_cpu and engine.communication_data_type == torch.float32 else None
    if memory is not None:
        reduce_all, optimizer.update_lp_params = partial(_reduce_in, memory, optimizer), partial(_gather_in, memory, optimizer)
    groups = list(zip(optimizer.fp32_groups_gradients, optimizer.bf16_groups, strict=True))

    @torch.no_grad()
    def update_hp_grads(clear_lp_grads: bool = False) -> None:
        """Add gradients to the sums and free them; a step's first ones take the place of the step before's sums."""
        fresh: list[tuple[Tensor, Tensor]] = []
        further: list[tuple[Tensor, Tensor]] = []
        for (sums, parameters), seen in zip(groups, optimizer.fp32_groups_has_gradients, strict=True):
            for number, parameter in enumerate(parameters):
                if parameter.grad is not None:
                    (further if seen[number] else fresh).append((sums[number], parameter.grad.view(-1)))
                    seen[number], parameter.grad = True, None
        for pairs, put in ((fresh, torch._foreach_copy_), (further, torch._foreach_add_)):
            if pairs:
                put([total for total, _ in pairs], [gradient for _, gradient in pairs])

    @torch.no_grad()
    def _update_hp_grad(lp: Tensor, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        """The same for one gradient, as soon as it is there: on the CPU it is still in the cache, and is freed at once."""
        if lp.grad is not None:
            total, seen = optimizer.fp32_groups_gradients[group_idx][param_idx], optimizer.fp32_groups_has_gradients[group_idx]
            (total.add_ if seen[param_idx] else total.copy_)(lp.grad.view(-1))
            seen[param_idx] = True

    def buffered_allreduce_fallback(*arguments: Any, **named: Any) -> None:
        stale = [
            sums[number]
            for (sums, _), seen in zip(groups, optimizer.fp32_groups_has_gradients, strict=True)
            for number, there in enumerate(seen)
            if not there
        ]
        if stale:
            torch._foreach_zero_(stale)
        if updates.sharded:
            reduce_all(*arguments, **named)

    @torch.no_grad()
    def step(closure: Any = None) -> None:
        gradients = optimizer.fp32_groups_gradient_flat_partition
        optimizer._global_grad_norm = norm = updates.norm(gradients)
        optimizer.overflow = not updates.fits(norm)
        if optimizer.overflow:
            return
        for flat, gradient in zip(optimizer.fp32_groups_flat_partition, gradients, strict=True):
            flat.grad = gradient
        updates.step(optimizer.fp32_groups_flat_partition, norm, 1.0, updates.inner.step)
        optimizer._lazy_init_hp_params_optimizer_state()
        optimizer.update_lp_params()

    def zero_grad(set_to_none: bool = True) -> None:
        """The sums stay as they are: the next step's first gradients overwrite them."""
        for (_, parameters), seen in zip(groups, optimizer.fp32_groups_has_gradients, strict=True):
            seen[:] = [False] * len(seen)
            for parameter in parameters:
                parameter.grad = None

    optimizer.update_hp_grads, optimizer.step, optimizer.zero_grad = update_hp_grads, step, zero_grad
    if on_cpu and not optimizer.immediate_grad_update:
        optimizer.immediate_grad_update, optimizer._update_hp_grad = True, _update_hp_grad
        optimizer.create_grad_acc_hooks()
    engine.buffered_allreduce_fallback = buffered_allreduce_fallback
    return updates


def _on_cpu(optimizer: Any) -> bool:
    return bool(optimizer.bf16_groups_flat[0].device.type == "cpu")


@dataclass(frozen=True)
class _Memory:
    """What ranks of one host read of each other, [group][rank]: the fp32 sums of all gradients, and the working weights in bf16."""

    sums: list[list[Tensor]]
    weights: list[list[Tensor]]


def _shared_memory(optimizer: Any) -> _Memory | None:
    """Gradients' sums and weights moved to memory that the ranks share; None, and nothing moved, where they cannot. Collective."""
    sums = [everyones(flat) for flat in optimizer.fp32_groups_gradients_flat]
    weights = [everyones(flat) for flat in optimizer.bf16_groups_flat]
    if not all([*sums, *weights]):
        return None
    memory, rank = _Memory([group or [] for group in sums], [group or [] for group in weights]), dist.get_rank()
    for group, parameters in enumerate(optimizer.bf16_groups):
        gradients, flat = memory.sums[group][rank], memory.weights[group][rank]
        pieces = optimizer._split_flat_tensor(flat_tensor=gradients, num_elem_list=[parameter.numel() for parameter in parameters])
        size = gradients.numel() // dist.get_world_size()
        optimizer.fp32_groups_gradients_flat[group] = optimizer.non_expert_gradients[group] = gradients
        optimizer.fp32_groups_gradients[group] = optimizer.fp32_groups_gradient_dict[group] = pieces
        optimizer.fp32_groups_actual_gradients_flat[group] = gradients[: sum(piece.numel() for piece in pieces)]
        optimizer.fp32_groups_gradient_flat_partition[group] = gradients.narrow(0, rank * size, size)
        optimizer.bf16_groups_flat[group], optimizer.bf16_partitioned_groups[group] = flat, list(flat.split(size))
        optimizer._update_storage_to_flattened_tensor(tensor_list=parameters, flat_tensor=flat)
    return memory


def _reduce_in(memory: _Memory, optimizer: Any, *arguments: Any, **named: Any) -> None:
    """The mean of all ranks' sums in this rank's part; a piece at a time, so that it stays in the cache."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # all have written
    for group, part in enumerate(optimizer.fp32_groups_gradient_flat_partition):
        theirs = [
            flat.narrow(0, rank * len(part), len(part)).split(_PIECE) for number, flat in enumerate(memory.sums[group]) if number != rank
        ]
        for mine, *others in zip(part.split(_PIECE), *theirs, strict=True):
            for other in others:
                mine.add_(other)
            mine.mul_(1.0 / ranks)


def _gather_in(memory: _Memory, optimizer: Any) -> None:
    """Round the updated weights of this rank's part, and copy the others' parts of theirs."""
    rank = dist.get_rank()
    for group, master in enumerate(optimizer.fp32_groups_flat_partition):
        memory.weights[group][rank].narrow(0, rank * len(master), len(master)).copy_(master.detach())
    dist.barrier()  # all have written
    for flats in memory.weights:
        size = len(flats[rank]) // len(flats)
        for number, flat in enumerate(flats):
            if number != rank:
                flats[rank].narrow(0, number * size, size).copy_(flat.narrow(0, number * size, size))


def _join_stages12(optimizer: Any, updates: Updates) -> Updates:
    """Stages 1 and 2 otherwise: the mean gradients of this rank's part lie end to end, or in a list."""

    def gradient(group: int) -> Tensor:
        """float32 [part of the group]."""
        flat = optimizer._get_preflattened_grad_partition(group)
        if flat is None:
            flat = optimizer.flatten_dense_tensors_aligned(optimizer.averaged_gradients[group], int(optimizer.partition_size[group]))
        return flat.to(optimizer.single_partition_of_fp32_groups[group].dtype)

    def forget() -> None:
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None

    @torch.no_grad()
    def step(closure: Any = None) -> None:
        optimizer.micro_step_id = -1
        flats = optimizer.single_partition_of_fp32_groups
        gradients = [gradient(group) for group in range(len(flats))]
        forget()
        norm, scale = updates.norm(gradients), optimizer.loss_scale
        optimizer.overflow = not updates.fits(norm, scale)
        if not updates.spiked:  # which is not for the loss scale to answer
            optimizer._update_scale(optimizer.overflow)
        if optimizer.overflow:
            optimizer._global_grad_norm = float("inf")
            return
        optimizer._global_grad_norm = norm / scale
        for flat, found in zip(flats, gradients, strict=True):
            flat.grad = found
        updates.step(flats, norm, scale, updates.inner.step)
        optimizer._lazy_init_hp_params_optimizer_state()
        for flat in flats:
            flat.grad = None
        optimizer.update_lp_params()

    def allreduce_and_copy_with_multiple_ranks(
        small_bucket: list[Tensor], communication_data_type: torch.dtype, log: Any = None, divide: bool = True, process_group: Any = None,
        bucket_ranks: Any = None, output_bucket: Any = None,
    ) -> None:  # fmt: skip
        """Reduced pieces of this rank go into the sums of the micro-batches where there are such, else back to their place."""
        group = optimizer.dp_process_group if process_group is None else process_group
        reduced = optimizer.allreduce_bucket(small_bucket, communication_data_type, divide=divide, process_group=group)
        if reduced.is_cuda and optimizer.overlap_comm:
            reduced.record_stream(optimizer.reduction_stream)
        rank = dist.get_rank(group=group)
        mine = [number for number, ranks in enumerate(bucket_ranks) if rank == ranks or (isinstance(ranks, frozenset) and rank in ranks)]
        summed = [number for number in mine if output_bucket is not None and output_bucket[number] is not None]
        places = [number for number in mine if number not in set(summed)]
        if summed:
            pieces = optimizer.unflatten(reduced.to(output_bucket[summed[0]].dtype), small_bucket)
            torch._foreach_add_([output_bucket[number] for number in summed], [pieces[number] for number in summed])
        if places:
            pieces = optimizer.unflatten(reduced, small_bucket)
            torch._foreach_copy_([small_bucket[number] for number in places], [pieces[number] for number in places])
            for number in places if reduced.is_cuda and optimizer.overlap_comm else ():
                small_bucket[number].record_stream(optimizer.reduction_stream)

    optimizer.step, optimizer.allreduce_and_copy_with_multiple_ranks = step, allreduce_and_copy_with_multiple_ranks
    return updates


def _join_stage3(optimizer: Any, updates: Updates) -> Updates:
    """Stage 3: gradients of this rank's parts of all parameters, in groups that are updated one after another."""

    def partition_grads(params_to_release: list[Any], grad_partitions: list[Tensor]) -> list[Tensor]:
        """Add the parts of some gradients to the sums of the micro-batches, or put them there, and free the gradients."""
        held = [
            (parameter, part)
            for parameter, part in zip(params_to_release, grad_partitions, strict=True)
            if parameter.partition_numel() * optimizer._get_param_partition_rank(parameter) < parameter.ds_numel
        ]
        sums = [getattr(optimizer, _STAGE3_SUMS)[parameter.ds_id].narrow(0, 0, part.numel()) for parameter, part in held]
        parts = [part.to(optimizer.gradient_accumulation_dtype).view(total.shape) for total, (_, part) in zip(sums, held, strict=True)]
        if sums:
            (torch._foreach_copy_ if optimizer.micro_step_id == 0 else torch._foreach_add_)(sums, parts)
        optimizer._offload_boundary_param_ids.update(parameter.ds_id for parameter, _ in held)
        for parameter in params_to_release:
            if parameter.grad is not None and parameter.grad.is_cuda:
                parameter.grad.record_stream(torch.cuda.current_stream())
            parameter.grad = None
        return sums

    @torch.no_grad()
    def step(closure: Any = None) -> None:
        optimizer._pre_step()
        optimizer._partition_all_parameters()
        norm, scale = updates.norm([part for parts in optimizer.averaged_gradients.values() for part in parts or ()]), optimizer.loss_scale
        optimizer.overflow = not updates.fits(norm, scale)
        if updates.spiked:  # which is not for the loss scale to answer
            optimizer._overflow_clean_up(scale)
            return
        if optimizer._loss_scale_update_and_overflow_cleanup():
            return
        optimizer._global_grad_norm = norm / scale
        optimizer.zero_grad(set_to_none=True)
        timers: set[str] = set()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._prepare_sub_group(group, timers)
            updates.step([optimizer.fp32_partitioned_groups_flat[group]], norm, scale, partial(optimizer._optimizer_step, group))
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer._release_sub_group(group, timers)
        optimizer._post_step(timers)

    optimizer.partition_grads, optimizer.step = partition_grads, step
    return updates
