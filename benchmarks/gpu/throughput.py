"""Training steps of the base model, ours against the released computation and BERT, on the same samples in turn, by micro-batch."""

from dataclasses import fields
from typing import Any

from benchmarks.against_peers import tables
from benchmarks.batches import make_batch
from benchmarks.contenders import Way
from benchmarks.gpu.part import Report, Setting, run_part
from launcher.planning.device_memory import Layout, memory
from launcher.planning.shape import Load, Shape

SIZES = (64, 256, 1024, 2048)
NAMES = ("ours-bf16-zero0", "ours-bf16", "ours-bf16-compiled", "bert-bf16", "bert-bf16-compiled", "released-fp32", "released-tf32")
TOY_NAMES = ("ours-bf16", "bert-bf16")
ROUNDS, STEPS = 2, 6


def check(setting: Setting, report: Report) -> None:
    """Samples/s, tokens/s, share of the measured product rate and peak memory beside `megainter plan`'s; who runs out of memory is said."""
    way = Way(setting.device, toy=setting.toy)
    names, sizes = (TOY_NAMES, (4,)) if setting.toy else (NAMES, SIZES)
    best: dict[str, float] = {}
    lost: dict[str, str] = {}
    for table in tables(names, sizes, 1 if setting.toy else ROUNDS, 1 if setting.toy else STEPS, way):
        samples = table["samples_per_step"]
        report.tell(**{f"{samples} samples": table})
        load = load_of_batch(samples)
        for name, speed in table["samples_per_second"].items():
            best[name] = max(best.get(name, 0.0), speed)
            predicted = predicted_mib(load, way, name) if name.startswith("ours") else None
            report.row(f"{samples:,} samples, {name}", _told(table, name, predicted))
        for name in table["lost"].keys() - lost.keys():
            report.row(f"{samples:,} samples, {name}", table["lost"][name])
        lost |= table["lost"]
    _compare(report, best)
    broken = {name: why for name, why in lost.items() if not why.startswith("out of memory")}
    if broken:
        report.tell(failures=list(broken.values()))


def _told(table: dict[str, Any], name: str, predicted: float | None) -> str:
    said = [f"{table['samples_per_second'][name]:,.0f} samples/s", f"{table['real_tokens_per_second'][name]:,.0f} tokens/s",
            f"{1000 * table['seconds_per_step'][name]:,.1f} ms"]  # fmt: skip
    if name in table["share_of_product_rate"]:
        said.append(f"{table['share_of_product_rate'][name]:.1%} of the product rate")
    said.append(f"{table['peak_mib'][name]:,.0f} MiB" + (f" (plan: {predicted:,.0f})" if predicted is not None else ""))
    return ", ".join(said)


def load_of_batch(samples: int) -> Load:
    """As many tokens and masked places a sample as the batches have."""
    batch = make_batch(samples, 0)
    text, regions = len(batch.inputs.input_ids), len(batch.inputs.region_features)
    return Load(samples, text / samples, regions / samples, len(batch.msm_positions) / samples, len(batch.mrm_positions) / samples)


def predicted_mib(load: Load, way: Way, name: str) -> float:
    """What `megainter plan` expects of PyTorch's tensors."""
    stage = 0 if name.endswith("zero0") else way.zero_stage
    found = memory(shape_of_model(way), load, Layout(stage, 1, "bf16"), cpu=way.device == "cpu")
    return (found.device - found.overhead) / 2**20


def shape_of_model(way: Way) -> Shape:
    """The contenders' model as the plan counts it."""
    config = way.config()
    same = {field.name: getattr(config, field.name) for field in fields(Shape) if hasattr(config, field.name)}
    return Shape(targets=config.num_region_classes, **same)


def _compare(report: Report, best: dict[str, float]) -> None:
    ours = max((name for name in best if name.startswith("ours")), key=lambda name: best[name], default=None)
    for name in (name for name in best if ours is not None and not name.startswith("ours")):
        assert ours is not None
        report.row(f"{ours} against {name}", f"{best[ours] / best[name]:.2f} times as many samples/s, each at its best micro-batch")
    if {"ours-bf16", "ours-bf16-compiled"} <= best.keys():
        report.row("compiled layers", f"{best['ours-bf16-compiled'] / best['ours-bf16']:.2f} times the speed of those that are not")


if __name__ == "__main__":
    run_part("throughput", check)
