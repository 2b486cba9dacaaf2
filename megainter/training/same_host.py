"""Memory that all ranks of one host see: what one has written the others read, instead of getting it through sockets."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

BOOT = Path("/proc/sys/kernel/random/boot_id")  # of the running system: the same in all of its containers


def everyones(own: Tensor) -> list[Tensor] | None:
    """Each rank's copy of ``own`` (contiguous, on the CPU, of one size and dtype everywhere), by rank, as memory that all of them share.

    ``result[rank]`` takes the place of ``own``. None where some rank cannot see another's memory: on several hosts, without Linux's
    ``memfd`` and ``/proc``, in containers with processes of their own. Collective; barriers between writing and reading are the caller's.
    """
    name = f"megainter-{os.getpid()}"
    file = _opened(name, own.numel() * own.element_size())
    told: list[tuple[str, int, int, str]] = [("", 0, 0, "")] * dist.get_world_size()
    dist.all_gather_object(told, (_boot(), os.getpid(), file, name))
    seen = [_mapped(*one, own) for one in told]
    agreed: list[bool] = [False] * len(told)
    dist.all_gather_object(agreed, all(tensor is not None for tensor in seen))  # also: nobody opens a file any more
    if file >= 0:
        os.close(file)
    if not all(agreed):
        return None
    shared = [tensor for tensor in seen if tensor is not None]
    shared[dist.get_rank()].copy_(own)
    dist.barrier()
    return shared


def _boot() -> str:
    return BOOT.read_text().strip() if BOOT.is_file() else ""


def _opened(name: str, size: int) -> int:
    """A descriptor of new shared memory, -1 where there can be none."""
    try:
        file = os.memfd_create(name)
        os.truncate(file, size)
    except (AttributeError, OSError):
        return -1
    return file


def _mapped(boot: str, process: int, file: int, name: str, own: Tensor) -> Tensor | None:
    """Another rank's memory, if it is of this host and can be seen."""
    path = f"/proc/{process}/fd/{file}"
    try:
        if file < 0 or not boot or boot != _boot() or name not in os.readlink(path):
            return None
        return torch.from_file(path, shared=True, size=own.numel(), dtype=own.dtype)
    except (OSError, RuntimeError):
        return None
