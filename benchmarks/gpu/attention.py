"""Every form of attention on the device against float64: values, gradients, and what dropout does."""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.against import LIMITS, Errors, relative_error
from benchmarks.gpu.attention_forms import Form, P, forms, some_lengths
from benchmarks.gpu.part import Report, Setting, run_part, told
from megainter.kernels.attention import QueryRows, SequenceLayout, attention_choice

DEVIATIONS, VARIANCE_OFF = 6.0, 0.05  # allowed: of the mean over draws in standard deviations, of the variance as a share
FP32_SLOPE = 2e-2  # by finite differences in float32


@dataclass(frozen=True)
class Case:
    """Sequences of one kind of layer: heads and their width as in the base model; ``some``: every third row asks, as in last layers."""

    kind: str
    samples: int
    heads: int
    width: int
    some: bool


CASES = (
    Case("joint", 64, 12, 64, False),
    Case("text", 64, 12, 64, True),
    Case("region", 64, 8, 96, False),
    Case("region", 64, 8, 96, True),
    Case("joint", 16, 16, 128, False),
    Case("joint", 1, 12, 64, False),
)
TOY_CASES = (Case("text", 2, 2, 16, True), Case("text", 1, 1, 24, False))


@dataclass(frozen=True)
class Problem:
    """Inputs on the device: ``q`` [M, h, d] of the rows that ask, ``k`` and ``v`` [N, h, d]."""

    q: Tensor
    k: Tensor
    v: Tensor
    layout: SequenceLayout
    asking: SequenceLayout | QueryRows

    @classmethod
    def drawn(cls, case: Case, device: torch.device, dtype: torch.dtype) -> "Problem":
        """Normally distributed numbers for a case."""
        layout = SequenceLayout.of(some_lengths(case.samples, case.kind), device)
        rows = len(layout.sequence)
        asking = QueryRows.of(torch.arange(0, rows, 3, device=device), layout) if case.some else layout
        asked = len(asking.sequence)
        q, k, v = (torch.randn(count, case.heads, case.width, device=device).to(dtype) for count in (asked, rows, rows))
        return cls(q, k, v, layout, asking)

    def attend(self, form: Form, drop: float = 0.0, q: Tensor | None = None) -> Tensor:
        """What ``form`` makes of it, its probabilities dropped with ``drop``."""
        return form.attend(self.q if q is None else q, self.k, self.v, self.layout, self.asking, drop)

    def probabilities(self) -> Tensor:
        """float64 [M, h, N] without dropout, by the definition: no row sees another sequence."""
        scores = torch.einsum("mhd,nhd->mhn", self.q.double(), self.k.double()) * self.q.shape[-1] ** -0.5
        strangers = self.asking.sequence[:, None] != self.layout.sequence
        return scores.masked_fill(strangers[:, None, :], -torch.inf).softmax(-1)


