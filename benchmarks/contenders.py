"""The contenders of `benchmarks.against_peers`: a training step each, in a process of its own that answers on its standard output.

``python -m benchmarks.contenders NAME`` reads requests from standard input, a line of JSON each: ``{"samples": 64, "seeds": [0, 1]}`` makes
batches ready, ``{"steps": 5, "warm": 1}`` takes steps on them in turn and answers with a `Taken`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.batches import make_batch, pad_batch
from benchmarks.peers import PaddedBatch, bert_step, official_weights, released_step, visual_bert_step
from benchmarks.sizes import BASE, TOY, TOY_BERT
from benchmarks.timing import finish, forget_peak, peak_mib, seconds_of
from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.training import engine
from megainter.training.arrival import Arrivals
from megainter.training.loop import _recompute_activations
from megainter.training.world import World
from megainter.transfers import sent

RATE = 1e-4
TURN = 1.0  # seconds of a turn's steps on a GPU, where they come after others that warm up
OURS = ("ours-bf16", "ours-fp32", "ours-bf16-zero0", "ours-bf16-compiled", "ours-bf16-thread", "ours-bf16-2x", "ours-bf16-checkpoint")
PEERS = ("released-fp32", "released-tf32", "bert-bf16", "bert-bf16-compiled", "visualbert-bf16")
WORLD_SIZES = {"ours-bf16-2x": 2}
ONE_THREAD = ("ours-bf16-thread", "ours-bf16-2x")
ANSWER = "measured: "
Step = Callable[[Any], torch.Tensor]  # from a batch on the host to the loss, which nobody has waited for


class Lost(Exception):
    """A contender's process has ended; the message says why, where it is known."""


@dataclass(frozen=True)
class Taken:
    """Steps of a contender, of all its processes, each on one batch: ``seconds`` of a step on the slowest, ``tokens`` and ``flops`` of a
    step, ``peak_mib`` since the batches were asked for on a GPU, since the start on a CPU."""

    seconds: float
    loss: float
    tokens: float
    flops: float
    peak_mib: float


@dataclass(frozen=True)
class Way:
    """How contenders run: the device, ours' ZeRO stage, and ``toy`` for models of next to no size."""

    device: str = "cpu"
    zero_stage: int = 1
    toy: bool = False

    def config(self, **changes: Any) -> InterBertConfig:
        """Ours."""
        return InterBertConfig(**(TOY if self.toy else BASE), **changes)


def main() -> None:
    """Serve one contender."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", choices=(*OURS, *PEERS))
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--zero-stage", type=int, default=1)
    options.add_argument("--toy", action="store_true")
    given = options.parse_args()
    way = Way(given.device, 0 if given.name.endswith("zero0") else given.zero_stage, given.toy)
    with _world(given.name) as world:
        serve(given.name, way, world)


@contextlib.contextmanager
def _world(name: str) -> Iterator[World]:
    """The trainer's group for ours; others are alone."""
    if name in OURS:
        with engine.distributed() as world:
            yield world
    else:
        yield World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def serve(name: str, way: Way, world: World) -> None:
    """Answer requests until standard input ends, or the device has no more memory."""
    step = contender(name, way, world)
    if "compiled" in name and world.device.type == "cuda":
        for samples in (48, 64):  # the second tells the compiler that their number changes
            step(_ready(name, make_batch(samples, 0), world.device))
        forget_peak(world.device)
    _answer(world, {})
    batches: list[PretrainBatch] = []
    ready: list[Any] = []
    for request in iter(lambda: _request(world), None):
        if "samples" in request:
            batches = [make_batch(request["samples"], seed, world.rank, world.size) for seed in request["seeds"]]
            ready = [_ready(name, batch, world.device) for batch in batches]
            _answer(world, {})
            continue
        forget_peak(world.device)
        try:
            mine = _take(step, ready, request["steps"], request["warm"], world)
        except torch.cuda.OutOfMemoryError as error:
            _answer(world, {"out_of_memory": str(error).splitlines()[0]})
            return
        work = [3 * forward_flops(way.config(), counts_of(batch)) for batch in batches]
        _answer(world, asdict(_of_all_ranks((*mine, statistics.mean(b.tokens() for b in batches), statistics.mean(work)), world)))
        forget_peak(world.device)
    if "compiled" in name:
        print(f"{name}: {compiled_so_far()}", file=sys.stderr, flush=True)


