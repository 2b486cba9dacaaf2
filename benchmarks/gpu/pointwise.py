"""Our Triton kernels against plain PyTorch and torch.compile: milliseconds and share of the memory's bandwidth; forms of attention."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.attention_forms import Form, P, forms, some_lengths
from benchmarks.gpu.part import Report, Setting, Wrong, run_part
from benchmarks.timing import copy_rate, device_seconds
from megainter.kernels.attention import SequenceLayout

ROWS, TOY_ROWS = 89_000, 16  # tokens of 2,048 samples: 137 MB at the model's width, which no cache holds
HIDDEN, INTERMEDIATE, VOCABULARY, MASKED = 768, 3072, 30522, 4096


@dataclass(frozen=True)
class Contest:
    """One operation of several implementations on the same ``inputs``; passes over memory are of one input's size."""

    name: str
    inputs: Sequence[Tensor]
    ways: dict[str, Callable[..., Tensor]]
    forward_bytes: int
    both_bytes: int


def check(setting: Setting, report: Report) -> None:
    """The bytes are those that an implementation in one pass has to read and write."""
    if importlib.util.find_spec("triton") is None:
        raise Wrong("Triton is not installed: nothing to compare")
    device = torch.device(setting.device)
    bandwidth = copy_rate(device, 1 << 20 if setting.toy else 1 << 31)
    rows = TOY_ROWS if setting.toy else ROWS
    for contest in (_norm(device, rows, setting.toy), _gelu(device, rows, setting.toy), _entropy(device, setting.toy)):
        for way, operation in contest.ways.items():
            report.tried(
                f"{contest.name}, {way}",
                lambda contest=contest, way=way, operation=operation: _measure(report, contest, way, operation, bandwidth, setting),
            )
    for kind, heads, width in (("joint", 2, 16),) if setting.toy else (("joint", 12, 64), ("text", 12, 64), ("region", 8, 96)):
        for samples in (2,) if setting.toy else (64, 1024):
            _attention(report, setting, kind, heads, width, samples)


def _measure(report: Report, contest: Contest, way: str, operation: Callable[..., Tensor], bandwidth: float, setting: Setting) -> None:
    device, rounds, warm = torch.device(setting.device), 1 if setting.toy else 20, 1 if setting.toy else 5
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in contest.inputs]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    direction = torch.ones_like(operation(*leaves))
    forward = device_seconds(lambda: operation(*leaves), device, rounds, warm)
    both = device_seconds(lambda: torch.autograd.grad(operation(*leaves), wanted, direction), device, rounds, warm)
    shares = contest.forward_bytes / forward / bandwidth, contest.both_bytes / both / bandwidth
    report.tell(**{f"{contest.name}, {way}": {"forward_ms": 1000 * forward, "both_ms": 1000 * both, "shares": shares}})
    said = f"forward {1000 * forward:.3f} ms ({shares[0]:.0%} of the copy bandwidth), with backward {1000 * both:.3f} ms ({shares[1]:.0%})"
    report.row(f"{contest.name}, {way}", said)


def compiled(operation: Callable[..., Tensor], toy: bool) -> Callable[..., Tensor]:
    """By Inductor; at toy sizes by what needs no C++ compiler."""
    made: Callable[..., Tensor] = torch.compile(operation, backend="aot_eager" if toy else "inductor")
    return made


def _drawn(device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def _norm(device: torch.device, rows: int, toy: bool) -> Contest:
    from megainter.kernels.triton.layer_norm import dropout_add_layer_norm

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(x, P) + residual, weight.shape, weight, bias, 1e-12)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, residual, weight, bias, 1e-12, P)

    width = 32 if toy else HIDDEN
    inputs, size = _drawn(device, (rows, width), (rows, width), (width,), (width,)), 2 * rows * width
    return Contest(
        "dropout + add + layer norm", inputs, _three(ours, plain, toy), 4 * size, 8 * size
    )  # the sum is kept for the backward pass


def _gelu(device: torch.device, rows: int, toy: bool) -> Contest:
    from megainter.kernels.triton.gelu import BiasGelu

    def plain(x: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias)

    width = 48 if toy else INTERMEDIATE
    size = 2 * rows * width
    return Contest("bias + GELU", _drawn(device, (rows, width), (width,)), _three(BiasGelu.apply, plain, toy), 2 * size, 5 * size)


def _entropy(device: torch.device, toy: bool) -> Contest:
    from megainter.kernels.triton.losses import cross_entropy_rows_

    rows, width = (4, 64) if toy else (MASKED, VOCABULARY)
    labels = torch.randint(0, width, (rows,), device=device)

    def plain(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    inputs, size = _drawn(device, (rows, width)), 2 * rows * width
    return Contest("cross entropy", inputs, _three(_FusedEntropy.bound(cross_entropy_rows_, labels), plain, toy), size, 2 * size)


class _FusedEntropy(torch.autograd.Function):
    """Loss and gradient in one pass, in place of the logits, as `linear_cross_entropy_sum` uses the kernel: its forward is all it does.
    Run again it takes its own outcome for logits, which costs the same."""

    @staticmethod
    def bound(kernel: Callable[..., tuple[Tensor, Tensor]], labels: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda logits: _FusedEntropy.apply(logits, labels, kernel)

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, labels: Tensor, kernel: Callable[..., tuple[Tensor, Tensor]]
    ) -> Tensor:
        ctx.slopes = logits.detach()  # type: ignore[attr-defined]
        return kernel(ctx.slopes, labels, True)[0].sum()  # type: ignore[attr-defined]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, direction: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.slopes, None, None  # type: ignore[attr-defined]


def _three(ours: Callable[..., Tensor], plain: Callable[..., Tensor], toy: bool) -> dict[str, Callable[..., Tensor]]:
    return {"Triton": ours, "PyTorch": plain, "torch.compile": compiled(plain, toy)}


def _attention(report: Report, setting: Setting, kind: str, heads: int, width: int, samples: int) -> None:
    """Forward and backward of one layer's attention, with the recipe's dropout where a form has it."""
    device = torch.device(setting.device)
    layout = SequenceLayout.of(some_lengths(samples, kind), device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    leaves = [torch.randn(len(layout.sequence), heads, width, device=device, dtype=dtype).requires_grad_() for _ in range(3)]
    direction = torch.ones_like(leaves[0])
    found: dict[str, float] = {}
    for form in forms(device):
        try:
            found[form.name if form.drops else f"{form.name} without dropout"] = 1000 * _attention_seconds(
                form, leaves, layout, direction, setting.toy
            )
        except Exception as error:
            report.tell(**{"failures" if form.ours else "not running": [f"{form.name}: {error}"[:300]]})
    report.tell(**{f"attention {kind}, {samples} samples, ms": found})
    report.row(f"attention, {kind}, {samples} samples", ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items()))


def _attention_seconds(form: Form, leaves: list[Tensor], layout: SequenceLayout, direction: Tensor, toy: bool) -> float:
    drop = P if form.drops else 0.0
    return device_seconds(
        lambda: torch.autograd.grad(form.attend(*leaves, layout, layout, drop), leaves, direction),
        layout.cu_seqlens.device, rounds=1 if toy else 10, warm=1 if toy else 3,
    )  # fmt: skip


if __name__ == "__main__":
    run_part("pointwise", check)