def check(setting: Setting, report: Report) -> None:
    """Forms that the model can take must be right; others are tried for comparison, and what is wrong with them is only said."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(setting.device)
    for drop in (0.0, P):
        choice = attention_choice(device, torch.bfloat16, drop)
        report.row(f"bfloat16 with dropout {drop:g} takes", f"{choice.form} ({choice.why})")
    for form in forms(device):
        errors = Errors()
        try:
            _values(errors, form, device, setting.toy)
            if form.drops:
                _dropout(errors, form, device, setting.toy)
        except Exception as error:
            errors.beyond.append(f"{form.name}: {told(error)}")
        report.tell(**{form.name: errors.worst})
        report.row(form.name, _told(errors) if form.ours or not errors.beyond else f"NOT RIGHT HERE, and not taken: {errors.beyond[0]}")
        if errors.beyond and form.ours:
            report.tell(failures=[f"{form.name}: {one}" for one in errors.beyond[:4]])


def _told(errors: Errors) -> str:
    """The largest error in each dtype, and what dropout does."""
    kinds = dict.fromkeys(name.split()[0] for name in errors.worst if not name.startswith("dropout"))
    said = [f"{kind} {max(error for name, error in errors.worst.items() if name.startswith(kind)):.1e}" for kind in kinds]
    if "dropout mean, deviations" in errors.worst:
        said.append(f"dropout's mean off by {errors.worst['dropout mean, deviations']:.1f} standard deviations")
        said.append(f"its variance by {errors.worst['dropout variance off']:.1%}")
    return ", ".join(said)


def _values(errors: Errors, form: Form, device: torch.device, toy: bool) -> None:
    """Without dropout, values and gradients in each dtype, over all cases."""
    for dtype in form.dtypes:
        for case in TOY_CASES if toy else CASES:
            problem = Problem.drawn(case, device, dtype)
            leaves = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
            out = problem.attend(form)
            direction = torch.randn(out.shape, device=device, dtype=torch.float64)
            ours = torch.autograd.grad((out.double() * direction).sum(), leaves)
            exact = [x.detach().double().requires_grad_() for x in leaves]
            right = torch.einsum("mhn,nhd->mhd", Problem(*exact, problem.layout, problem.asking).probabilities(), exact[2])
            wanted = torch.autograd.grad((right * direction).sum(), exact)
            limit = 2 * LIMITS[dtype]  # two products, one after the other
            for name, a, b in zip(("value", "dq", "dk", "dv"), (out, *ours), (right, *wanted), strict=True):
                errors.add(f"{str(dtype).removeprefix('torch.')} {name}", relative_error(a, b), limit, f"{case}")


def _dropout(errors: Errors, form: Form, device: torch.device, toy: bool) -> None:
    """Mean and variance over draws are those of dropped probabilities, a seed repeats its draw, and the gradient has the value's mask."""
    dtype = torch.float32 if torch.float32 in form.dtypes else form.dtypes[0]
    problem = Problem.drawn((TOY_CASES if toy else CASES)[0], device, dtype)
    draws = 40 if toy else 400
    total = square = torch.zeros((), device=device, dtype=torch.float64)
    with torch.no_grad():
        for seed in range(draws):
            torch.manual_seed(seed)
            out = problem.attend(form, P).double()
            total, square = total + out, square + out.square()
        probabilities = problem.probabilities()
        mean = torch.einsum("mhn,nhd->mhd", probabilities, problem.v.double())
        variance = torch.einsum("mhn,nhd->mhd", probabilities.square(), problem.v.double().square()) * P / (1 - P)
        average = total / draws
        off = (average - mean).sum() / (_variance_of_sum(probabilities, problem.v) * P / (1 - P) / draws).sqrt()
        spread = (square / draws - average.square()).sum() * draws / (draws - 1) / variance.sum()
    errors.add("dropout mean, deviations", abs(float(off)), DEVIATIONS)
    squares = ((average - mean).square() / (variance / draws)).mean()
    errors.add("dropout mean, squared deviations off", abs(float(squares) - 1), VARIANCE_OFF if not toy else 0.5)
    errors.add("dropout variance off", abs(float(spread) - 1), VARIANCE_OFF if not toy else 0.5)

    first, again, other = (_seeded(problem, form, seed) for seed in (1, 1, 2))
    errors.add("dropout repeated, difference", float((first - again).abs().max()), 0.0)
    if torch.equal(first, other):
        errors.beyond.append("two seeds drop the same")
    _same_mask(errors, problem, form, LIMITS[dtype])


def _variance_of_sum(probabilities: Tensor, v: Tensor) -> Tensor:
    """Variance of the sum over all of the outcome, but for p / (1 - p): every probability is dropped by itself, with a whole row of v."""
    return torch.einsum("mhn,nh->mhn", probabilities, v.double().sum(-1)).square().sum()


def _seeded(problem: Problem, form: Form, seed: int, q: Tensor | None = None) -> Tensor:
    torch.manual_seed(seed)
    return problem.attend(form, P, q)


def _same_mask(errors: Errors, problem: Problem, form: Form, limit: float) -> None:
    """The outcome is linear in v, so <dv, v> is <direction, outcome> to rounding; dq is the slope by finite differences, in float32."""
    q, v = problem.q.detach().requires_grad_(), problem.v.detach().requires_grad_()
    out = _seeded(Problem(q, problem.k, v, problem.layout, problem.asking), form, 5)
    direction = torch.randn_like(out)
    dq, dv = torch.autograd.grad(out, (q, v), direction)
    with torch.no_grad():
        through_v, straight = (dv.double() * v.double()).sum(), (direction.double() * out.double()).sum()
        size = (direction.double() * out.double()).square().sum().sqrt()
        errors.add("dropout mask of dv", float((through_v - straight).abs() / size), 20 * limit)
        if q.dtype == torch.float32:
            way, step = torch.randn_like(q), 1e-2
            ahead, behind = (_seeded(problem, form, 5, q + sign * step * way).double() for sign in (1, -1))
            by_steps = ((ahead - behind) * direction.double()).sum() / (2 * step)
            error = (by_steps - (dq.double() * way.double()).sum()).abs() / (dq.double() * way.double()).square().sum().sqrt()
            errors.add("dropout slope of dq", float(error), FP32_SLOPE)


if __name__ == "__main__":
    run_part("attention", check)
