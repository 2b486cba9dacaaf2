"""One rank of a test: what the engine makes of this rank's gradients and the others', at every ZeRO stage, reduced in fp32 and bf16.

Run by torchrun with a folder; leaves Adam's first moments after one step, a tenth of the mean gradient, and the rank's own gradients.
"""

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from megainter import InterBertForPreTraining
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.training import engine, zero_speed, zero_state
from megainter.training.world import World
from tests.model.tiny import tiny_config
from tests.training.launch_worker import OFF, batch

CASES = [(stage, precision, wire) for stage, precision in ((0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"))
         for wire in ("fp32", "bf16")]  # fmt: skip


def module() -> PretrainingStep:
    """The same in every process."""
    torch.manual_seed(0)
    return PretrainingStep(InterBertForPreTraining(tiny_config(**OFF)).train(), ObjectiveWeights())


def trained(world: World, stage: int, precision: Any, wire: Any, steps: int = 1, accumulation: int = 1) -> dict[str, Tensor]:
    """This rank's share of the state after ``steps`` steps."""
    settings = EngineConfig(precision=precision, zero_stage=stage, communication=wire)
    training = TrainingConfig(steps=steps, global_batch=4 * world.size * accumulation, micro_batch=4)
    built = engine.build_engine(module(), settings, OptimizerConfig(clip_norm=0.0), training, world)
    for step in range(steps):
        engine.set_learning_rate(built, 1e-3)
        for micro in range(accumulation):
            built.backward(built(batch((step * accumulation + micro) * world.size + world.rank), torch.ones(3))[0])
            built.step()
    return {f"{kind}/{name}": tensor for kind, part in zero_state.owned_state(built, world).items() for name, tensor in part.items()}


def own(world: World, dtype: torch.dtype) -> dict[str, Tensor]:
    """This rank's gradients of the first step, by autograd alone, in ``dtype`` as fp32."""
    plain = module().to(dtype)
    plain(batch(world.rank), torch.ones(3))[0].backward()
    return {name: parameter.grad.float() for name, parameter in plain.named_parameters()}


def main(folder: Path) -> None:
    """Run all cases, and three steps of two micro-batches with memory shared between the ranks, and as it would be on GPUs."""
    torch.set_num_threads(1)
    with engine.distributed() as world:
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            save_file(own(world, dtype), folder / f"own.{name}.{world.rank}.safetensors")
        for case in CASES:
            save_file(trained(world, *case), folder / f"{'-'.join(map(str, case))}.{world.rank}.safetensors")
        save_file(trained(world, 1, "bf16", "fp32", 3, 2), folder / f"memory.{world.rank}.safetensors")
        with mock.patch.object(zero_speed, "_on_cpu", return_value=False):
            save_file(trained(world, 1, "bf16", "fp32", 3, 2), folder / f"sockets.{world.rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
