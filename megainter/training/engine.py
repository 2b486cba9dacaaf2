"""DeepSpeed, and only here: process group, engine configuration, and the fp32 state by parameter name.

What is worked around is measured on DeepSpeed 0.19.8 and said where it is done.
"""

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from megainter import process
from megainter.config.portions import accumulation_steps
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.deepspeed_json import ZERO, read_deepspeed_json, refuse, without_auto, without_what_is_off, wrong_settings
from megainter.errors import MegainterError, UsageError
from megainter.memory import keep_freed_memory
from megainter.training import fused_apex, zero_speed
from megainter.training.clipping import clip_each
from megainter.training.collective import first_said, summed
from megainter.training.ema import EMA, update_average
from megainter.training.lamb import Lamb, Place, layout_of
from megainter.training.optimizer import build_optimizer, parameter_groups
from megainter.training.spikes import SpikeWindow
from megainter.training.world import World
from megainter.training.zero_state import (
    Piece,
    flat_state,
    inner_optimizer,
    pieces,
    pieces_by_flat,
    restore_state,
    start_optimizer_state,
    whole_parameter,
)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch.distributed as dist
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.compile.config import CompileConfig
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import logger as deepspeed_logger
from pydantic import ValidationError

log = logging.getLogger("megainter")
OWNER = "the run's own [training] and [optimizer] settings decide that"
OURS = ("optimizer", "scheduler", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
SECTIONS = {
    ZERO: DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "comms_logger": CommsLoggerConfig,
    "compile": CompileConfig,
}  # fmt: skip

# Elements. DeepSpeed's 500 million are for a network of many GPUs: on the CPU a bucket as large as the model holds a copy of all gradients,
# from fresh pages at every step. The word embeddings of a base-size model just fit in.
CPU_BUCKET = 25_000_000

# What torch and DeepSpeed say where a C++ or CUDA extension cannot be built.
BUILD_FAILED = ("Error building extension", "Unable to JIT load", "Ninja is required", "CUDA_HOME", "CUDA version mismatch")

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
    return settings if engine.deepspeed is None else _laid_over(read_deepspeed_json(engine.deepspeed), settings, engine, optimizer)


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


def _laid_over(given: dict[str, Any], settings: dict[str, Any], engine: EngineConfig, optimizer: OptimizerConfig) -> dict[str, Any]:
    """``settings`` with what the user's file says over them; ``UsageError`` names all that is wrong in it, or contradicts the run's own.

    DeepSpeed accepts and ignores misspelt top-level keys, and says of a section's only that something in it is wrong.
    """
    assert engine.deepspeed is not None
    problems = [
        f"{key} is {given[key]!r:.60}; {OWNER}" for key in OURS if key in given and not _agrees(key, given[key], settings, optimizer)
    ]
    asked = without_what_is_off(without_auto({key: value for key, value in given.items() if key not in OURS}))
    problems += wrong_settings(asked, SECTIONS, OURS)
    sections = {name: asked[name] if isinstance(asked.get(name), dict) else {} for name in (ZERO, "bf16", "fp16", "torch_autocast")}
    problems += _contradictions(asked, sections, settings, engine)
    problems += _missing_for_offload(sections[ZERO], engine)
    refuse(engine.deepspeed, problems)

    merged = _merged(settings, asked)
    refuse(engine.deepspeed, _refused_by_deepspeed(merged))
    return merged


def _agrees(key: str, value: Any, settings: dict[str, Any], optimizer: OptimizerConfig) -> bool:
    """Whether the file leaves to the run what the run decides: by "auto", by its own value, or by an optimiser of its kind, all "auto"."""
    if value in ("auto", settings.get(key)):
        return True
    if key not in ("optimizer", "scheduler") or not isinstance(value, dict):
        return False
    kinds = {"optimizer": ("adam", "adamw") if optimizer.name == "adamw" else ("lamb",), "scheduler": ("warmupdecaylr",)}
    params = value.get("params")
    open_params = isinstance(params, dict) and bool(params) and set(map(str, params.values())) == {"auto"}
    return open_params and set(value) <= {"type", "params"} and str(value.get("type", "")).lower() in kinds[key]


def _contradictions(
    asked: dict[str, Any], sections: dict[str, dict[str, Any]], settings: dict[str, Any], engine: EngineConfig
) -> Iterator[str]:
    zero = sections[ZERO]
    if zero.get("stage", engine.zero_stage) != engine.zero_stage:
        yield f"says ZeRO stage {zero['stage']}, engine.zero_stage says {engine.zero_stage}; make them agree"
    wire = asked.get("communication_data_type", engine.communication)
    if wire != engine.communication:
        yield f"says communication_data_type {wire}, engine.communication says {engine.communication}; make them agree"
    for precision in ("bf16", "fp16"):
        if sections[precision].get("enabled", engine.precision == precision) != (engine.precision == precision):
            yield f"{precision} and engine.precision {engine.precision} disagree about {precision}; make them agree"
    if sections["torch_autocast"].get("enabled", False) is True and "torch_autocast" not in settings:
        yield "torch_autocast is on, engine.precision decides that; leave it out"

    offloads = _offload(zero)
    if offloads is not None and offloads != engine.offload_optimizer:
        own = str(engine.offload_optimizer).lower()
        yield f"offload_optimizer is {'on' if offloads else 'off'} here, engine.offload_optimizer is {own}; make them agree"
    if asked.get("zero_force_ds_cpu_optimizer") is True and engine.offload_optimizer:
        yield f"zero_force_ds_cpu_optimizer asks for DeepSpeed's own optimiser; {OWNER}"
    if _device_of(zero, "offload_param") not in (None, "none") and engine.zero_stage != 3:
        yield f"offload_param is for ZeRO stage 3, and the stage is {engine.zero_stage}; leave it out"


def _device_of(zero: dict[str, Any], part: str) -> Any:
    return zero[part].get("device") if isinstance(zero.get(part), dict) else None


def _offload(zero: dict[str, Any]) -> bool | None:
    """Whether the file offloads the optimiser's state; None where it does not say. ``cpu_offload`` is the older name."""
    device = _device_of(zero, "offload_optimizer")
    if device is not None:
        return bool(device != "none")
    if "cpu_offload" in zero:
        return bool(zero["cpu_offload"])
    return False if "offload_optimizer" in zero and zero["offload_optimizer"] is None else None


def _missing_for_offload(zero: dict[str, Any], engine: EngineConfig) -> Iterator[str]:
    """What NVMe needs. At stages 1 and 2 DeepSpeed keeps the state in the host's memory all the same; at stage 3 in files of its own."""
    parts = [part for part in ("offload_optimizer", "offload_param") if _device_of(zero, part) == "nvme"]
    if not parts:
        return
    with hidden_output(), warnings.catch_warnings():
        buildable = AsyncIOBuilder().is_compatible(verbose=False)
    where = " and ".join(f"{ZERO}.{part}" for part in parts)
    if not buildable:
        yield f'{where}: "nvme" needs DeepSpeed\'s async_io op, and libaio is missing here to build it (Debian: libaio-dev); or give "cpu"'
    elif "offload_optimizer" in parts and engine.zero_stage == 3:
        yield f'{ZERO}.offload_optimizer: checkpoints here are read from memory, where "nvme" leaves nothing at stage 3; give "cpu"'


def _refused_by_deepspeed(merged: dict[str, Any]) -> list[str]:
    """What DeepSpeed says of the whole that no section's own rules say; the batch is its product of the ranks, whatever their number."""
    try:
        DeepSpeedConfig({key: value for key, value in merged.items() if key != "train_batch_size"})
    except (
        DeepSpeedConfigError,
        ValidationError,
        AssertionError,
        ArithmeticError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        return [f"DeepSpeed refuses it: {' '.join(str(error).split())[:300]}"]
    return []


@contextlib.contextmanager
def hidden_output() -> Iterator[None]:
    """Nothing printed reaches the user, and whoever flushes or asks for the encoding of the output, as compilers of ops do, can."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


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
    with hidden_output(), _said_of_builds(engine):
        built = deepspeed.initialize(model=module, optimizer=ours, config=config, dist_init_required=False)[0]
    built.updates = zero_speed.join(built, inner_optimizer(built), _is_sharded(built, world), deepspeed.__version__)
    if isinstance(built.updates, str):
        log.info("DeepSpeed %s does its own work around a step, launch by launch: %s", deepspeed.__version__, built.updates)
    _watch_spikes(built, training, world)
    if isinstance(ours, Lamb):
        _lay_out(built, ours, world)
    start_optimizer_state(built, optimizer, averaged=training.ema_decay > 0)
    if optimizer.clip == "tensor" and optimizer.clip_norm > 0:
        _clip_each_before_steps(built, optimizer.clip_norm, world)
    return built


@contextlib.contextmanager
def _said_of_builds(engine: EngineConfig) -> Iterator[None]:
    """An op of DeepSpeed's that cannot be built ends in one line."""
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        text = " ".join(str(error).split())
        if not any(sign in text for sign in BUILD_FAILED):
            raise
        whose = engine.deepspeed if engine.deepspeed is not None else "these settings"
        raise MegainterError(
            f"DeepSpeed cannot build an op that {whose} needs here: {text[:200]}; install a compiler, or do without"
        ) from error


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


def _watch_spikes(engine: Any, training: TrainingConfig, world: World) -> None:
    """Give the engine its window; ``UsageError`` where updates are to be left out for spikes and DeepSpeed decides on updates by itself.

    The window lies on the device only where an update hangs on it: to tell of spikes, the host judges what has arrived.
    """
    acts = training.spike_action != "tell" and training.spike_sigma > 0
    place = world.device if acts else torch.device("cpu")
    engine.spikes = SpikeWindow(training.spike_window, training.spike_sigma, place) if training.spike_sigma else None
    if isinstance(engine.updates, str):
        if acts:
            raise UsageError(
                f'training.spike_action "{training.spike_action}" needs updates that are not left to DeepSpeed, and here they are: '
                f'{engine.updates}; give "tell"'
            )
    elif acts:
        engine.updates.spikes = engine.spikes


def expect_loss(engine: Any, share: Tensor) -> None:
    """Tell the coming update its loss, of which each rank has its ``share`` (float32 [] on the device). Collective."""
    if engine.spikes is None:
        return
    engine.loss = summed(share)
    if not isinstance(engine.updates, str):
        engine.updates.loss = engine.loss


def roll_back(engine: Any, read: Callable[[str, str], Tensor], state: Mapping[str, Any], world: World) -> None:
    """Weights, moments, counts and window as a checkpoint has them, in an engine that has gone further. Collective."""
    restore_state(engine, read, state["updates"])
    engine.skipped_steps = 0
    if not isinstance(engine.updates, str):
        engine.updates.forget()
    everything = pieces(engine)
    _put_weights(engine, everything, {piece.name: piece.flat for piece in everything}, world)
    restore_decisions(engine, state)


def restore_decisions(engine: Any, state: Mapping[str, Any]) -> None:
    """The loss scale and the window of spikes of a checkpoint."""
    set_loss_scale(engine, state["loss_scale"])
    if engine.spikes is not None and state.get("spikes") is not None:
        engine.spikes.restore(state["spikes"])


def verdict(engine: Any) -> Tensor:
    """What became of the last update, on the device; the same on all ranks.

    float64 [6], (1 where it was left out else 0, and what ``SpikeWindow.judge`` says), where the device has judged or there is no window;
    else float64 [3], (1 where it was left out else 0, loss, norm), for the host to judge.
    """
    left = left_out(engine)
    if engine.spikes is None:
        seen = torch.zeros(5, dtype=torch.float64, device=engine.device)
    elif not isinstance(engine.updates, str) and engine.updates.spikes is not None:
        seen = engine.updates.judged
    else:
        seen = torch.stack([engine.loss, _last_norm(engine)]).double()
    first = left.double() if isinstance(left, Tensor) else torch.full_like(seen[0], left)
    return torch.cat([first[None], seen])


def _last_norm(engine: Any) -> Tensor:
    """The gradient norm of the last update, like the loss on the device; NaN where DeepSpeed does not give it."""
    if not isinstance(engine.updates, str):
        return engine.updates.norm_seen.to(engine.loss.dtype) / engine.updates.scale_seen
    norm = engine.get_global_grad_norm()
    if isinstance(norm, Tensor):
        return norm.to(engine.loss.dtype)
    return torch.full_like(engine.loss, math.nan if norm is None else float(norm))


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
