"""A run that is stopped and one that is killed go on as if nothing had been; then the result becomes a Hugging Face folder."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.part import Report, Setting, Wrong, run_part
from benchmarks.gpu.training import Run, kill
from benchmarks.trainer import write_data
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint
from megainter.training.loop import PREFIX
from megainter.training.zero_state import WEIGHTS

STEPS, TOY_STEPS = 150, 12
STOPPED = 75  # exit code of a run that was asked to stop
LOSS_OFF = 1e-2  # after the place where it was cut; on a GPU sums may be taken in another order


def check(setting: Setting, report: Report) -> None:
    """One run is left alone, one gets SIGTERM, one SIGKILL; all three must end with the same losses."""
    folder = setting.work("resume")
    write_data(folder, 10 if setting.toy else 160)
    steps = TOY_STEPS if setting.toy else STEPS
    changes = {"engine__zero_stage": 1, "engine__precision": "bf16", "checkpoint__every_steps": steps // 3}
    whole, stopped, killed = (Run.small(folder, name, setting, steps, launcher=False, **changes) for name in ("whole", "stopped", "killed"))
    left_alone = whole.start()
    if setting.toy:
        whole.end(left_alone)  # one core: one after the other
    process = stopped.start()
    _wait(lambda: len(stopped.losses()) >= 2, process)
    process.send_signal(signal.SIGTERM)
    stopped.end(process, (STOPPED,))
    process = killed.start()
    _wait(lambda: any((killed.output / "checkpoints").glob("step_*")), process)
    kill(process)
    for name, run in (("stopped by SIGTERM", stopped), ("killed by SIGKILL", killed)):
        reached = len(run.losses())
        run.end(run.start())
        if name.startswith("stopped"):
            whole.end(left_alone)
        report.tried(name, lambda run=run, name=name, reached=reached: _same(report, name, run.losses(), whole.losses(), reached))
    report.tried("conversion", lambda: _convert(report, setting, whole))


def _wait(until: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None and not until():
        time.sleep(0.02)


def _same(report: Report, name: str, found: list[float], right: list[float], reached: int) -> None:
    if len(found) != len(right):
        raise Wrong(f"{len(found)} losses are recorded, {len(right)} of the run that was left alone")
    off = max(abs(a / b - 1) for a, b in zip(found, right, strict=True))
    equal = "to the bit equal to" if found == right else f"off by at most {off:.1e} from"
    report.row(name, f"after {reached} of {len(found)} steps; losses {equal} those of the run that was left alone")
    if reached >= len(found):
        raise Wrong("the run had ended before it was cut")
    if not off <= LOSS_OFF:
        raise Wrong(f"a loss is off by {off:.1e}, at most {LOSS_OFF:g} allowed")


def _convert(report: Report, setting: Setting, run: Run) -> None:
    target = run.output.with_name("model")
    words = ["-m", "megainter", "convert", "zero", str(run.output), str(target)]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    if done.returncode:
        raise Wrong(f"ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    model = InterBertForPreTraining.from_pretrained(target).to(setting.device)
    saved = checkpoint.newest(run.output / "checkpoints", print)
    assert saved is not None
    with checkpoint.reader(saved) as read:
        different = [
            name for name, weight in model.named_parameters() if not torch.equal(weight.detach().cpu(), read(WEIGHTS, PREFIX + name))
        ]
    report.row(
        "conversion to a Hugging Face folder", f"{sum(1 for _ in model.parameters())} tensors, {len(different)} differ from the run's"
    )
    if different:
        raise Wrong(f"{different[:3]} differ from the checkpoint's")


if __name__ == "__main__":
    run_part("resume", check)
