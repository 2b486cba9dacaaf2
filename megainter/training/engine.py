"""DeepSpeed, and only here: process group, engine configuration, and the fp32 state by parameter name.

What is worked around is measured on DeepSpeed 0.19.8 and said where it is done.
"""

import contextlib
import difflib
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from megainter import process
from megainter.config.portions import accumulation_steps
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.errors import MegainterError, UsageError
from megainter.files import read_json
from megainter.memory import keep_freed_memory
from megainter.training import fused_apex, zero_speed
from megainter.training.clipping import clip_each
from megainter.training.collective import first_said
from megainter.training.ema import EMA, update_average
from megainter.training.lamb import Lamb, Place, layout_of
from megainter.training.optimizer import build_optimizer, parameter_groups
from megainter.training.world import World
from megainter.training.zero_state import Piece, flat_state, inner_optimizer, pieces, pieces_by_flat, start_optimizer_state, whole_parameter

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger

log = logging.getLogger("megainter")
OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
KNOWN = (
    "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "steps_per_print",
    "wall_clock_breakdown", "dump_state", "comms_logger", "flops_profiler", "aio", "activation_checkpointing", "memory_breakdown",
    "disable_allgather", "communication_bucket_size", "seq_parallel_communication_data_type", "timers", "compile",
)  # fmt: skip

# Elements. DeepSpeed's 500 million are for a network of many GPUs: on the CPU a bucket as large as the model holds a copy of all gradients,
# from fresh pages at every step. The word embeddings of a base-size model just fit in.
CPU_BUCKET = 25_000_000

# What gloo and NCCL say when the other end of a connection has died.
PEER_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "ncclRemoteError")


@contextlib.contextmanager
def distributed() -> Iterator[World]:
    """Join the process group (gloo on CPU, NCCL on CUDA), alone or under any launcher, and leave it in order.

    Leaving without the barrier and the destruction ends in SIGABRT at exit in a third of the runs. Inside itself it shares the group
    that is there: DeepSpeed cannot join a second one in the life of a process.
    """
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), _device())
        return
    deepspeed_logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's use of torch, not the user's
    if not process.launched():
        process.become_single_process()
    cuda, device = torch.cuda.is_available(), _device()
    if cuda:
        torch.cuda.set_device(device)
    else:
        # Otherwise DeepSpeed builds a C++ extension for 30 s that only its inference uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        keep_freed_memory()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timedelta(minutes=30), verbose=False,
                               distributed_port=int(os.environ.get("MASTER_PORT", "29500")))  # fmt: skip
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()
    except RuntimeError as error:
        if any(sign in str(error) for sign in PEER_LOST):
            raise MegainterError("another process of this run is gone; the same command goes on from the last checkpoint") from error
        raise
    dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def deepspeed_config(
    engine: EngineConfig, optimizer: OptimizerConfig, training: TrainingConfig, world_size: int, accumulation: int | None = None
) -> dict[str, Any]:
    """The DeepSpeed JSON of a run: our settings, and over them the user's file, in which what we own is refused.

    ``accumulation``: micro-batches of a step on each rank; None: what ``training`` says by itself.
    """
    assert engine.precision != "auto", "what it stands for is settled where the devices are known"
    given = read_json(engine.deepspeed) if engine.deepspeed is not None else {}
    half = engine.precision != "fp32" and engine.zero_stage > 0
    settings: dict[str, Any] = {
        **_portions(training, world_size, accumulation),
        "gradient_clipping": optimizer.clip_norm if optimizer.clip == "global" else 0.0,
        "steps_per_print": 10**9,
        "communication_data_type": engine.communication,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": engine.zero_stage, "overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True},
    }
    if not torch.cuda.is_available():
        settings["zero_optimization"] |= {"reduce_bucket_size": CPU_BUCKET, "allgather_bucket_size": CPU_BUCKET}
    if half:
        settings[engine.precision] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif engine.precision == "bf16":
        # DeepSpeed's own bf16 at stage 0 takes a first step of the wrong size; fp32 weights under autocast are exact.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if engine.offload_optimizer:
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    _refuse(given, settings, engine)
    return _merged(settings, given)


def _portions(training: TrainingConfig, world_size: int, accumulation: int | None) -> dict[str, int]:
    """DeepSpeed's three numbers; it wants the first to be the product of the others and the ranks, and does nothing with the samples.

    Micro-batches of so many tokens have no fixed number of samples: they are told as one each.
    """
    portion = training.micro_batch if training.micro_tokens is None else 1
    if accumulation is None:
        accumulation = accumulation_steps(training, world_size) if training.micro_tokens is None else 1
    return {
        "train_batch_size": portion * accumulation * world_size,
        "train_micro_batch_size_per_gpu": portion,
        "gradient_accumulation_steps": accumulation,
    }


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }
    return base | both


