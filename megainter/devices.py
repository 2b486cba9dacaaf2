"""The device that a ``--device`` option names, known to be there before work begins, and the units it computes with."""

from pathlib import Path

import torch

from megainter.errors import UsageError
from megainter.precision import Units, cpu_units, cuda_units


def torch_device(name: str) -> torch.device:
    """The device ``name`` ("cpu", "cuda", "cuda:1"; "auto" is a GPU where there is one, else the CPU).

    ``UsageError`` where it is misspelt or not on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name)
        here = (device.index or 0) < gpus if device.type == "cuda" else _computes(device)
    except (RuntimeError, AssertionError):  # of a name that PyTorch does not know, of a kind it was built without
        here = False
    if not here:
        found = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "no GPU"
        raise UsageError(f"--device {name}: PyTorch finds no such device here ({found}); give {'cuda or cpu' if gpus else 'cpu'}")
    return device


def _computes(device: torch.device) -> bool:
    """Not asked of CUDA, whose start in a parent process would cost its children memory."""
    return device.type != "meta" and float(torch.ones(1, device=device)) == 1.0


def devices_named(name: str | None) -> list[torch.device]:
    """Every device that work on ``name`` may run on: all GPUs for "cuda"; for None or "auto" these where there are any, else the CPU."""
    if name in (None, "auto"):
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cuda":
        return [torch.device(str(name))]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def units_of(device: torch.device) -> Units:
    """What ``device`` computes with units of its own. Of a device that is neither CPU nor CUDA nothing but fp32 is known."""
    if device.type == "cuda":
        return cuda_units(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if device.type == "cpu":
        return cpu_units(_cpuinfo())
    return Units(f"a device of kind {device.type}", frozenset({"fp32"}))


def _cpuinfo() -> str:
    """Empty where the system has no such file, as on macOS: fp32 is right on every CPU."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
