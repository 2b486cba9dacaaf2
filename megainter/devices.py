"""The device that a ``--device`` option names, known to be there before work begins."""

import torch

from megainter.errors import UsageError


def torch_device(name: str) -> torch.device:
    """The device ``name`` ("cpu", "cuda", "cuda:1", ...); ``UsageError`` where it is misspelt or not on this machine."""
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
