"""Which precision "auto" stands for: the one rule of training, extraction, evaluation and plan.

bf16 where every device of the work computes it, else fp16 where every one is a GPU, else fp32. No torch here, so that the launcher can
ask too: what a device computes comes as a value, from the text of /proc/cpuinfo or a GPU's compute capability.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megainter.errors import UsageError

Precision = Literal["fp32", "bf16", "fp16"]
AskedPrecision = Literal["auto", "fp32", "bf16", "fp16"]

PREFERRED: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
BF16_CAPABILITY = (8, 0)  # Ampere: CUDA C++ Programming Guide, table of arithmetic by compute capability

# Words of /proc/cpuinfo (x86 "flags", ARM "Features"; Linux arch/x86/include/asm/cpufeatures.h, arch/arm64/kernel/cpuinfo.c) that say that
# the CPU multiplies bf16 itself, as oneDNN and ARM's libraries then do. AVX-512 alone converts back and forth and is slower than fp32.
BF16_WORDS = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16", "bf16": "ARM's bf16"}


@dataclass(frozen=True)
class Units:
    """What one device computes with units of its own, and its name for the log."""

    name: str
    computes: frozenset[Precision]


def cpu_units(cpuinfo: str) -> Units:
    """Of a CPU by the text of /proc/cpuinfo. What only some of its cores have does not count; "" (no such file) has no bf16."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    cores = [set(words.split()) for name, _, words in lines if name.strip() in ("flags", "Features")]
    shared = set.intersection(*cores) if cores else set()
    found = [said for word, said in BF16_WORDS.items() if word in shared]
    if not found:
        return Units("a CPU without bf16 units", frozenset({"fp32"}))
    return Units(f"a CPU with {' and '.join(found)}", frozenset({"fp32", "bf16"}))


def cuda_units(name: str, capability: tuple[int, int]) -> Units:
    """Of a GPU by its compute capability."""
    told = f"{name} (compute capability {capability[0]}.{capability[1]})"
    return Units(told, frozenset({"fp32", "fp16", "bf16"} if capability >= BF16_CAPABILITY else {"fp32", "fp16"}))


def common(units: Sequence[Units]) -> frozenset[Precision]:
    """What all of these devices compute."""
    return frozenset.intersection(*(each.computes for each in units))


def automatic(units: Sequence[Units], without: Collection[Precision] = (), begun: Precision | None = None) -> tuple[Precision, str]:
    """What "auto" stands for on these devices, and a line that says why.

    ``without``: what the work cannot be done in. ``begun``: what earlier work was done in that is gone on with here; it stays where all
    devices compute it.
    """
    possible = common(units) - set(without)
    kinds = list(dict.fromkeys(each.name for each in units))
    where = f"on {kinds[0]}" if len(kinds) == 1 else f"the best that all of these compute: {'; '.join(sorted(kinds))}"
    best = next(precision for precision in PREFERRED if precision in possible or precision == "fp32")
    if begun is None or begun == best:
        return best, f"precision {best} (auto), {where}"
    if begun in possible:
        return begun, f"precision {begun} (auto), as this was begun in; {best} would be taken {where}"
    return best, f"precision {best} (auto), {where}; this was begun in {begun}, which is not computed here"


def automatic_in_training(
    units: Sequence[Units], zero_stage: int, deepspeed: Path | None = None, begun: Precision | None = None
) -> tuple[Precision, str]:
    """As ``automatic``, for ``engine.precision``: no fp16 at ZeRO stage 0, where DeepSpeed does not scale the loss.

    A precision that the JSON ``deepspeed`` enables has been asked for; one that it switches off is not taken.
    """
    from megainter.deepspeed_json import enables, read_deepspeed_json  # here: help reads this module for its options

    given = read_deepspeed_json(deepspeed) if deepspeed is not None else {}
    half: tuple[Precision, ...] = ("bf16", "fp16")
    for precision in half:
        if enables(given, precision) is True:
            if precision == "fp16" and zero_stage == 0:
                raise UsageError(f"{deepspeed} enables fp16, which needs engine.zero_stage 1, 2 or 3")
            return precision, f"precision {precision} (auto), which {deepspeed} enables"
    without = {precision for precision in half if enables(given, precision) is False}
    scaled = automatic(units, without, begun)
    chosen = automatic(units, without | {"fp16"}, begun) if zero_stage == 0 else scaled
    return chosen if chosen[0] == scaled[0] else (chosen[0], f"{chosen[1]}; fp16 needs engine.zero_stage 1, 2 or 3")
