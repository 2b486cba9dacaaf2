"""``python -m benchmarks.pretrain``: training steps of the base model, ours against what people run today, in one run.

Each contender lives in a process of its own, with a heap of its own, as it would at its user's. Each round takes one step of every
contender on the same batch, one after the other, so that a slow moment of the machine hits all; medians are reported, and the largest
resident memory of each process. All five take 24 GB at 64 samples: ``--only`` chooses those that find room together.

    ours-bf16, ours-fp32   this repository: packed, through its DeepSpeed engine
    released-fp32          InterBERT as its released code computes it: padded, eager, every logit
    bert-bf16              transformers' BERT-base, SDPA, bf16 autocast, on the same 36 + 37 padded positions, MLM head over the text
    visualbert-bf16        transformers' VisualBertForPreTraining, eager, bf16 autocast
    ours-bf16-thread       ours with one thread
    ours-bf16-2x           ours in two processes with one thread each, half of the batch to each
    ours-bf16-checkpoint   ours with activation checkpointing

``--equal`` compares the losses of 50 steps.
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, Literal

import torch
import torch.distributed as dist

from benchmarks.batches import make_batch, pad_batch
from benchmarks.peers import bert_step, official_weights, released_step, visual_bert_step
from megainter.config import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.data.batch import PretrainBatch
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import engine
from megainter.training.objectives import ObjectiveWeights, PretrainingStep

RATE = 1e-4
Step = Callable[[PretrainBatch], float]
FIVE = ("ours-bf16", "ours-fp32", "released-fp32", "bert-bf16", "visualbert-bf16")
CONTENDERS = (*FIVE, "ours-bf16-thread", "ours-bf16-2x", "ours-bf16-checkpoint")
WORLD_SIZES = {"ours-bf16-2x": 2}
ONE_THREAD = ("ours-bf16-thread", "ours-bf16-2x")
ANSWER = "measured: "


def main() -> None:
    """Parse the command line and run one of the two measurements, or serve as one of the contenders."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=32, help="samples per step")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", nargs="*", choices=CONTENDERS, default=FIVE)
    options.add_argument("--equal", action="store_true")
    options.add_argument("--zero-stage", type=int, default=1)
    options.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        with engine.distributed() as world:
            serve(given.serve, given.samples, given.zero_stage, world)
    elif given.equal:
        with engine.distributed() as world:
            _print_losses(given.samples, given.zero_stage, world)
    else:
        print(json.dumps(speed(given.only, given.samples, given.rounds, given.zero_stage), indent=2))


@dataclass(frozen=True)
class Taken:
    """One step of a contender, of all its processes: ``seconds`` of the slowest, sums of the rest, ``peak_mib`` since the start."""

    seconds: float
    loss: float
    tokens: int
    flops: float
    peak_mib: float


def serve(name: str, samples: int, zero_stage: int, world: engine.World) -> None:
    """Take one step on the batch of every seed that stands on standard input, and print what it took, as a contender's process."""
    step = contender(name, samples, zero_stage, world)
    imports = _peak_mib()
    print(f"{ANSWER}{imports}", flush=True) if world.rank == 0 else None
    for seed in iter(lambda: _next_seed(world), -1):
        batch = make_batch(samples, seed, world.rank, world.size)
        start = time.perf_counter()
        loss = step(batch)
        mine = (time.perf_counter() - start, loss, batch.tokens(), 3 * forward_flops(InterBertConfig(), _counts(batch)), _peak_mib())
        ranks: list[Any] = [mine]
        if world.size > 1:
            ranks = [None] * world.size
            dist.all_gather_object(ranks, mine)
        seconds, losses, tokens, flops, peaks = zip(*ranks, strict=True)
        taken = Taken(max(seconds), statistics.mean(losses), sum(tokens), sum(flops), sum(peaks))
        print(f"{ANSWER}{json.dumps(asdict(taken))}", flush=True) if world.rank == 0 else None


def _next_seed(world: engine.World) -> int:
    """The seed of the next line of standard input, on every rank; -1 at its end."""
    seeds = [int(sys.stdin.readline() or -1)] if world.rank == 0 else [-1]
    if world.size > 1:
        dist.broadcast_object_list(seeds)
    return seeds[0]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def contender(name: str, samples: int, zero_stage: int, world: engine.World) -> Step:
    """One training step of ``name``, from a packed batch to its loss."""
    torch.manual_seed(0)
    if name.startswith("ours"):
        model = InterBertForPreTraining(InterBertConfig())
        if name == "ours-bf16-checkpoint":
            model.activation_checkpointing_enable()
        return our_step(model, "fp32" if name == "ours-fp32" else "bf16", samples, zero_stage, world)
    if name == "released-fp32":
        config = InterBertConfig()
        step = released_step(official_weights(InterBertForPreTraining(config)), config, RATE)
    else:
        step = bert_step(RATE) if name == "bert-bf16" else visual_bert_step(RATE)
    return lambda batch: float(step(pad_batch(batch)))