def compiled_so_far() -> str:
    """What torch.compile has made and where it gave up, so that a compiled contender is known to be one."""
    stats, breaks = counters["stats"], counters["graph_break"]
    made = f"{stats['unique_graphs']} graphs of {stats['calls_captured']} calls"
    return f"{made}; broken {sum(breaks.values())} times: {dict(breaks.most_common(4))}"


def _take(step: Step, ready: list[Any], steps: int, warm: int, world: World) -> tuple[float, float]:
    """Seconds of a step and the mean loss, after ``warm`` steps that do not count: fewer steps where those ask for more than `TURN`."""
    device = world.device
    for number in range(warm):
        last = seconds_of(lambda number=number: step(ready[number % len(ready)]), device)
    if warm and world.size == 1:
        steps = max(1, min(steps, int(TURN / last)))
    finish(device)
    start = time.perf_counter()
    losses = [step(ready[number % len(ready)]) for number in range(steps)]
    finish(device)
    seconds = (time.perf_counter() - start) / steps
    return seconds, float(torch.stack([loss.detach().float() for loss in losses]).mean())


def _of_all_ranks(mine: tuple[float, ...], world: World) -> Taken:
    ranks: list[Any] = [(*mine, peak_mib(world.device))]
    if world.size > 1:
        gathered: list[Any] = [None] * world.size
        dist.all_gather_object(gathered, ranks[0])
        ranks = gathered
    seconds, losses, tokens, flops, peaks = zip(*ranks, strict=True)
    return Taken(max(seconds), statistics.mean(losses), sum(tokens), sum(flops), sum(peaks))


def _request(world: World) -> Any:
    """What the next line of standard input asks for, on every rank; None at its end."""
    asked = [json.loads(sys.stdin.readline() or "null")] if world.rank == 0 else [None]
    if world.size > 1:
        dist.broadcast_object_list(asked)
    return asked[0]


def _answer(world: World, found: dict[str, Any]) -> None:
    if world.rank == 0:
        print(f"{ANSWER}{json.dumps(found)}", flush=True)


def _ready(name: str, batch: PretrainBatch, device: torch.device) -> PretrainBatch | PaddedBatch:
    """The batch as the contender takes it, in memory that a GPU reads by itself."""
    pinned = device.type == "cuda"
    if name in OURS:  # features as the trainer's loader gives them
        made = replace(batch, inputs=replace(batch.inputs, region_features=batch.inputs.region_features.half()))
        return made.pin_memory() if pinned else made
    padded = pad_batch(batch)
    if name.startswith("bert"):  # it reads tokens alone: what it need not copy is not copied
        padded = replace(padded, features=padded.features[..., :0], mrm_targets=padded.mrm_targets[..., :0])
    return padded.pin_memory() if pinned else padded


def counts_of(batch: PretrainBatch) -> BatchCounts:
    """What the operations of a batch are counted by."""
    return BatchCounts.of(batch.inputs.text_lengths, batch.inputs.region_lengths, len(batch.msm_positions), len(batch.mrm_positions))