def _refuse(given: dict[str, Any], settings: dict[str, Any], engine: EngineConfig) -> None:
    """DeepSpeed accepts and ignores misspelt top-level keys; what the run's own settings decide is refused by name."""
    for key in given:
        if key in OURS and given[key] not in ("auto", settings.get(key)):
            raise UsageError(
                f"{engine.deepspeed} sets {key!r} to {given[key]!r}; the run's own [training] and [optimizer] settings decide that"
            )
        if key not in KNOWN and key not in OURS:
            near = difflib.get_close_matches(key, KNOWN, n=1)
            raise UsageError(f"{engine.deepspeed}: unknown DeepSpeed setting {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    for key in OURS:
        given.pop(key, None)
    stage = given.get("zero_optimization", {}).get("stage", engine.zero_stage)
    if stage != engine.zero_stage:
        raise UsageError(f"{engine.deepspeed} says ZeRO stage {stage}, engine.zero_stage says {engine.zero_stage}; make them agree")
    wire = given.get("communication_data_type", engine.communication)
    if wire != engine.communication:
        raise UsageError(
            f"{engine.deepspeed} says communication_data_type {wire}, engine.communication says {engine.communication}; make them agree"
        )
    for precision in ("bf16", "fp16"):
        if given.get(precision, {}).get("enabled", engine.precision == precision) != (engine.precision == precision):
            raise UsageError(f"{engine.deepspeed} and engine.precision {engine.precision} disagree about {precision}; make them agree")


def build_engine(
    module: nn.Module, engine: EngineConfig, optimizer: OptimizerConfig, training: TrainingConfig, world: World,
    accumulation: int | None = None,
) -> Any:  # fmt: skip
    """The DeepSpeed engine over ``module`` with our optimiser: its moments present and zero, the moving average at the weights.

    ``accumulation`` as for ``deepspeed_config``.
    """
    _check_precision(engine, world)
    config = deepspeed_config(engine, optimizer, training, world.size, accumulation)
    on_cpu = engine.offload_optimizer or world.device.type == "cpu"
    ours = _build_optimizer(module, engine, optimizer, torch.device("cpu") if on_cpu else world.device)
    _admit(type(ours))
    with contextlib.redirect_stdout(None):
        built = deepspeed.initialize(model=module, optimizer=ours, config=config, dist_init_required=False)[0]
    built.updates = zero_speed.join(built, inner_optimizer(built), _is_sharded(built, world), deepspeed.__version__)
    if isinstance(built.updates, str):
        log.info("DeepSpeed %s does its own work around a step, launch by launch: %s", deepspeed.__version__, built.updates)
    if isinstance(ours, Lamb):
        _lay_out(built, ours, world)
    start_optimizer_state(built, optimizer, averaged=training.ema_decay > 0)
    if optimizer.clip == "tensor" and optimizer.clip_norm > 0:
        _clip_each_before_steps(built, optimizer.clip_norm, world)
    return built


def check_settings(engine: EngineConfig, optimizer: OptimizerConfig, training: TrainingConfig, world: World) -> None:
    """``UsageError`` for settings that contradict each other, a DeepSpeed JSON or the device: known before any data are opened."""
    _check_precision(engine, world)
    deepspeed_config(engine, optimizer, training, world.size, accumulation=1)


def _check_precision(engine: EngineConfig, world: World) -> None:
    if engine.precision == "fp16" and world.device.type == "cpu":
        raise UsageError("engine.precision fp16 needs a CUDA device; use bf16 or fp32 on CPU")


def _build_optimizer(module: nn.Module, engine: EngineConfig, optimizer: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Ours, or apex's where ``engine.apex`` asks for it and no rank lacks it; collective where it does.

    ``UsageError`` where "on" cannot be had, and where apex's numbers are wrong on any rank.
    """
    if engine.apex == "off":
        return build_optimizer(module, optimizer, device)
    piece, obstacle = fused_apex.piece(optimizer), first_said(fused_apex.obstacle(optimizer, engine.zero_stage, device))
    if obstacle is not None:
        if engine.apex == "on":
            raise UsageError(f'engine.apex is "on", but {obstacle}; or set engine.apex to "off"')
        log.info("apex %s is not used: %s", piece, obstacle)
        return build_optimizer(module, optimizer, device)
    build = fused_apex.fused_build(optimizer)
    error = fused_apex.disagreement(build, optimizer, device)
    wrong = first_said(f"{error:.1e}" if not error <= fused_apex.TOLERANCE else None)
    if wrong is not None:
        raise UsageError(f'apex {piece} is {wrong} (relative) from float64 here, beyond {fused_apex.TOLERANCE:g}; set engine.apex to "off"')
    log.info("apex %s updates the weights: within %.1e (relative) of float64 here", piece, error)
    module.to(device)  # FusedLAMB keeps a buffer where the parameters are when it is built
    return build(parameter_groups(module, optimizer), optimizer.learning_rate)


def _admit(kind: type[torch.optim.Optimizer]) -> None:
    """Let DeepSpeed take our optimiser with ZeRO: by its list, since its setting for others warns of an untested one."""
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    if kind not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def _lay_out(engine: Any, lamb: Lamb, world: World) -> None:
    """Tell LAMB which elements of the flat tensors belong to which parameter, for its norms."""
    by_flat = pieces_by_flat(engine)
    places = {flat: [Place(number, piece.offset, piece.numel) for number, piece in held] for flat, held in by_flat.items()}
    lamb.lay_out(layout_of(places, len(pieces(engine)), world.device, _is_sharded(engine, world)))


def _clip_each_before_steps(engine: Any, max_norm: float, world: World) -> None:
    """Clip in torch's hook before each step: there every wrapper has put the reduced, unscaled fp32 gradients in place.

    Some wrappers step one parameter group at a time, all ranks the same one, so that the hook's collectives match.
    """
    by_flat, parameters = pieces_by_flat(engine), len(pieces(engine))

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        flats = [flat for group in optimizer.param_groups for flat in group["params"] if flat.grad is not None]
        held = {number: piece.view(flat.grad) for flat in flats for number, piece in by_flat.get(id(flat), ())}
        clip_each(held, parameters, max_norm, world.device, _is_sharded(engine, world))

    inner_optimizer(engine).register_step_pre_hook(clip)


def _is_sharded(engine: Any, world: World) -> bool:
    return world.size > 1 and bool(engine.zero_optimization())


def set_learning_rate(engine: Any, rate: float) -> None:
    """Give every parameter group the rate of the coming update, times its own factor."""
    for group in inner_optimizer(engine).param_groups:
        group["lr"] = rate * group["rate_factor"]


def average_weights(engine: Any, decay: float) -> None:
    """Move the average of the weights after a step that was not skipped; nothing to do where ``decay`` is 0."""
    if decay > 0 and engine.was_step_applied():
        update_average(inner_optimizer(engine), decay, getattr(engine.updates, "left_out", None))


def loss_scale(engine: Any) -> float:
    """Current fp16 loss scale, 1.0 in other precisions."""
    return float(getattr(engine.optimizer, "cur_scale", 1.0))


def set_loss_scale(engine: Any, scale: float) -> None:
    """Continue with the dynamic loss scale of a checkpoint."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None and scale != 1.0:
        scaler.cur_scale = scale


def left_out(engine: Any) -> Tensor | float:
    """1 where the last update was not made because its gradient was not finite, else 0; still on the device where the host need not know.

    The same on all ranks.
    """
    on_device = None if isinstance(engine.updates, str) else engine.updates.left_out
    return float(getattr(engine.optimizer, "overflow", False)) if on_device is None else on_device


def gradient_norm(engine: Any) -> float:
    """Global gradient norm of the last update before clipping; NaN where DeepSpeed does not give it."""
    norm = engine.get_global_grad_norm()
    return float(norm) if norm is not None else float("nan")


@contextlib.contextmanager
def averaged_weights(engine: Any, world: World, active: bool = True) -> Iterator[None]:
    """The moving average in place of the working weights for a while; nothing where not ``active``. Collective."""
    if not active:
        yield
        return
    everything = pieces(engine)
    averages = {piece.name: flat_state(engine, piece.flat)[EMA] for piece in everything}
    working = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
    masters = {piece.name: piece.flat for piece in everything}
    _put_weights(engine, everything, averages, world)
    try:
        yield
    finally:
        if engine.zero_optimization_stage() == 3:
            _put_weights(engine, everything, masters, world)
        else:
            with torch.no_grad():
                for name, parameter in engine.module.named_parameters():
                    parameter.copy_(working[name])


@torch.no_grad()
def _put_weights(engine: Any, everything: list[Piece], flats: dict[str, Tensor], world: World) -> None:
    """Set the module's weights to what ``flats`` hold, assembled from all ranks' pieces, one parameter at a time."""
    for piece, parameter in zip(everything, engine.module.parameters(), strict=True):
        whole = whole_parameter(piece, flats[piece.name], world)
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(whole)
        else:
            parameter.copy_(whole)


def current_learning_rate(engine: Any) -> float:
    """The schedule's rate of the last update, before the groups' factors."""
    group = inner_optimizer(engine).param_groups[0]
    return float(group["lr"]) / float(group["rate_factor"])
