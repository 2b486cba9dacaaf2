"""How the benchmarks measure: seconds, rates and memory, on a GPU as on a CPU."""

import platform
import resource
import statistics
import time
from collections.abc import Callable

import torch

HEAD_START = 2_000_000  # cycles that a GPU spins, about a millisecond, so that the host is ahead of what is measured
CPU = torch.device("cpu")


def finish(device: torch.device) -> None:
    """Wait until all that was asked of the device is done; a clock is read after that only."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run as its user waits for it: from an idle device to an idle device."""
    finish(device)
    start = time.perf_counter()
    action()
    finish(device)
    return time.perf_counter() - start


def device_seconds(action: Callable[[], object], device: torch.device, rounds: int = 20, warm: int = 5) -> float:
    """Median seconds that the device itself needs, without the host's launches; on a CPU they are the same.

    On a GPU between two events, behind a kernel that spins while the host asks for the work.
    """
    for _ in range(warm):
        action()
    if device.type != "cuda":
        return statistics.median(seconds_of(action, device) for _ in range(rounds))
    marks = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START)
        begin.record()
        action()
        end.record()
        marks.append((begin, end))
        torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in marks) / 1000


def product_rate(
    dtype: torch.dtype, rows: int = 1536, seconds: float = 2.0, device: torch.device = CPU, inner: int = 768, outer: int = 3072
) -> float:
    """GFLOP/s of the matrix product [rows, inner] x [inner, outer], by default the model's largest layer: the median of repetitions."""
    a, b = torch.randn(rows, inner, dtype=dtype, device=device), torch.randn(outer, inner, dtype=dtype, device=device)
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < seconds:
        times.append(device_seconds(lambda: torch.nn.functional.linear(a, b), device, rounds=1, warm=0 if times else 1))
    return 2 * rows * inner * outer / statistics.median(times) / 1e9


def copy_rate(device: torch.device, size: int) -> float:
    """Bytes a second that a copy within the device's memory reads and writes together, of a tensor of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / device_seconds(lambda: target.copy_(source), device)


def peak_mib(device: torch.device) -> float:
    """The most memory so far: of PyTorch's tensors on a GPU, since `forget_peak`; resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak(device: torch.device) -> None:
    """Begin anew with `peak_mib`, and give unused memory back to others on the GPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def machine(device: torch.device = CPU) -> str:
    """The device's name, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"
