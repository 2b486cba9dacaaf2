"""The machine: versions, the card, and the rates against which everything else is held."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.timing import copy_rate, finish, machine, product_rate

PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "torchvision", "lmdb", "safetensors", "pydantic")
CARD = ("name", "memory.total", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
TOKENS_OF_SAMPLE = 43  # on average (benchmarks/batches.py)
HIDDEN, INTERMEDIATE, VOCABULARY = 768, 3072, 30522


def check(setting: Setting, report: Report) -> None:
    """Versions, the card and its driver; product rates at the model's shapes, copy bandwidth, cost of a launch."""
    device = torch.device(setting.device)
    report.tell(python=platform.python_version(), cores=os.cpu_count(), versions=versions(), device=machine(device))
    report.row("machine", f"{machine(device)}, {os.cpu_count()} cores")
    report.row("software", ", ".join(f"{name} {number}" for name, number in versions().items()))
    if device.type == "cuda":
        _card(report, device)
    _rates(report, device, setting.toy)


def versions() -> dict[str, str]:
    """Those of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _card(report: Report, device: torch.device) -> None:
    properties = torch.cuda.get_device_properties(device)
    asked = _asked()
    report.tell(
        capability=torch.cuda.get_device_capability(device), memory_mib=properties.total_memory / 2**20, cuda=torch.version.cuda,
        processors=properties.multi_processor_count, nvidia_smi=asked, cudnn=torch.backends.cudnn.version(), nccl=torch.cuda.nccl.version(),
    )  # fmt: skip
    report.row("card", f"{properties.total_memory / 2**20:,.0f} MiB; {', '.join(CARD)}: {asked}")
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    report.row("libraries", f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}")


def _asked() -> str:
    """What nvidia-smi says of the card; a container may lack it."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        return f"nvidia-smi cannot be run ({error})"
    return (done.stdout or done.stderr).strip() or "nvidia-smi says nothing"


def _rates(report: Report, device: torch.device, toy: bool) -> None:
    seconds = 0.05 if toy else 0.5
    for samples in (4,) if toy else (64, 512, 2048):
        rows = samples * TOKENS_OF_SAMPLE
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            _rate(report, device, dtype, (rows, HIDDEN, INTERMEDIATE), seconds)
    _rate(report, device, torch.bfloat16, (64 if toy else 8192, HIDDEN, VOCABULARY), seconds)
    if not toy:
        _rate(report, device, torch.bfloat16, (8192, 8192, 8192), seconds)
        torch.backends.cuda.matmul.allow_tf32 = True
        _rate(report, device, torch.float32, (2048 * TOKENS_OF_SAMPLE, HIDDEN, INTERMEDIATE), seconds, " (TF32)")
        torch.backends.cuda.matmul.allow_tf32 = False
    bandwidth = copy_rate(device, 1 << 20 if toy else 1 << 31)
    report.tell(copy_bytes_per_second=bandwidth)
    report.row("copy within memory", f"{bandwidth / 1e12:.2f} TB/s")
    cost = launch_seconds(device, 200 if toy else 5000)
    report.tell(launch_microseconds=1e6 * cost)
    report.row("one small operation, asked by the host", f"{1e6 * cost:.1f} us")


def _rate(report: Report, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], seconds: float, note: str = "") -> None:
    rate = product_rate(dtype, shape[0], seconds, device, shape[1], shape[2])
    name = f"product {str(dtype).removeprefix('torch.')}{note} {'x'.join(map(str, shape))}"
    report.tell(**{f"{name}, GFLOP/s": rate})
    report.row(name, f"{rate / 1000:.1f} TFLOP/s")


def launch_seconds(device: torch.device, count: int) -> float:
    """What asking for one small operation costs the host, the device keeping up or not."""
    small = torch.zeros(8, device=device)
    small.add_(1)
    finish(device)
    began = time.perf_counter()
    for _ in range(count):
        small.add_(1)
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    run_part("environment", check)
