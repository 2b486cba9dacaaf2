"""What a training step would ask of a GPU, counted on a CPU: kernels to launch, and moments in which the host would wait.

Counted are the operations that reach a device's kernels. Views, shapes and allocations launch nothing; what works on a list of tensors
counts once (CUDA takes one launch for some tens of tensors). On a GPU the model has other forms (Triton, flash attention), so of its part
only the waits are settled elsewhere (``tests/model/test_no_waits.py``), on tensors that are not there.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import megainter

aten = torch.ops.aten
NOTHING = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
           "_reshape_alias", "resize_", "set_", "is_same_size", "is_pinned", "_pin_memory"}  # fmt: skip
READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}
INDEXED = {"index", "index_put", "index_put_"}
TO_HOST = {Tensor.cpu, Tensor.numpy, Tensor.tolist}
FROM_HOST = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
OURS = Path(megainter.__file__).parent
AUTOGRAD = "deepspeed/runtime/engine.py backward"  # what the graph launches, not DeepSpeed
LINEAR = "deepspeed/runtime/zero/linear.py"  # stage 3 puts its form of a linear layer in place of torch's


@dataclass
class Asked:
    """Launches and waits by the place in our code or DeepSpeed's that asked: "training/clipping.py clip_each:32"."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    collectives: list[tuple[str, str]] = field(default_factory=list)  # name, device of its tensors

    def of(self, *parts: str) -> int:
        """Launches of places whose name contains one of ``parts``."""
        return sum(number for place, number in self.launches.items() if any(part in place for part in parts))

    @property
    def around(self) -> int:
        """Launches of the engine and the optimiser: all but the model's forward pass and what the graph launches for its gradients."""
        return sum(number for place, number in self.launches.items() if not is_models(place))


def is_models(place: str) -> bool:
    """Whether the model's forward pass or its graph asked."""
    return place.startswith(("model/", "kernels/", "tasks/pretraining/objective.py", "transfers.py", AUTOGRAD, LINEAR))


def place() -> str:
    """The innermost frame of ours or of DeepSpeed's."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/deepspeed/" in path:
            return f"deepspeed/{path.partition('/deepspeed/')[2]} {frame.f_code.co_name}:{frame.f_lineno}"
        if path.startswith(str(OURS)):
            return f"{Path(path).relative_to(OURS)} {frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


class _Operations(TorchDispatchMode):
    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d":
            tensors = [t for value in args for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]
            self.asked.collectives.append((name, str(tensors[0].device) if tensors else "none"))
        elif name in READ or (name in INDEXED and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])):
            self.asked.waits[place()] += 1
        elif func.namespace == "aten" and not func.is_view and name not in NOTHING:
            self.asked.launches[place()] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Copies between host and device, which a CPU does not make."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in TO_HOST or (func in FROM_HOST and (kwargs.get("device") is not None or func is Tensor.new_tensor)):
            self.asked.waits[place()] += 1
        return func(*args, **kwargs)


@contextmanager
def counted() -> Iterator[Asked]:
    """What is asked within the block."""
    asked = Asked()
    with _Calls(asked), _Operations(asked):
        yield asked
