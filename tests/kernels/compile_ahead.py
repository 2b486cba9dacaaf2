"""Compile every Triton kernel for one GPU generation, without a GPU, and print its registers, spills and shared memory as JSON.

python tests/kernels/compile_ahead.py 80|90
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megainter.kernels.triton import attention, gelu, layer_norm, losses

SUMS = ("mean_ptr", "scale_ptr", "dweight_ptr", "dbias_ptr", "loss_ptr", "right_ptr")
STARTS = ("query_starts_ptr", "key_starts_ptr")
POINTERS = {"label_ptr": "*i64", "log_sum_ptr": "*fp32"} | dict.fromkeys(STARTS, "*i32") | dict.fromkeys(SUMS, "*fp32")
NUMBERS = {"p": "fp32", "eps": "fp32", "scale": "fp32"}  # the others are i32
HALF_AND_SINGLE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
# Widths of the base model and of one of 4096; the vocabulary's and the regions' logits.
KERNELS: list[tuple[str, Any, dict[str, Any], int]] = [
    *((f"layer norm {way} {width}{' dropout' if drop else ''}", kernel, {"BLOCK": width, "DROP": drop}, layer_norm._warps(width))
      for way, kernel in (("forward", layer_norm._norm_forward), ("backward", layer_norm._norm_backward)) for width in (1024, 4096)
      for drop in (True, False)),
    ("gelu forward", gelu._gelu_forward, {"ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS}, 4),
    ("gelu backward", gelu._gelu_backward, {"ROWS": gelu.ROWS, "COLUMNS": gelu.COLUMNS}, 4),
    ("cross entropy", losses._cross_entropy, {"GRADIENT": True, "BLOCK": losses.BLOCK}, 4),
    ("soft-label KL", losses._soft_label_kl, {"GRADIENT": True, "BLOCK": losses.BLOCK}, 4),
]  # fmt: skip


# Rows of a sequence on average, queries and keys: every block size that `attention.blocks` gives.
AVERAGES = ((40, 40), (20, 20), (10, 10), (2, 40), (2, 20), (20, 40))


def main() -> None:
    """Compile all of them for bf16 and fp32 activations, and attention for fp16 too."""
    capability = int(sys.argv[1])
    found = {
        f"{name} {dtype}": resources(kernel, constants, {"num_warps": warps}, dtype, capability)
        for name, kernel, constants, warps in KERNELS
        for dtype in ("bf16", "fp32")
    }
    for name, kernel, constants, options, dtype in attention_kernels():
        found[name] = resources(kernel, constants, options, dtype, capability)
    print(json.dumps(found, indent=1))


def attention_kernels() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, int], str]]:
    """Attention by heads of the base model (64 wide; its regions' 96), for every block size."""
    ways = (
        ("forward", attention._attention_forward, False),
        ("backward", attention._attention_backward, True),
        ("dq", attention._attention_backward_queries, True),
    )
    seen = set()
    for (way, kernel, backward), (dtype, kind), width, rows in product(ways, HALF_AND_SINGLE.items(), (64, 96), AVERAGES):
        q, k = (torch.empty(10 * count, 1, width, dtype=kind, device="meta") for count in rows)
        constants = attention.blocks(q, k, 10, backward)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        name = f"attention {way} {width} blocks {constants['QUERIES']} {constants['KEYS']}"
        for drop in (True, False):
            full = f"{name}{' dropout' if drop else ''} {dtype}"
            if full not in seen:
                seen.add(full)
                yield full, kernel, constants | {"DROP": drop}, options, dtype


def resources(kernel: Any, constants: dict[str, Any], options: dict[str, int], dtype: str, capability: int) -> dict[str, int]:
    """Registers per thread, bytes of spills, and bytes of shared memory of one compiled kernel."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: POINTERS.get(name, f"*{dtype}") if name.endswith("_ptr") else NUMBERS.get(name, "i32") for name in names}
    aligned = [name for name in names if name.endswith(("_ptr", "_stride"))]  # as they are where the kernel is launched
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
    return {"registers": int(registers[1]), "spill_bytes": sum(map(int, spills)), "shared_bytes": compiled.metadata.shared}


if __name__ == "__main__":
    main()
