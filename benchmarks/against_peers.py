"""``python -m benchmarks.against_peers``: training steps of the base model, ours against what people run today, in one run.

Each contender lives in a process of its own, with memory of its own, as it would at its user's. Each round takes steps of every
contender on the same batches, one after the other, so that a slow moment of the machine hits all; medians are reported, and the largest
memory of each process. All five take 24 GB at 64 samples on a CPU: ``--only`` chooses those that find room together.

    ours-bf16, ours-fp32   this repository: packed, through its DeepSpeed engine
    released-fp32          InterBERT as its released code computes it: padded, eager, every logit
    bert-bf16              transformers' BERT-base, SDPA, bf16 autocast, on the same 36 + 37 padded positions, MLM head over the text
    visualbert-bf16        transformers' VisualBertForPreTraining, eager, bf16 autocast
    ours-bf16-thread       ours with one thread
    ours-bf16-2x           ours in two processes with one thread each, half of the batch to each
    ours-bf16-checkpoint   ours with activation checkpointing
    ours-bf16-zero0        ours at ZeRO stage 0: weights in fp32, bf16 by autocast
    ours-bf16-compiled     ours, its transformer layers by torch.compile (for a GPU)
    released-tf32          released-fp32, its products in TF32 (on a GPU)
    bert-bf16-compiled     bert-bf16 by torch.compile (for a GPU)

``--equal`` compares the losses of 50 steps.
"""

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

import torch

from benchmarks.batches import make_batch, pad_batch
from benchmarks.contenders import OURS, PEERS, RATE, Contender, Lost, Taken, Way, our_step
from benchmarks.peers import official_weights, released_step
from benchmarks.timing import forget_peak, machine, product_rate
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import engine
from megainter.training.world import World

FIVE = ("ours-bf16", "ours-fp32", "released-fp32", "bert-bf16", "visualbert-bf16")
TOKENS_OF_SAMPLE = 43


