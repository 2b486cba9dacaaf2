"""The Triton forms: numbers under the interpreter, and compiled ahead for two GPU generations."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it comes with PyTorch on Linux)")
HERE = Path(__file__).parent


@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_attention.py"])
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_forms_agree_with_float64_under_the_interpreter(file: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-m", which, str(HERE / file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if which == "slow" and done.returncode == 5:
        pytest.skip(f"nothing in {file} is slow")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_forms_compile_ahead_without_spills(capability: int) -> None:
    command = [sys.executable, str(HERE / "compile_ahead.py"), str(capability)]
    done = subprocess.run(command, env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    print(done.stdout)
    assert len(found) >= 12
    assert sum(name.startswith("attention") for name in found) >= 100
    assert {name: numbers["spill_bytes"] for name, numbers in found.items() if numbers["spill_bytes"]} == {}
    assert max(numbers["shared_bytes"] for numbers in found.values()) <= 99 * 1024  # what a program may have on every GPU since 8.0
