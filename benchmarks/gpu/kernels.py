"""Every Triton kernel on the device against float64: values, gradients, and dropout."""

import importlib.util
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.against import LIMITS, Errors, relative_error
from benchmarks.gpu.part import Report, Setting, Wrong, run_part

# Rows and width. The first suit the interpreter, the others reach what the model has: one row, odd sizes, wide and many.
SIZES = ((1, 16), (5, 33), (16, 64))
LARGE = ((1, 768), (5, 768), (333, 1000), (4097, 768), (1000, 1024), (64, 4096), (60_000, 768))
LOSSES, LARGE_LOSSES = ((1, 7), (5, 333)), ((1, 30_522), (300, 1601), (2500, 30_522))
EPSILON = 1e-5
DEVIATIONS = 6.0  # of a share of dropped elements, or of a mean


def check(setting: Setting, report: Report) -> None:
    """Layer norm, GELU, cross entropy and KL in float32, bfloat16 and float16; on a CPU under Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        raise Wrong("Triton is not installed, so that the fused kernels cannot run: pip install triton")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device, errors = torch.device(setting.device), Errors()
    limits = LIMITS if not setting.toy else LIMITS | {torch.bfloat16: 2e-2, torch.float16: 4e-3}  # the interpreter cuts off, a GPU rounds
    for dtype, limit in limits.items():
        for rows, width in SIZES if setting.toy else SIZES + LARGE:
            _layer_norm(errors, device, dtype, rows, width, limit)
            _gelu(errors, device, dtype, rows, width, limit)
        for rows, width in LOSSES if setting.toy else LOSSES + LARGE_LOSSES:
            _cross_entropy(errors, device, dtype, rows, width, limit)
            _kl(errors, device, dtype, rows, width, limit)
        report.tell(worst=errors.worst)
    for p in (0.1, 0.2):
        _dropout(errors, device, p, (40, 64) if setting.toy else (4000, 768))
    report.tell(worst=errors.worst)
    for name in dict.fromkeys(name.partition(",")[0] for name in errors.worst):
        worst = max(error for key, error in errors.worst.items() if key.startswith(f"{name},"))
        report.row(name, f"{worst:.1f} standard deviations" if f"{name}, deviations" in errors.worst else f"off by at most {worst:.1e}")
    if errors.beyond:
        report.tell(failures=errors.beyond[:20])


def _name(what: str, dtype: torch.dtype) -> str:
    return f"{what} {str(dtype).removeprefix('torch.')}"


def _drawn(device: torch.device, dtype: torch.dtype, *sizes: Sequence[int]) -> list[Tensor]:
    return [torch.randn(*size, device=device).to(dtype) for size in sizes]


def _layer_norm(errors: Errors, device: torch.device, dtype: torch.dtype, rows: int, width: int, limit: float) -> None:
    from megainter.kernels.triton.layer_norm import dropout_add_layer_norm

    def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(x, residual, weight, bias, EPSILON, 0.0)

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias, EPSILON)

    x, residual, weight, bias = _drawn(device, dtype, (rows, width), (rows, width), (width,), (width,))
    errors.compare(_name("layer norm", dtype), fused, plain, [x, residual, weight, bias], limit)
    if dtype != torch.float32:  # as under autocast
        errors.compare(_name("layer norm of float32 and", dtype), fused, plain, [x, residual.float(), weight.float(), bias.float()], limit)


def _gelu(errors: Errors, device: torch.device, dtype: torch.dtype, rows: int, width: int, limit: float) -> None:
    from megainter.kernels.triton.gelu import BiasGelu

    errors.compare(
        _name("bias + GELU", dtype), BiasGelu.apply, lambda x, b: F.gelu(x + b), _drawn(device, dtype, (rows, width), (width,)), limit
    )


def _cross_entropy(errors: Errors, device: torch.device, dtype: torch.dtype, rows: int, width: int, limit: float) -> None:
    from megainter.kernels.triton.losses import cross_entropy_rows_

    labels, logits = torch.randint(0, width, (rows,), device=device), (3 * torch.randn(rows, width, device=device)).to(dtype)
    slopes = logits.clone()
    loss, _ = cross_entropy_rows_(slopes, labels, True)
    exact = logits.double().requires_grad_()
    right = F.cross_entropy(exact, labels, reduction="none")
    _add_loss(errors, _name("cross entropy", dtype), (loss, slopes), right, exact, limit)


def _kl(errors: Errors, device: torch.device, dtype: torch.dtype, rows: int, width: int, limit: float) -> None:
    from megainter.kernels.triton.losses import soft_label_kl_rows

    logits = (3 * torch.randn(rows, width, device=device)).to(dtype)
    targets = torch.randn(rows, width, device=device).mul(3).softmax(-1)
    exact = logits.double().requires_grad_()
    right = F.kl_div(exact.log_softmax(-1), targets.double(), reduction="none").sum(-1)
    _add_loss(errors, _name("soft-label KL", dtype), soft_label_kl_rows(logits, targets, True), right, exact, limit)


def _add_loss(errors: Errors, name: str, ours: tuple[Tensor, Tensor], right: Tensor, exact: Tensor, limit: float) -> None:
    (slopes,) = torch.autograd.grad(right.sum(), exact)
    for what, a, b in (("value", ours[0], right), ("gradient", ours[1], slopes)):
        errors.add(f"{name}, {what}", relative_error(a, b), limit, f"{list(exact.shape)}")


def _dropout(errors: Errors, device: torch.device, p: float, size: tuple[int, int]) -> None:
    """The mask is read off the gradient of ``x``; with that mask float64 must give the same, its share must be p, and a seed repeats it."""
    from megainter.kernels.triton.layer_norm import DropoutAddLayerNorm

    inputs = _drawn(device, torch.float32, size, size, size[1:], size[1:])
    fused = partial(_seeded_norm, operation=DropoutAddLayerNorm, p=p)
    direction = torch.randn(size, device=device, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = fused(*leaves, seed=12345)
    gradients = torch.autograd.grad((value.double() * direction).sum(), leaves)
    kept = (gradients[0] != 0).double()

    exact = [x.double().requires_grad_() for x in inputs]
    right = F.layer_norm(exact[0] * kept / (1 - p) + exact[1], size[1:], exact[2], exact[3], EPSILON)
    wanted = torch.autograd.grad((right * direction).sum(), exact)
    for place, (a, b) in enumerate(zip((value, *gradients), (right, *wanted))):
        errors.add(f"dropout {p} in layer norm, {f'gradient {place}' if place else 'value'}", relative_error(a, b), LIMITS[torch.float32])

    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    errors.add(f"dropout {p} share, deviations", abs(float(1 - kept.mean()) - p) / deviation, DEVIATIONS)
    again, other = (fused(*inputs, seed=seed) for seed in (12345, 12346))
    errors.add(f"dropout {p} repeated, difference", float((again - value.detach()).abs().max()), 0.0)
    if torch.equal(again, other):
        errors.beyond.append(f"dropout {p}: two seeds give one mask")


def _seeded_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, operation: type[torch.autograd.Function], p: float, seed: int
) -> Tensor:
    made: Tensor = operation.apply(x, residual, weight, bias, EPSILON, p, seed)
    return made


if __name__ == "__main__":
    run_part("kernels", check)
