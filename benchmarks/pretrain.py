"""``python -m benchmarks.pretrain``: training steps of the base model, ours against what people run today, in one run.

Each round takes one step of every contender on the same batch, so that a slow moment of the machine hits all; medians are reported.

    ours-bf16, ours-fp32   this repository: packed, through its DeepSpeed engine
    released-fp32          InterBERT as its released code computes it: padded, eager, every logit
    bert-bf16              transformers' BERT-base, SDPA, bf16 autocast, on the same 36 + 37 padded positions, MLM head over the text
    visualbert-bf16        transformers' VisualBertForPreTraining, eager, bf16 autocast

``--memory NAME`` prints the peak memory of a few steps of one contender alone; ``--equal`` compares the losses of 50 steps.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any, Literal

import torch

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
CONTENDERS = ("ours-bf16", "ours-fp32", "released-fp32", "bert-bf16", "visualbert-bf16")


def main() -> None:
    """Parse the command line and run one of the three measurements."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, default=32, help="samples per step")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", nargs="*", choices=CONTENDERS, default=CONTENDERS)
    options.add_argument("--memory", choices=CONTENDERS)
    options.add_argument("--equal", action="store_true")
    options.add_argument("--zero-stage", type=int, default=1)
    given = options.parse_args()
    with engine.distributed() as world:
        if given.memory:
            _print_memory(given.memory, given.samples, given.zero_stage, world)
        elif given.equal:
            _print_losses(given.samples, given.zero_stage, world)
        else:
            _print_speed(given.only, given.samples, given.rounds, given.zero_stage, world)


def contender(name: str, samples: int, zero_stage: int, world: engine.World) -> Step:
    """One training step of ``name``, from a packed batch to its loss."""
    torch.manual_seed(0)
    if name == "ours-bf16":
        return our_step(InterBertForPreTraining(InterBertConfig()), "bf16", samples, zero_stage, world)
    if name == "ours-fp32":
        return our_step(InterBertForPreTraining(InterBertConfig()), "fp32", samples, zero_stage, world)
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
    training = TrainingConfig(steps=1000, global_batch=samples, micro_batch=samples)
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


def _print_speed(names: list[str], samples: int, rounds: int, zero_stage: int, world: engine.World) -> None:
    steps = {name: contender(name, samples, zero_stage, world) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens = flops = 0
    for number in range(rounds + 1):
        batch = make_batch(samples, seed=number)
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch)
            if number:  # the first round is warm-up
                seconds[name].append(time.perf_counter() - start)
        if number:
            tokens, flops = tokens + batch.tokens(), flops + 3 * forward_flops(InterBertConfig(), _counts(batch))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {"bf16": product_rate(torch.bfloat16), "fp32": product_rate(torch.float32)}
    print(json.dumps({
        "date": date.today().isoformat(), "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "samples_per_step": samples, "real_tokens_per_step": tokens / rounds, "padded_tokens_per_step": samples * 73,
        "matrix_product_gflop_per_s": rates, "gflop_per_step": flops / rounds / 1e9,
        "seconds_per_step": medians, "seconds": seconds,
        "samples_per_second": {name: samples / value for name, value in medians.items()},
        "share_of_product_rate": {n: flops / rounds / medians[n] / 1e9 / rates[n[-4:]] for n in names if n.startswith("ours")},
        "speedup_of_ours_bf16": {n: medians[n] / medians["ours-bf16"] for n in names if "ours-bf16" in names},
        "speedup_of_ours_fp32": {n: medians[n] / medians["ours-fp32"] for n in names if "ours-fp32" in names},
    }, indent=2))  # fmt: skip


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


def _print_memory(name: str, samples: int, zero_stage: int, world: engine.World) -> None:
    """Peak resident memory of this process in MiB after three steps, and what importing alone took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    step = contender(name, samples, zero_stage, world)
    for number in range(3):
        step(make_batch(samples, seed=number))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"name": name, "peak_mib": peak, "imports_mib": before, "samples_per_step": samples}))


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
