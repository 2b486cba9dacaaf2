"""A step done twice: nothing changes by it, and one bit that differs ends the run and names the rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megainter.training.verify import bits, same
from tests.synthetic import environment


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_bit_that_flips_changes_the_sum_of_bits(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5).to(dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    for bit in range(8 * tensor.element_size() - 1):
        other = tensor.clone()
        other.view(integers)[11, 3] ^= 1 << bit
        assert not torch.equal(bits(other), bits(tensor))
        assert not same(other, tensor)


def test_the_sum_of_bits_does_not_depend_on_the_order_in_memory() -> None:
    tensor = torch.randn(64, 33)
    assert torch.equal(bits(tensor.t()), bits(tensor))
    assert int(bits(tensor)) == sum(tensor.view(torch.int32).flatten().tolist())


def test_what_is_not_a_number_is_the_same_as_itself() -> None:
    tensor = torch.tensor([1.0, float("nan")])
    assert same(tensor, tensor.clone())
    assert not same(tensor, torch.tensor([1.0, 2.0]))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_with_steps_done_twice_is_the_run_without_and_a_wrong_bit_ends_it(
    stage: int, precision: str, processes: int, tmp_path: Path
) -> None:
    module = ["-m", "tests.training.verified_runs", str(tmp_path), precision, str(stage)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    command = [sys.executable, *launcher, *module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["twice"] == found["once"]
    assert len(found["once"]) == 6
    last = processes - 1
    assert found["wrong"].startswith(f"step 4 was done twice and came out differently (training.verify_every): rank {last} (")
    assert "1 of " in found["wrong"]
    assert "first that of model.msm_head.decoder.bias" in found["wrong"]
    assert found["saved"] == []