def our_step(
    model: InterBertForPreTraining, precision: Literal["bf16", "fp32"], samples: int, zero_stage: int, world: engine.World
) -> Step:
    """A step of the trainer's own engine over ``model``."""
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=0.01)
    training = TrainingConfig(steps=1000, global_batch=samples, micro_batch=samples // world.size)
    settings = EngineConfig(precision=precision, zero_stage=zero_stage)
    module = PretrainingStep(model.train(), ObjectiveWeights())
    train: Any = engine.build_engine(module, settings, optimizer, training, world)

    def step(batch: PretrainBatch) -> float:
        counts = torch.tensor(batch.counts(), dtype=torch.float32).clamp(min=1)
        engine.set_learning_rate(train, RATE)
        loss, _ = train(batch, counts)
        train.backward(loss)
        train.step()
        return float(loss)

    return step


class Contender:
    """A process (or several, under torchrun) that serves one contender."""

    def __init__(self, name: str, samples: int, zero_stage: int) -> None:
        ranks = WORLD_SIZES.get(name, 1)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        words = ["-m", "benchmarks.pretrain", "--serve", name, "--samples", str(samples), "--zero-stage", str(zero_stage)]
        threads = {"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *words], env=os.environ | threads, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def step(self, seed: int) -> Taken:
        """One step on the batch of this seed."""
        assert self.process.stdin is not None
        print(seed, file=self.process.stdin, flush=True)
        return Taken(**json.loads(self._answer()))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER)
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its own lines above say why")


def speed(names: list[str], samples: int, rounds: int, zero_stage: int) -> dict[str, Any]:
    """The table: medians of ``rounds`` rounds after one that warms up."""
    taken: dict[str, list[Taken]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(contextlib.closing(Contender(name, samples, zero_stage))) for name in names]
        for number in range(rounds + 1):
            for one in contenders:
                taken[one.name].append(one.step(number))
                print(f"round {number} {one.name}: {taken[one.name][-1].seconds:.2f} s", file=sys.stderr, flush=True)
    peaks = {name: steps[-1].peak_mib for name, steps in taken.items()}
    taken = {name: steps[1:] for name, steps in taken.items()}
    seconds = {name: statistics.median(step.seconds for step in steps) for name, steps in taken.items()}
    ours = {name: statistics.mean(step.flops for step in taken[name]) for name in names if name.startswith("ours")}
    rates = {"bf16": product_rate(torch.bfloat16), "fp32": product_rate(torch.float32)}
    tokens = {name: statistics.mean(step.tokens for step in steps) for name, steps in taken.items()}
    return {
        "date": date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "samples_per_step": samples, "real_tokens_per_step": tokens[names[0]], "padded_tokens_per_step": samples * 73,
        "matrix_product_gflop_per_s": rates, "gflop_per_step": {name: value / 1e9 for name, value in ours.items()},
        "seconds_per_step": seconds, "seconds": {name: [round(step.seconds, 3) for step in steps] for name, steps in taken.items()},
        "samples_per_second": {name: samples / value for name, value in seconds.items()},
        "real_tokens_per_second": {name: tokens[name] / value for name, value in seconds.items()},
        "gflop_per_second": {name: value / seconds[name] / 1e9 for name, value in ours.items()},
        "share_of_product_rate": {n: f / seconds[n] / 1e9 / rates[n.split("-")[1]] for n, f in ours.items() if n in FIVE},
        "peak_mib": peaks,
        **{f"speedup_of_{name.replace('-', '_')}": {n: seconds[n] / seconds[name] for n in names} for name in ours},
    }  # fmt: skip


def _counts(batch: PretrainBatch) -> BatchCounts:
    return BatchCounts.of(batch.inputs.text_lengths, batch.inputs.region_lengths, len(batch.msm_positions), len(batch.mrm_positions))


def product_rate(dtype: torch.dtype, rows: int = 1536, seconds: float = 2.0) -> float:
    """GFLOP/s of the matrix product [rows, 768] x [768, 3072], the model's largest layer: the median of repetitions."""
    a, b = torch.randn(rows, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        times.append(time.perf_counter() - start)
    return 2 * rows * 768 * 3072 / statistics.median(times) / 1e9


def _print_losses(samples: int, zero_stage: int, world: engine.World) -> None:
    """The largest relative difference of 50 losses between ours in bf16 and the released computation in fp32, without dropout."""
    config = InterBertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, region_hidden_dropout_prob=0.0)
    torch.manual_seed(0)
    model = InterBertForPreTraining(config)
    released = released_step(official_weights(model), config, RATE, training=False)
    model.fusion.dropout_p = 0.0
    ours = our_step(model, "bf16", samples, zero_stage, world)
    pairs = []
    for number in range(50):
        batch = make_batch(samples, seed=number)
        pairs.append((ours(batch), float(released(pad_batch(batch)))))
        print(f"step {number + 1}: ours {pairs[-1][0]:.4f}, released {pairs[-1][1]:.4f}", flush=True)
    print(json.dumps({"largest_relative_difference": max(abs(a - b) / b for a, b in pairs)}))


if __name__ == "__main__":
    main()