def main() -> int:
    """Parse the command line and run one of the two measurements."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--samples", type=int, nargs="+", default=[32], help="samples per step; of several numbers a table each")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--steps", type=int, default=1, help="steps of each contender in a round")
    options.add_argument("--only", nargs="*", choices=(*OURS, *PEERS), default=FIVE)
    options.add_argument("--equal", action="store_true")
    options.add_argument("--zero-stage", type=int, default=1)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--toy", action="store_true", help="models of next to no size")
    given = options.parse_args()
    way = Way(given.device, given.zero_stage, given.toy)
    if given.equal:
        with engine.distributed() as world:
            _print_losses(given.samples[0], way, world)
        return 0
    lost: dict[str, str] = {}
    for table in tables(given.only, given.samples, given.rounds, given.steps, way):
        lost |= table["lost"]
        print(json.dumps(table, indent=2))
    for why in lost.values():
        print(why, file=sys.stderr)
    return 1 if lost else 0


def tables(names: Sequence[str], sizes: Sequence[int], rounds: int, steps: int, way: Way) -> Iterator[dict[str, Any]]:
    """One table for each number of samples; a contender that is lost (its memory does not suffice, it fails) is left out from there on."""
    device = torch.device(way.device)
    with contextlib.ExitStack() as stack:
        contenders = [stack.enter_context(contextlib.closing(Contender(name, way))) for name in names]
        lost = _without_lost(contenders, [(one, one.wait_until_built) for one in contenders])
        rates = {
            kind: product_rate(dtype, _rows(sizes, way), device=device)
            for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        forget_peak(device)
        for samples in sizes:
            taken = measured(contenders, samples, rounds, steps, way, lost)
            yield table(taken, samples, rates, device) | {"lost": dict(lost)}


def _rows(sizes: Sequence[int], way: Way) -> int:
    """Of the product by which shares are measured: those of the largest batch on a GPU, of a usual one on a CPU."""
    return max(sizes) * TOKENS_OF_SAMPLE if way.device == "cuda" else 1536


def _without_lost(contenders: list[Contender], asked: list[tuple[Contender, Any]]) -> dict[str, str]:
    """Do what is asked of each; those that are lost over it leave ``contenders``, and why is returned."""
    lost = {}
    for one, action in asked:
        try:
            action()
        except Lost as error:
            lost[one.name] = str(error)
            one.close()
            contenders.remove(one)
    return lost


def measured(contenders: list[Contender], samples: int, rounds: int, steps: int, way: Way, lost: dict[str, str]) -> dict[str, list[Taken]]:
    """What each contender took in each round but the first, which warms up; on a GPU every turn begins with steps that warm up, because
    a contender that waits gives its memory to the others."""
    taken: dict[str, list[Taken]] = {one.name: [] for one in contenders}
    gpu = way.device == "cuda"
    for number in range(rounds + 1):
        seeds = [number] if not gpu else [0, 1]
        fresh = not gpu or number == 0
        for one in contenders if fresh else ():
            one.prepare(samples, seeds)
        lost |= _without_lost(contenders, [(one, one.wait_until_ready) for one in contenders] if fresh else [])
        for one in list(contenders):
            turn = _turn(one, steps, (3 if number == 0 else 1) if gpu else 0)
            lost |= _without_lost(contenders, [(one, lambda turn=turn, name=one.name: taken[name].append(turn()))])
            if taken[one.name]:
                print(f"{samples} samples, round {number}, {one.name}: {taken[one.name][-1].seconds:.4f} s", file=sys.stderr, flush=True)
    return {one.name: taken[one.name] for one in contenders}


def _turn(one: Contender, steps: int, warm: int) -> Any:
    return lambda: one.take(steps, warm)


def table(taken: dict[str, list[Taken]], samples: int, rates: dict[str, float], device: torch.device) -> dict[str, Any]:
    """Medians of the rounds after the first."""
    peaks = {name: turns[-1].peak_mib for name, turns in taken.items()}
    taken = {name: turns[1:] for name, turns in taken.items()}
    seconds = {name: statistics.median(turn.seconds for turn in turns) for name, turns in taken.items()}
    ours = {name: statistics.mean(turn.flops for turn in taken[name]) for name in taken if name.startswith("ours")}
    tokens = {name: statistics.mean(turn.tokens for turn in turns) for name, turns in taken.items()}
    whole = {name: flops for name, flops in ours.items() if name not in ("ours-bf16-thread", "ours-bf16-2x")}
    return {
        "date": date.today().isoformat(), "machine": machine(device), "torch": torch.__version__,
        "samples_per_step": samples, "real_tokens_per_step": next(iter(tokens.values()), 0.0), "padded_tokens_per_step": samples * 73,
        "matrix_product_gflop_per_s": rates, "gflop_per_step": {name: value / 1e9 for name, value in ours.items()},
        "seconds_per_step": seconds, "seconds": {name: [round(turn.seconds, 5) for turn in turns] for name, turns in taken.items()},
        "samples_per_second": {name: samples / value for name, value in seconds.items()},
        "real_tokens_per_second": {name: tokens[name] / value for name, value in seconds.items()},
        "gflop_per_second": {name: value / seconds[name] / 1e9 for name, value in ours.items()},
        "share_of_product_rate": {n: flops / seconds[n] / 1e9 / rates[n.split("-")[1]] for n, flops in whole.items()},
        "peak_mib": peaks,
        **{f"speedup_of_{name.replace('-', '_')}": {n: seconds[n] / seconds[name] for n in seconds} for name in ours},
    }  # fmt: skip


def _print_losses(samples: int, way: Way, world: World) -> None:
    """The largest relative difference of 50 losses between ours in bf16 and the released computation in fp32, without dropout."""
    config = way.config(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, region_hidden_dropout_prob=0.0)
    torch.manual_seed(0)
    model = InterBertForPreTraining(config)
    released = released_step(official_weights(model, world.device), config, RATE, training=False)
    model.fusion.dropout_p = 0.0
    ours = our_step(model, "bf16", way.zero_stage, world)
    pairs = []
    for number in range(50):
        batch = make_batch(samples, seed=number)
        pairs.append((float(ours(batch)), float(released(pad_batch(batch).to(world.device)))))
        print(f"step {number + 1}: ours {pairs[-1][0]:.4f}, released {pairs[-1][1]:.4f}", flush=True)
    print(json.dumps({"largest_relative_difference": max(abs(a - b) / b for a, b in pairs)}))


if __name__ == "__main__":
    sys.exit(main())
