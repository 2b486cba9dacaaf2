"""One pretraining step of the base model on the device against the same on the CPU in fp32, without dropout: losses and gradients."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.batches import make_batch
from benchmarks.gpu.against import relative_error
from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.sizes import BASE, TOY
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.pretraining.batches import PretrainBatch
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "region_hidden_dropout_prob": 0.0}
LOSS_OFF, GRADIENT_OFF = 1e-5, 1e-3  # in fp32, relative
ROUNDED_LOSS_OFF, ROUNDED_GRADIENT_OFF = 1e-2, 1e-1  # in bf16, which keeps 8 bits


@dataclass(frozen=True)
class Outcome:
    """Loss, ``tallies`` [2, 3] (loss sums and correct predictions of the objectives), and gradients by name in float32 on the CPU."""

    loss: float
    tallies: Tensor
    gradients: dict[str, Tensor]


def check(setting: Setting, report: Report) -> None:
    """fp32 on both, then bf16 by autocast (ZeRO stage 0) and bf16 weights (stages 1 to 3) on the device."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model = InterBertForPreTraining(InterBertConfig(**NO_DROPOUT, **(TOY if setting.toy else BASE))).train()
    model.fusion.dropout_p = 0.0
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    batch = make_batch(2 if setting.toy else 8, 3)
    right = outcome(model, batch, "cpu", torch.float32, False)
    report.tell(cpu_loss=right.loss, cpu_tallies=right.tallies.tolist())
    for name, dtype, autocast in (
        ("fp32", torch.float32, False),
        ("bf16 autocast", torch.float32, True),
        ("bf16 weights", torch.bfloat16, False),
    ):
        model.load_state_dict(kept)
        ours = outcome(model, batch, setting.device, dtype, autocast)
        limits = (LOSS_OFF, GRADIENT_OFF) if name == "fp32" else (ROUNDED_LOSS_OFF, ROUNDED_GRADIENT_OFF)
        _compare(report, name, ours, right, limits)


def outcome(model: InterBertForPreTraining, batch: PretrainBatch, device: str, dtype: torch.dtype, autocast: bool) -> Outcome:
    """Forward and backward of one batch, the model moved to ``device`` and ``dtype``."""
    step = PretrainingStep(model.to(device=device, dtype=dtype), ObjectiveWeights())  # type: ignore[call-arg]
    step.zero_grad(set_to_none=True)
    counts = torch.tensor(batch.counts(), dtype=torch.float32).clamp(min=1).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        loss, tallies = step(batch.to(device), counts)
    loss.backward()
    gradients = {name: p.grad.detach().float().cpu() for name, p in step.named_parameters() if p.grad is not None}
    return Outcome(float(loss.detach()), tallies.cpu(), gradients)


def _compare(report: Report, name: str, ours: Outcome, right: Outcome, limits: tuple[float, float]) -> None:
    loss_off = abs(ours.loss / right.loss - 1)
    difference = math.sqrt(sum(float((ours.gradients[key] - value).double().square().sum()) for key, value in right.gradients.items()))
    gradient_off = difference / math.sqrt(sum(float(value.double().square().sum()) for value in right.gradients.values()))
    each = {key: relative_error(ours.gradients[key], value) for key, value in right.gradients.items()}
    # a key's bias moves all scores of a row alike: its gradient is rounding alone
    worst = sorted((key for key in each if not key.endswith("key.bias")), key=lambda key: each[key])[-3:]
    report.tell(**{name: {"loss": ours.loss, "loss_off": loss_off, "gradient_off": gradient_off, "tallies": ours.tallies.tolist(),
                          "worst_gradients": {key: each[key] for key in worst}}})  # fmt: skip
    report.row(name, f"loss {ours.loss:.5f}, off by {loss_off:.1e}; whole gradient off by {gradient_off:.1e}")
    if not (loss_off <= limits[0] and gradient_off <= limits[1]):
        report.tell(failures=[f"{name}: loss off by {loss_off:.1e} and gradient by {gradient_off:.1e}, at most {limits} allowed"])


if __name__ == "__main__":
    run_part("step", check)
