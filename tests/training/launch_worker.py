"""Training steps of a tiny model through the engine, counted; prints one JSON object. A process of its own: DeepSpeed joins one group."""

import json
import math
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megainter import InterBertForPreTraining
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.training import engine, zero_speed, zero_state
from megainter.training.world import World
from tests.model.tiny import packed_batch, tiny_config
from tests.training.launches import counted, is_models

STAGES = {"fp32": (0, 1, 2, 3), "bf16": (0, 1, 2, 3), "fp16": (1, 2, 3)}
# Micro-batches of a step: accumulation has a path of its own where gradients are summed in fp32.
CASES = [(precision, stage, 1) for precision, stages in STAGES.items() for stage in stages] + [("bf16", stage, 2) for stage in (1, 2, 3)]
EMA = 0.9
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "region_hidden_dropout_prob": 0.0}


class Trained:
    """A tiny model in its engine, ``accumulation`` micro-batches a step."""

    def __init__(self, world: World, precision: Any, stage: int, accumulation: int) -> None:
        torch.manual_seed(0)
        self.module = PretrainingStep(InterBertForPreTraining(tiny_config(**OFF)).train(), ObjectiveWeights())
        training = TrainingConfig(steps=10, global_batch=4 * accumulation, micro_batch=4, ema_decay=EMA)
        settings = EngineConfig(precision=precision, zero_stage=stage)
        self.engine = engine.build_engine(self.module, settings, OptimizerConfig(), training, world)
        self.accumulation = accumulation

    def step(self, number: int, factor: float = 1.0) -> None:
        """Step ``number``, with the gradients times ``factor``."""
        engine.set_learning_rate(self.engine, 1e-3)
        for micro in range(self.accumulation):
            loss, _ = self.engine(batch(number * self.accumulation + micro), torch.ones(3))
            self.engine.backward(loss * factor)
            if micro + 1 == self.accumulation:
                engine.expect_loss(self.engine, loss.detach())
            self.engine.step()
        engine.average_weights(self.engine, EMA)
        engine.verdict(self.engine)

    def state(self, world: World) -> dict[str, Tensor]:
        """fp32 weights, moments and average; and the number of updates."""
        share = zero_state.owned_state(self.engine, world)
        counts = {"updates": torch.tensor(zero_state.update_count(self.engine)), "adam": step_count(self.engine)}
        return counts | {f"{kind}/{name}": tensor.clone() for kind, part in share.items() for name, tensor in part.items()}


def step_count(trained: Any) -> Tensor:
    """What Adam counts, the same in all states."""
    return torch.stack([state["step"] for state in zero_state.inner_optimizer(trained).state.values()]).unique()


def batch(number: int) -> PretrainBatch:
    """Batch ``number``, every time the same."""
    targets = torch.rand(2, 7, generator=torch.Generator().manual_seed(number)).softmax(-1)
    rows = torch.tensor([1, 3]), torch.tensor([4, 5]), torch.tensor([1, 2])
    return PretrainBatch(packed_batch(number), *rows, targets, torch.tensor([0, 1, 0, 1]))


def measure(world: World, precision: str, stage: int, accumulation: int) -> dict[str, Any]:
    """Launches and waits around the model of the third step; ``differs``: what a step with NaN in it has changed."""
    trained = Trained(world, precision, stage, accumulation)
    for number in (0, 1):  # DeepSpeed looks at what it is given in the first two
        trained.step(number)
    with counted() as asked:
        trained.step(2)
    found = {
        "launches": asked.around, "parameters": len(list(trained.module.parameters())),
        "waits": {place: number for place, number in asked.waits.items() if not is_models(place)},
    }  # fmt: skip
    if stage == 0 or accumulation > 1:
        return found
    before = trained.state(world)
    trained.step(3, factor=math.nan)
    differs = unlike(before, trained.state(world))
    if precision != "fp16":  # there the loss scale has changed
        trained.step(4)
        other = Trained(world, precision, stage, accumulation)
        for number in (0, 1, 2, 4):
            other.step(number)
        differs += unlike(other.state(world), trained.state(world))
    return found | {"differs": differs, "updates": zero_state.update_count(trained.engine)}


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal to the bit."""
    return [name for name in one if not torch.equal(one[name], other[name])]


def main() -> None:
    """Measure every precision and stage, without accumulation and with it."""
    from deepspeed.accelerator import get_accelerator

    torch.set_num_threads(1)
    allowed = mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True)
    as_on_a_gpu = mock.patch.object(zero_speed, "_on_cpu", return_value=False)
    with engine.distributed() as world, allowed, as_on_a_gpu, mock.patch.object(engine, "_check_precision"):
        found = {f"{precision} {stage} {times}": measure(world, precision, stage, times) for precision, stage, times in CASES}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
