"""A tiny run without steps done twice, with them, and with a gradient of the last rank that differs by one bit; prints one JSON object."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.errors import HardwareError
from megainter.tasks.pretraining.training import pretrain
from megainter.training import engine
from megainter.training.collective import on_first_rank
from tests.synthetic import settings, write_data
from tests.training.resumed_runs import records


class WrongBit:
    """Flips one bit of a parameter's gradient in the sixth backward pass of its life, on the rank that has it."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        self.passes += 1
        if self.passes != 6:
            return gradient
        other = gradient.clone()
        other.view(-1)[:1].view(torch.int16)[0] ^= 1
        return other


def main(base: Path, precision: str, stage: int) -> None:
    """Run all three."""
    torch.set_num_threads(1)
    with engine.distributed() as world:
        pairs, store = on_first_rank(lambda: write_data(base))

        def config(name: str, every: int) -> RunConfig:
            given: dict[str, Any] = {"training__steps": 6, "training__verify_every": every, "training__micro_batch": 16 // world.size}
            given |= {"engine__zero_stage": stage, "engine__precision": precision, "checkpoint__every_steps": 4}
            return load_config(None, settings(pairs, store, base / name, **given))

        found: dict[str, Any] = {}
        for name, every in (("once", 0), ("twice", 2)):
            pretrain(config(name, every))
            found[name] = records(base / name) if world.rank == 0 else []

        # Two passes in step 2, one in steps 1 and 3: the sixth is the second of step 4. The wrong bit is made in the backward pass itself.
        built, before = engine.build_engine, WrongBit()

        def build(*arguments: Any, **named: Any) -> Any:
            trained = built(*arguments, **named)
            if world.rank == world.size - 1:
                dict(trained.module.named_parameters())["model.msm_head.decoder.bias"].register_hook(before)
            return trained

        engine.build_engine = build
        try:
            pretrain(config("wrong", 2))
        except HardwareError as error:
            found["wrong"] = str(error)
        dist.barrier()
        found["saved"] = [path.name for path in (base / "wrong/checkpoints").glob("step_*")]
        if world.rank == 0:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
