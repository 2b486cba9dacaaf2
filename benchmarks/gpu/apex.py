"""NVIDIA apex's FusedAdam and FusedLAMB against our optimisers: agreement with float64 and milliseconds, from its source."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.part import Report, Setting, Wrong, run_part
from benchmarks.sizes import BASE, TOY
from benchmarks.timing import device_seconds
from megainter.config.settings import OptimizerConfig
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import fused_apex
from megainter.training.optimizer import build_optimizer, parameter_groups, start_state

KERNELS = ("multi_tensor_*.cu", "update_scale_hysteresis.cu")
RATE = 1e-4


def check(setting: Setting, report: Report) -> None:
    """Ours always; apex's where ``--apex`` names its source, of which the extension amp_C alone is built."""
    device = torch.device(setting.device)
    if setting.apex is not None and setting.device == "cuda":
        build(setting.apex, setting.work("apex"))
    for name in ("adamw", "lamb"):
        settings = OptimizerConfig(name=name, learning_rate=RATE)  # type: ignore[arg-type]
        builds: dict[str, fused_apex.Build] = {"ours": lambda groups, rate, settings=settings: ours(groups, rate, settings, device)}  # type: ignore[misc]
        if setting.apex is not None and setting.device == "cuda":
            report.tried(fused_apex.piece(settings), lambda settings=settings, builds=builds: _add_apex(builds, settings, device))
        for way, builder in builds.items():
            report.tried(f"{name}, {way}", lambda name=name, way=way, builder=builder, settings=settings: _measure(
                report, f"{name}, {way}", builder, settings, setting))  # fmt: skip
    if setting.apex is None or setting.device != "cuda":
        report.row("apex", "not compared: it needs a GPU and --apex FOLDER with its source")


def build(source: Path, folder: Path) -> None:
    """Compile ``amp_C`` where the machine has a CUDA compiler, and let both it and apex's Python files be imported."""
    from torch.utils.cpp_extension import CUDA_HOME, load

    if CUDA_HOME is None:
        raise Wrong("apex cannot be built: PyTorch finds no CUDA compiler; set CUDA_HOME to the folder whose bin has nvcc")
    files = [source / "csrc" / "amp_C_frontend.cpp", *(path for pattern in KERNELS for path in sorted((source / "csrc").glob(pattern)))]
    if not files[0].is_file():
        raise Wrong(f"{source} is not NVIDIA apex's source: it has no csrc/amp_C_frontend.cpp")
    load(
        name="amp_C", sources=[str(path) for path in files], extra_include_paths=[str(source / "csrc")], build_directory=str(folder),
        extra_cflags=["-O3"], extra_cuda_cflags=["-O3", "-lineinfo", "--use_fast_math"], verbose=True,
    )  # fmt: skip
    sys.path[:0] = [str(source), str(folder)]


def _add_apex(builds: dict[str, fused_apex.Build], settings: OptimizerConfig, device: torch.device) -> None:
    if (why := fused_apex.obstacle(settings, 0, device)) is not None:
        raise Wrong(why)
    builds[f"apex {fused_apex.piece(settings)}"] = fused_apex.fused_build(settings)


def _measure(report: Report, name: str, builder: fused_apex.Build, settings: OptimizerConfig, setting: Setting) -> None:
    device = torch.device(setting.device)
    error = fused_apex.disagreement(builder, settings, device)
    milliseconds = 1000 * _step_seconds(builder, settings, setting)
    report.tell(**{name: {"error": error, "step_ms": milliseconds}})
    report.row(name, f"{milliseconds:.2f} ms an update of the base model's weights, within {error:.1e} of float64")
    if not error <= fused_apex.TOLERANCE:
        raise Wrong(f"{error:.1e} (relative) from float64, at most {fused_apex.TOLERANCE:g} allowed")


def ours(groups: list[dict[str, Any]], rate: float, settings: OptimizerConfig, device: torch.device) -> torch.optim.Optimizer:
    """Our optimiser for ``settings`` over other groups than it makes by itself."""
    holder = nn.ParameterList([parameter for group in groups for parameter in group["params"]])
    made = build_optimizer(holder, replace(settings, learning_rate=rate), device)
    made.param_groups.clear()
    for group in groups:
        made.add_param_group(group)
    return made


def _step_seconds(builder: fused_apex.Build, settings: OptimizerConfig, setting: Setting) -> float:
    device = torch.device(setting.device)
    model = InterBertForPreTraining(InterBertConfig(**(TOY if setting.toy else BASE))).to(device)  # type: ignore[call-arg]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = builder(parameter_groups(model, settings), RATE)
    start_state(optimizer, [parameter for group in optimizer.param_groups for parameter in group["params"]], settings)
    return device_seconds(optimizer.step, device, *((1, 1) if setting.toy else (20, 5)))


if __name__ == "__main__":
    run_part("apex", check)
