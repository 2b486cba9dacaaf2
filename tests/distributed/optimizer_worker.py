"""One rank of a test: trains a tiny model through the engine, case by case, and leaves the fp32 state of each.

Run by torchrun with a folder that holds ``cases.json``; the batches of a step are the same at every world size.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from megainter import InterBertForPreTraining
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.files import as_json
from megainter.training import checkpoint, engine, zero_state
from megainter.training.optimizer import learning_rate
from megainter.training.saving import Saver, Target
from megainter.training.world import World
from tests.model.tiny import packed_batch, padded, tiny_config

STEPS, SAVED, BATCHES = 20, 10, 2  # of a run; in its checkpoint; of a step, over all ranks and micro-batches


@dataclasses.dataclass(frozen=True)
class Case:
    """One training: ``restore`` names a case whose checkpoint it goes on from."""

    name: str
    stage: int
    optimizer: dict[str, Any]
    ema_decay: float = 0.0
    precision: str = "fp32"
    save: bool = False
    restore: str | None = None


class Step(nn.Module):
    """The module that is trained; its loss has all three objectives, so that every parameter has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "region_hidden_dropout_prob": 0.0}
        self.model = InterBertForPreTraining(tiny_config(num_region_layers=1, initializer_range=0.1, **off))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss


def batch(number: int) -> dict[str, Tensor]:
    """Batch ``number`` of the run, in every process the same."""
    generator = torch.Generator().manual_seed(number)
    inputs = padded(packed_batch(number))
    shape, regions = inputs["input_ids"].shape, inputs["region_mask"].shape[1] - 1
    return inputs | {
        "msm_labels": torch.randint(0, 50, shape, generator=generator),
        "mrm_labels": torch.ones(shape[0], regions, dtype=torch.int64),
        "mrm_targets": torch.rand(shape[0], regions, 7, generator=generator).softmax(-1),
        "itm_labels": torch.randint(0, 2, (shape[0],), generator=generator),
    }


def run(case: Case, folder: Path, world: World) -> None:
    """Train one case from its start, or from another's checkpoint, to the end."""
    settings = OptimizerConfig(**case.optimizer)
    training = TrainingConfig(steps=STEPS, global_batch=4 * BATCHES, micro_batch=4, ema_decay=case.ema_decay)
    saved = checkpoint.open_checkpoint(folder / case.restore / checkpoint.step_name(SAVED)) if case.restore else None
    module = Step()
    if saved is not None:
        with checkpoint.reader(saved) as read, torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(read("weights", name))
    if case.precision == "bf16" and case.stage:
        module = module.bfloat16()
    how = EngineConfig(precision=case.precision, zero_stage=case.stage)
    built = engine.build_engine(module, how, settings, training, world)
    start = 0
    if saved is not None:
        with checkpoint.reader(saved) as read:
            zero_state.restore_state(built, read, saved.state["updates"])
        start = saved.step
    for step in range(start, STEPS):
        engine.set_learning_rate(built, learning_rate(settings, step, STEPS))
        for number in range(world.rank, BATCHES, world.size):
            built.backward(built(batch(step * BATCHES + number)))
            built.step()
        engine.average_weights(built, training.ema_decay)
        if case.save and step + 1 == SAVED:
            state = {"step": SAVED, "updates": zero_state.update_count(built)}
            with Saver(built, world) as saver:
                saver.begin(Target(folder / case.name, SAVED, {"trainer.json": as_json(state)}, keep=1))
                (outcome,) = saver.finish()
            assert outcome.published, outcome
    assert zero_state.update_count(built) == STEPS
    share = {f"{kind}/{name}": tensor for kind, part in zero_state.owned_state(built, world).items() for name, tensor in part.items()}
    save_file(share, folder / f"{case.name}.{world.rank}.safetensors")
    live = torch.cat([piece.view(piece.flat) for piece in zero_state.pieces(built)]) if case.stage == 0 else torch.zeros(0)
    save_file({"live": live}, folder / f"{case.name}.live.{world.rank}.safetensors")
    built.destroy()


def main(folder: Path) -> None:
    """Run all cases of ``folder``."""
    torch.set_num_threads(1)
    with engine.distributed() as world:
        for case in json.loads((folder / "cases.json").read_text()):
            run(Case(**case), folder, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
