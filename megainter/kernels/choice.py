"""Which form of an operation runs on a device, and what the start-up log says about it; attention's own choice is in `attention`."""

import importlib.util
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KernelChoice:
    """Which form of an operation runs here, and the reason in a few words."""

    operation: str
    form: str
    why: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.form} ({self.why})"


def has_triton(device: torch.device) -> bool:
    """Triton's forms run on CUDA devices of compute capability 7.0 and more, where Triton is installed (it comes with PyTorch on Linux)."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


def triton_choice(operation: str, device: torch.device) -> KernelChoice:
    """The line about an operation that has a Triton form."""
    if has_triton(device):
        return KernelChoice(operation, "Triton", "one pass over memory instead of several")
    why = "Triton needs a CUDA device" if device.type != "cuda" else "no Triton for this device here"
    return KernelChoice(operation, "plain PyTorch", why)
