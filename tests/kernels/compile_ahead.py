"""Compile every Triton kernel for one GPU generation, without a GPU, and print its registers and spills as JSON.

python tests/kernels/compile_ahead.py 80|90
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megainter.kernels.triton import gelu, layer_norm, losses

SUMS = ("mean_ptr", "scale_ptr", "dweight_ptr", "dbias_ptr", "loss_ptr", "right_ptr")
POINTERS = {"label_ptr": "*i64"} | dict.fromkeys(SUMS, "*fp32")
NUMBERS = {"seed": "i64", "p": "fp32", "eps": "fp32", "rows": "i32", "width": "i32"}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
# Widths of the base model and of one of 4096; the vocabulary's and the regions' logits.
KERNELS: list[tuple[str, Any, dict[str, Any], int]] = [
    *((f"layer norm {way} {width}{' dropout' if drop else ''}", kernel, {"BLOCK": width, "DROP": drop}, layer_norm._warps(width))
      for way, kernel in (("forward", layer_norm._forward), ("backward", layer_norm._backward)) for width in (1024, 4096)
      for drop in (True, False)),
    ("gelu forward", gelu._forward, {"ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS}, 4),
    ("gelu backward", gelu._backward, {"ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS}, 4),
    ("cross entropy", losses._cross_entropy, {"GRADIENT": True, "BLOCK": losses.BLOCK}, 4),
    ("soft-label KL", losses._soft_label_kl, {"GRADIENT": True, "BLOCK": losses.BLOCK}, 4),
]  # fmt: skip


def main() -> None:
    """Compile all of them for bf16 and fp32 activations."""
    capability = int(sys.argv[1])
    found = {
        f"{name} {dtype}": resources(kernel, constants, warps, dtype, capability)
        for name, kernel, constants, warps in KERNELS
        for dtype in ("bf16", "fp32")
    }
    print(json.dumps(found, indent=1))


def resources(kernel: Any, constants: dict[str, Any], warps: int, dtype: str, capability: int) -> dict[str, int]:
    """Registers per thread and bytes of spills of one compiled kernel."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name, f"*{dtype}") if name.endswith("_ptr") else NUMBERS[name] for name in names}
    source = ASTSource(fn=kernel, signature=signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        architecture = "sm_90a" if capability == 90 else f"sm_{capability}"
        command = [str(PTXAS), "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert registers is not None
    assert spills, said
    return {"registers": int(registers[1]), "spill_bytes": sum(map(int, spills))}


if __name__ == "__main__":
    main()
