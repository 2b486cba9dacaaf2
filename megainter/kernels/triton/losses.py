"""Cross entropy and soft-label KL over rows of logits: the loss and its gradient in two passes, the gradient written over the logits.

With s = softmax(z): cross entropy log sum exp z - z[label], gradient s - onehot(label);
KL sum t (log t - log s), gradient s sum(t) - t.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits at a time


@triton.jit
def _log_sum_exp(z_ptr, width, BLOCK: tl.constexpr):
    """(log sum exp, maximum) of one row, in one pass."""
    highest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    return highest + tl.log(total), highest


@triton.jit
def _cross_entropy(z_ptr, label_ptr, loss_ptr, right_ptr, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    label = tl.load(label_ptr + row)
    log_sum, highest = _log_sum_exp(z_ptr, width, BLOCK)
    of_label = tl.load(z_ptr + label).to(tl.float32)
    tl.store(loss_ptr + row, log_sum - of_label)
    tl.store(right_ptr + row, (of_label >= highest).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the label's logit has been read by every thread
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(z - log_sum) - tl.where(column == label, 1.0, 0.0)
            tl.store(z_ptr + column, gradient.to(z_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _soft_label_kl(z_ptr, target_ptr, loss_ptr, gradient_ptr, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * width
    target_ptr += row * width
    log_sum, _ = _log_sum_exp(z_ptr, width, BLOCK)
    loss = tl.zeros([], tl.float32)
    mass = tl.zeros([], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        positive = target > 0.0
        loss += tl.sum(tl.where(positive, target * (tl.log(tl.where(positive, target, 1.0)) - z + log_sum), 0.0), 0)
        mass += tl.sum(target, 0)
    tl.store(loss_ptr + row, loss)
    if GRADIENT:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(z_ptr + column, mask=column < width, other=float("-inf")).to(tl.float32)
            target = tl.load(target_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            gradient = tl.exp(z - log_sum) * mass - target
            tl.store(gradient_ptr + row * width + column, gradient.to(gradient_ptr.dtype.element_ty), mask=column < width)


def cross_entropy_rows_(logits: Tensor, labels: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Loss and 1.0 where the label has the highest logit, float32 [M] each; with ``gradient`` the logits [M, V] become their gradient."""
    loss, right = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    if len(logits):
        width = logits.shape[1]
        block = min(BLOCK, triton.next_power_of_2(width))
        _cross_entropy[(len(logits),)](logits, labels, loss, right, width, GRADIENT=gradient, BLOCK=block)
    return loss, right


def soft_label_kl_rows(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """KL(target || softmax(logits)) float32 [K], and its gradient [K, C] (empty without ``gradient``)."""
    logits, targets = logits.contiguous(), targets.contiguous()
    loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    slopes = torch.empty_like(logits) if gradient else logits.new_empty(0)
    if len(logits):
        width = logits.shape[1]
        block = min(BLOCK, triton.next_power_of_2(width))
        _soft_label_kl[(len(logits),)](logits, targets, loss, slopes, width, GRADIENT=gradient, BLOCK=block)
    return loss, slopes
