"""A GPU that is not there: tensors with shapes, dtypes and a CUDA device, and no numbers; whatever would make a host wait is refused.

They are PyTorch's meta tensors that say of themselves that they are on ``GPU``. Forms that Triton and flash attention would compute are
the plain ones here, because a kernel cannot be launched on what has no memory: the device says that it is of compute capability 6.0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Operations whose outcome, or its shape, the host reads.
READ = (aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.allclose, aten.nonzero, aten.masked_select, aten.bincount,
        aten._unique2, aten.unique_consecutive, aten.unique_dim, aten.nonzero_numpy)  # fmt: skip
INDEXED = (aten.index, aten.index_put, aten.index_put_)
FROM_DATA = (torch.tensor, torch.as_tensor, torch.asarray)
TO_HOST = (Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__)


class Waits(AssertionError):
    """An operation for which a host would wait for its GPU, or of tensors on different devices."""


class OnGpu(Tensor):
    """A meta tensor that takes itself for one on ``GPU``; what is computed from it is one too."""

    device = GPU
    is_cuda = True


def _on_gpu(value: Any) -> Any:
    here = isinstance(value, Tensor) and value.is_meta and not isinstance(value, OnGpu)
    return value.as_subclass(OnGpu) if here else value


class _Devices(TorchFunctionMode):
    """What names ``GPU`` is made without memory, and what a caller gets back says that it is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.pin_memory:
            return args[0]
        if func in TO_HOST and isinstance(args[0], OnGpu):
            raise Waits(f"{func.__name__} of a tensor on the GPU: the host waits for its numbers")
        if (func in FROM_DATA and _is_gpu(kwargs.get("device"))) or (func is Tensor.new_tensor and isinstance(args[0], OnGpu)):
            raise Waits(f"{func.__name__} makes a tensor on the GPU from numbers of the host, and waits until they are there")
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], OnGpu) and isinstance(args[1], list):
            raise Waits("a tensor on the GPU is indexed by numbers of the host, which waits until they are there")
        args, kwargs = tree_map(lambda value: torch.device("meta") if _is_gpu(value) else value, (args, kwargs))
        return tree_map(_on_gpu, func(*args, **kwargs))


def _is_gpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value.partition(":")[0] == "cuda")


class _Refusals(TorchDispatchMode):
    """Refuses what waits; all operations come here, also those of the backward pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():  # in inference mode compound operations come here as they are
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors) or kwargs.get("device") == torch.device("meta"):
            self._check(func.overloadpacket, tensors, args, kwargs)
        with torch._C.DisableTorchFunction():  # PyTorch's own code for meta tensors is to see them as what they are
            plain = {id(tensor): tensor.as_subclass(Tensor) for tensor in tensors if isinstance(tensor, OnGpu)}
            given = {id(plain[id(tensor)]): tensor for tensor in tensors if id(tensor) in plain}
            args, kwargs = tree_map(lambda value: plain.get(id(value), value), (args, kwargs))
            return tree_map(lambda value: given.get(id(value), value), func(*args, **kwargs))  # what is changed in place stays itself

    def _check(self, packet: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> None:
        if packet in READ or (packet is aten.repeat_interleave and kwargs.get("output_size") is None):
            raise Waits(f"{packet} of a tensor on the GPU: the host waits for its outcome")
        if packet in INDEXED and any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            raise Waits(f"{packet} by a mask on the GPU: the host waits for the number of its elements")
        if packet is aten._to_copy:
            _check_copy(packet, tensors[0], torch.device(kwargs.get("device") or "meta"), kwargs.get("non_blocking", False))
        elif packet is aten.copy_:
            _check_copy(packet, tensors[1], torch.device("meta" if tensors[0].is_meta else "cpu"), (*args, kwargs.get("non_blocking"))[2])
        elif packet is not aten.empty_like and (strangers := [tensor.shape for tensor in tensors if not tensor.is_meta and tensor.dim()]):
            raise Waits(f"{packet} of a tensor on the GPU and one of shape {list(strangers[0])} on the CPU")


def _check_copy(packet: Any, source: Tensor, target: torch.device, non_blocking: bool) -> None:
    if source.is_meta and target.type == "cpu":
        raise Waits(f"{packet} from the GPU to the CPU")
    if not source.is_meta and target.type == "meta" and not non_blocking:
        raise Waits(f"{packet} from the CPU to the GPU without non_blocking: the host waits for what the device computes before it")


@contextmanager
def fake_gpu() -> Iterator[None]:
    """A block in which ``GPU`` can be computed on, forward and backward."""
    with mock.patch("torch.cuda.get_device_capability", return_value=(6, 0)), _Devices(), _Refusals():
        yield
