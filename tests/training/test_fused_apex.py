"""When apex's optimisers are used, and that the check before their use tells right from wrong."""

import importlib.util
from pathlib import Path

import pytest
import torch

from megainter.config.reading import load_config
from megainter.config.settings import OptimizerConfig
from megainter.errors import UsageError
from megainter.training import fused_apex
from megainter.training.fused_apex import TOLERANCE, Build, disagreement, obstacle
from megainter.training.lamb import Lamb
from tests.synthetic import settings, train, write_data

ADAM, LAMB = OptimizerConfig(), OptimizerConfig(name="lamb")
CPU = torch.device("cpu")


def adamw(**changes: object) -> Build:
    """torch's AdamW, with the defaults of our settings."""
    options = {"betas": (0.9, 0.999), "eps": 1e-6} | changes
    return lambda groups, rate: torch.optim.AdamW(groups, lr=rate, **options)


def lamb(groups: list, rate: float) -> Lamb:
    """Ours."""
    return Lamb(groups, rate, (0.9, 0.999), 1e-6)


class ForgetsSteps(torch.optim.AdamW):
    """Counts steps in its group from 1, and not in the state: where nobody sets the count, a resumed run begins again at 1."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            group["counted"] = group.get("counted", 0) + 1
            for parameter in group["params"]:
                self.state[parameter]["step"] = torch.tensor(float(group["counted"] - 1))
        super().step()


class MissesTheLastElement(torch.optim.AdamW):
    """Is right but for the last element of the longest tensor, as a kernel that misses the end of a block."""

    def step(self, closure: object = None) -> None:
        long = self.param_groups[0]["params"][1]
        last = long.detach()[-1].clone()
        super().step()
        long.data[-1] = last


class GivesNoNumber(torch.optim.AdamW):
    """Is right but for the last tensor."""

    def step(self, closure: object = None) -> None:
        super().step()
        self.param_groups[-1]["params"][-1].data.fill_(float("nan"))


@pytest.mark.parametrize("corrected", [True, False])
def test_the_check_takes_what_is_right(corrected: bool) -> None:
    assert disagreement(adamw(), OptimizerConfig(bias_correction=corrected), CPU) < TOLERANCE / 10
    assert disagreement(lamb, OptimizerConfig(name="lamb", bias_correction=corrected), CPU) < TOLERANCE / 10


@pytest.mark.parametrize(
    ("build", "chosen"),
    [
        (adamw(betas=(0.9, 0.99)), ADAM),
        (adamw(eps=1e-3), ADAM),
        (lamb, ADAM),
        (adamw(), LAMB),
        (lambda groups, rate: torch.optim.Adam(groups, lr=rate, eps=1e-6), ADAM),
        (lambda groups, rate: ForgetsSteps(groups, lr=rate, eps=1e-6), ADAM),
        (lambda groups, rate: MissesTheLastElement(groups, lr=rate, eps=1e-6), ADAM),
    ],
    ids=["beta2", "epsilon", "LAMB for Adam", "Adam for LAMB", "decay in the gradient", "steps forgotten", "an element missed"],
)
def test_the_check_finds_what_is_wrong(build: Build, chosen: OptimizerConfig) -> None:
    assert disagreement(build, chosen, CPU) > 10 * TOLERANCE


def test_not_a_number_is_no_agreement() -> None:
    """Wherever it is: the largest of several numbers must not pass over it."""
    assert not disagreement(lambda groups, rate: GivesNoNumber(groups, lr=rate, eps=1e-6), ADAM, CPU) <= TOLERANCE


def test_why_apex_cannot_be_used() -> None:
    cuda = torch.device("cuda")
    assert "host's memory" in str(obstacle(ADAM, 1, CPU))
    assert "wrong trust ratios" in str(obstacle(LAMB, 1, cuda))
    assert "stage 3" in str(obstacle(ADAM, 3, cuda))
    if importlib.util.find_spec("apex") is None:
        assert "apex is not installed" in str(obstacle(ADAM, 2, cuda))
        assert "apex is not installed" in str(obstacle(LAMB, 0, cuda))


def test_the_setting_has_three_values() -> None:
    good = ["--output", "run", "--data.pairs", "p.parquet", "--data.store", "s", "--training.steps", "10"]
    assert load_config(None, good).engine.apex == "off"
    with pytest.raises(UsageError, match=r"engine\.apex"):
        load_config(None, [*good, "--engine.apex", "yes"])


def test_on_without_it_is_one_line_and_auto_says_why_not(tmp_path: Path) -> None:
    """The whole command on the CPU, where apex has no place whether installed or not; LAMB is in the start line and learns on."""
    data = write_data(tmp_path)
    chosen = {"optimizer__name": "lamb", "optimizer__weight_decay": 0.01, "training__steps": 2}
    refused = train(settings(*data, tmp_path / "on", engine__apex="on", **chosen))
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert 'engine.apex is "on", but apex needs the optimiser\'s state on a CUDA device' in refused.stderr
    assert "Traceback" not in refused.stderr
    run = train(settings(*data, tmp_path / "auto", engine__apex="auto", **chosen))
    assert run.returncode == 0, run.stdout + run.stderr
    assert "apex FusedLAMB is not used: apex needs the optimiser's state on a CUDA device" in run.stdout
    assert "LAMB, decay 0.01 on matrices" in run.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="apex's kernels need a CUDA device")
@pytest.mark.parametrize("chosen", [ADAM, LAMB, OptimizerConfig(bias_correction=False)], ids=["adam", "lamb", "uncorrected"])
def test_apex_itself_agrees(chosen: OptimizerConfig) -> None:
    if reason := obstacle(chosen, 0, torch.device("cuda")):
        pytest.skip(reason)
    assert disagreement(fused_apex.fused_build(chosen), chosen, torch.device("cuda")) < TOLERANCE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's and our kernels on CUDA need a CUDA device")
def test_ours_agree_on_cuda_too() -> None:
    assert disagreement(lamb, LAMB, torch.device("cuda")) < TOLERANCE
    assert disagreement(adamw(fused=True), ADAM, torch.device("cuda")) < TOLERANCE
