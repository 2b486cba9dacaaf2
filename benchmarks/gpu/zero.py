"""A small model trained by DeepSpeed's launcher at every ZeRO stage and precision: the losses of fp32, steps that were skipped."""

import json
from pathlib import Path

from benchmarks.gpu.part import Report, Setting, Wrong, run_part
from benchmarks.gpu.training import Run
from benchmarks.trainer import write_data

STEPS, TOY_STEPS = 20, 2
LOSS_OFF = 0.02  # of fp32's, the largest of all steps; dropout is off, so that nothing but rounding differs
BEHIND = 0.1  # the same where steps were skipped: a scale that is too high at first costs fp16 some, and it is that much behind
AT_ONCE = 5
NO_DROPOUT = {f"model__{name}": 0.0 for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "region_hidden_dropout_prob")}


def check(setting: Setting, report: Report) -> None:
    """All runs see the same samples, so that their losses can be held against those of fp32 at stage 0."""
    folder = setting.work("zero")
    write_data(folder, 10 if setting.toy else 160)
    names, steps = runs_of(setting), TOY_STEPS if setting.toy else STEPS
    made = {name: Run.small(folder, name, setting, steps, **(NO_DROPOUT | changes)) for name, changes in names.items()}
    waiting, at_once = list(made), 1 if setting.toy else AT_ONCE
    losses: dict[str, list[float]] = {}
    while waiting:
        started = [(name, made[name].start()) for name in waiting[:at_once]]
        waiting = waiting[at_once:]
        for name, process in started:
            if report.tried(name, lambda name=name, process=process: made[name].end(process)) is not None:
                losses[name] = made[name].losses()
        report.tell(losses=losses)
    right = losses.get("fp32, stage 0")
    if right is None:
        raise Wrong("fp32 at stage 0 did not run: nothing to hold the losses against")
    for name, found in losses.items():
        report.tried(name, lambda name=name, found=found: _judge(report, made[name], name, found, right))


def runs_of(setting: Setting) -> dict[str, dict[str, object]]:
    """Settings of each run, by its name. fp16 exists from stage 1 on, and on GPUs only."""
    halves = ["bf16"] if setting.device == "cpu" else ["bf16", "fp16"]
    stages = [(kind, stage) for kind in halves for stage in range(1 if kind == "fp16" else 0, 4)]
    if setting.toy:
        stages = [("bf16", 1)]  # the suite has the others in tests/distributed
    runs: dict[str, dict[str, object]] = {
        f"{kind}, stage {stage}": {"engine__precision": kind, "engine__zero_stage": stage} for kind, stage in [("fp32", 0), *stages]
    }
    if not setting.toy:
        runs["bf16, stage 1, activations recomputed"] = {
            "engine__precision": "bf16", "engine__zero_stage": 1, "model__gradient_checkpointing": "true"
        }  # fmt: skip
        runs["bf16, stage 2, optimiser on the host"] = {
            "engine__precision": "bf16", "engine__zero_stage": 2, "engine__offload_optimizer": "true"
        }  # fmt: skip
    return runs


def _judge(report: Report, run: Run, name: str, found: list[float], right: list[float]) -> None:
    if len(found) != len(right):
        raise Wrong(f"{len(found)} losses of {len(right)} steps")
    skipped = len(found) - updates_of(run.output)
    usual = [(ours, theirs) for ours, theirs in zip(found, right, strict=True)]
    off = max(abs(ours / theirs - 1) for ours, theirs in usual)
    report.row(
        name, f"losses {found[0]:.4f} to {found[-1]:.4f}, off by at most {off:.1e} from fp32; {skipped} of {len(found)} steps skipped"
    )
    limit = BEHIND if skipped else LOSS_OFF
    if not off <= limit:
        raise Wrong(f"a loss is off by {off:.1e}, at most {limit:g} allowed")
    if skipped and ("fp16" not in name or skipped > len(found) // 2):
        raise Wrong(f"{skipped} of {len(found)} steps were skipped")


def updates_of(output: Path) -> int:
    """Updates that the last checkpoint's weights have had."""
    (state,) = sorted((output / "checkpoints").glob("step_*/trainer.json"))[-1:]
    return int(json.loads(state.read_text())["updates"])


if __name__ == "__main__":
    run_part("zero", check)
