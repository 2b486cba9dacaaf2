"""Where the time of a few steps goes: a Chrome trace, and a table by module, in the run folder.

Modules are timed around their forward pass, the backward pass as a whole (autograd does not know modules), the update by the optimiser's
own mark. While steps are profiled they are slower; the shares are what to look at.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from megainter.files import write_atomically
from megainter.training.world import World

WARM_UP = 2  # steps left out: the first ones allocate
FOLDER = "profile"
MODULE, BACKWARD, UPDATE = "module ", "autograd::engine::evaluate_function", "Optimizer.step"
DEEPEST = 5  # parts of a module's name: model.interbert.encoder.text.0


class StepProfile:
    """Profiles ``steps`` steps after two of warm-up, on every rank; nothing where ``steps`` is 0. ``step()`` ends each step."""

    def __init__(self, steps: int, module: nn.Module, output: Path, world: World) -> None:
        self.left = steps + WARM_UP if steps else 0
        self.steps, self.module, self.folder, self.world = steps, module, output / FOLDER, world
        self.running: Any = None
        self.stack = ExitStack()

    def warn_if_short(self, steps: int) -> str | None:
        """A line for the user where a run of so many steps ends before the profile is whole."""
        if not self.left or steps >= self.left:
            return None
        return f"training.profile_steps {self.steps} needs {self.left} steps, and {steps} are left: no profile will be written"

    def step(self) -> None:
        """Tell that a training step has ended."""
        if not self.left:
            return
        self.left -= 1
        if self.left == self.steps:
            self._start()
        elif not self.left:
            self._write()

    def _start(self) -> None:
        cuda = self.world.device.type == "cuda"
        for name, module in self.module.named_modules():
            if name and name.count(".") < DEEPEST:
                _time_forward(self.stack, MODULE + name, module)
        self.running = self.stack.enter_context(profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]))

    def _write(self) -> None:
        self.stack.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.running.export_chrome_trace(str(self.folder / f"trace-rank-{self.world.rank:05}.json"))
        if self.world.rank == 0:
            write_atomically(self.folder / "modules.txt", table(self.running.key_averages(), self.steps))


def _time_forward(stack: ExitStack, name: str, module: nn.Module) -> None:
    """Mark every forward pass of ``module`` in the profile until ``stack`` closes. A stack of marks, as a module may call itself."""
    marks: list[Any] = []

    def begin(*_: Any) -> None:
        marks.append(record_function(name))
        marks[-1].__enter__()

    def end(*_: Any) -> None:
        marks.pop().__exit__(None, None, None)

    for handle in (module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True)):
        stack.callback(handle.remove)


def table(events: Any, steps: int) -> str:
    """Milliseconds a step, one line per module in the order of their names, then the backward pass and the update.

    The second column is the device's time: that of kernels on CUDA, the processor's own elsewhere.
    """
    rows = [(event.key.removeprefix(MODULE), event) for event in events if event.key.startswith(MODULE)]
    backward = [event for event in events if event.key.startswith(BACKWARD)]
    update = [event for event in events if event.key.startswith(UPDATE)]
    lines = [f"{'module (forward pass)':<48} {'calls':>7} {'CPU ms':>10} {'device ms':>10}"]
    lines += [_line(name, [event], steps) for name, event in sorted(rows)]
    lines += [_line("(backward pass, all modules)", backward, steps), _line("(update)", update, steps)]
    return "\n".join(lines) + "\n"


def _line(name: str, events: list[Any], steps: int) -> str:
    cpu, device = (sum(getattr(event, part) for event in events) / steps / 1000 for part in ("cpu_time_total", "device_time_total"))
    return f"{name:<48} {sum(event.count for event in events) / steps:>7.0f} {cpu:>10.2f} {device or cpu:>10.2f}"