def contender(name: str, way: Way, world: World) -> Step:
    """One training step of ``name``, its weights drawn by one seed."""
    torch.manual_seed(0)
    kind, precision, *more = name.split("-")
    compiled = None if "compiled" not in more else "inductor" if world.device.type == "cuda" else "aot_eager"  # on a CPU that takes minutes
    if kind == "ours":
        model = InterBertForPreTraining(way.config())
        if "checkpoint" in more:
            _recompute_activations(model)
        if compiled is not None:
            compile_layers(model, compiled)
        return our_step(model, "fp32" if precision == "fp32" else "bf16", way.zero_stage, world)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if kind == "released":
        weights = official_weights(InterBertForPreTraining(way.config()), world.device)
        return _on(world.device, released_step(weights, way.config(), RATE))
    sizes = TOY_BERT if way.toy else {}
    if kind == "bert":
        return _on(world.device, bert_step(RATE, world.device, compiled, **sizes))
    return _on(world.device, visual_bert_step(RATE, world.device, **sizes))


def _on(device: torch.device, step: Callable[[PaddedBatch], torch.Tensor]) -> Step:
    return lambda batch: step(batch.to(device))


def compile_layers(model: InterBertForPreTraining, backend: str = "inductor") -> None:
    """Let ``torch.compile`` make kernels of whole transformer layers, for any number of rows."""
    encoder = model.interbert.encoder
    for layer in (*encoder.interaction, *encoder.text, *encoder.region):
        layer.compile(dynamic=True, backend=backend)


def our_step(model: InterBertForPreTraining, precision: Literal["bf16", "fp32"], zero_stage: int, world: World) -> Step:
    """A step of the trainer's own engine over ``model``, batches arriving as its loop lets them."""
    optimizer = OptimizerConfig(learning_rate=RATE, weight_decay=0.01)
    training = TrainingConfig(steps=1000, global_batch=world.size, micro_batch=1)  # the engine does nothing with the number of samples
    settings = EngineConfig(precision=precision, zero_stage=zero_stage)
    module: nn.Module = PretrainingStep(model.train(), ObjectiveWeights())
    train: Any = engine.build_engine(module, settings, optimizer, training, world)
    arrivals = Arrivals(world.device)

    def step(batch: PretrainBatch) -> torch.Tensor:
        counts = sent(torch.tensor(batch.counts(), dtype=torch.float32).clamp(min=1), world.device)
        engine.set_learning_rate(train, RATE)
        for _, here in arrivals.each([batch]):
            loss, _ = train(here, counts)
            train.backward(loss)
            train.step()
        return loss.detach()

    return step


class Contender:
    """A process (or several, under torchrun) that serves one contender. Raises `Lost` where it has ended."""

    def __init__(self, name: str, way: Way) -> None:
        ranks = WORLD_SIZES.get(name, 1)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        words = ["-m", "benchmarks.contenders", name, "--device", way.device, "--zero-stage", str(way.zero_stage), *["--toy"] * way.toy]
        changes = {"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {}
        if way.device == "cpu":
            changes["CUDA_VISIBLE_DEVICES"] = ""
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, *launcher, *words], env=os.environ | changes, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def wait_until_built(self) -> None:
        """Until it can be asked for something."""
        self._answer()

    def prepare(self, samples: int, seeds: list[int]) -> None:
        """Ask for batches; `wait_until_ready` waits for them, so that others can make theirs meanwhile."""
        self._ask({"samples": samples, "seeds": seeds})

    def wait_until_ready(self) -> None:
        """Until the batches that were asked for are made."""
        self._answer()

    def take(self, steps: int = 1, warm: int = 0) -> Taken:
        """``steps`` steps on the batches in turn, after ``warm`` ones."""
        self._ask({"steps": steps, "warm": warm})
        found = self._answer()
        if "out_of_memory" in found:
            raise Lost(f"out of memory: {found['out_of_memory']}")
        return Taken(**found)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone already
            self.process.stdin.close()
        self.process.wait()

    def _ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the answer that does not come says so
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, Any] = json.loads(line.removeprefix(ANSWER))
                return found
        raise Lost(f"{self.name} ended with exit code {self.process.wait()}; its own lines above say why")


if __name__ == "__main__":
    main()
