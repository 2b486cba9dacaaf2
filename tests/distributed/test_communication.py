"""How ranks sum their gradients: in fp32 or bf16 at every ZeRO stage, against float64; and through memory that ranks of a host share."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.errors import UsageError
from tests.distributed.communication_worker import CASES
from tests.synthetic import environment

RANKS = 2
BETA1 = 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, trained by two processes."""
    folder = tmp_path_factory.mktemp("communication")
    module = ["--module", "tests.distributed.communication_worker", str(folder)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def of(folder: Path, name: str, kind: str = "") -> dict[str, torch.Tensor]:
    """Tensors of all ranks' shares, by parameter."""
    found: dict[str, torch.Tensor] = {}
    for rank in range(RANKS):
        found |= load_file(folder / f"{name}.{rank}.safetensors")
    return {key.removeprefix(kind): tensor for key, tensor in found.items() if key.startswith(kind)}


@pytest.mark.parametrize(("stage", "precision", "wire"), CASES)
def test_the_mean_gradient_is_float64s_to_the_rounding_that_is_asked_for(stage: int, precision: str, wire: str, folder: Path) -> None:
    """bf16 keeps 8 bits of each rank's gradient and of their sum; it must also be seen, or the setting would do nothing."""
    ranks = [load_file(folder / f"own.{precision}.{rank}.safetensors") for rank in range(RANKS)]
    moments = of(folder, f"{stage}-{precision}-{wire}", "exp_avg/")
    assert moments.keys() == ranks[0].keys()
    errors, sizes = [], []
    for name, moment in moments.items():
        exact = torch.stack([rank[name].double() for rank in ranks]).mean(0)
        errors.append((moment.double() / (1 - BETA1) - exact).flatten())
        sizes.append(torch.stack([rank[name].double().abs() for rank in ranks]).mean(0).flatten())
    error, size = torch.cat(errors).abs(), torch.cat(sizes)
    bound = 2.0**-7 if wire == "bf16" else 1e-5
    assert bool((error <= bound * size + 1e-6 * size.max()).all())
    seen = float(error.norm() / size.norm())
    assert (seen > 1e-4) == (wire == "bf16"), seen


def test_shared_memory_and_sums_made_at_once_change_no_bit(folder: Path) -> None:
    memory, sockets = of(folder, "memory"), of(folder, "sockets")
    assert memory.keys() == sockets.keys()
    assert all(torch.equal(tensor, sockets[name]) for name, tensor in memory.items())


def test_a_deepspeed_file_that_says_otherwise_is_refused(tmp_path: Path) -> None:
    from megainter.training.engine import deepspeed_config

    (tmp_path / "ds.json").write_text('{"communication_data_type": "bf16"}')
    asked, training = EngineConfig(precision="fp32", deepspeed=tmp_path / "ds.json"), TrainingConfig(steps=1, global_batch=2, micro_batch=2)
    with pytest.raises(UsageError, match="communication_data_type bf16"):
        deepspeed_config(asked, OptimizerConfig(), training, 1)
    agreeing = dataclasses.replace(asked, communication="bf16")
    assert deepspeed_config(agreeing, OptimizerConfig(), training, 1)["communication_data_type"] == "bf16"
