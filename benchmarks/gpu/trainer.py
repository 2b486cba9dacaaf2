"""The whole trainer on the base model, reading from a store: samples a second, and how long it waits for its data."""

import shutil

from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.trainer import Load, trained, write_data

RECORDS = 400
LOAD = Load(samples=1024, steps=40, workers=8, device="cuda", log_every=10, profiled=0)
TOY_LOAD = Load(samples=4, steps=8, workers=0, profiled=0, toy=True)


def check(setting: Setting, report: Report) -> None:
    """The recipe `base` in one micro-batch a step, at ZeRO stages 0 and 1."""
    folder = setting.work("trainer")
    write_data(folder, 10 if setting.toy else RECORDS)
    for stage in (1,) if setting.toy else (0, 1):
        load = Load(**(vars(TOY_LOAD if setting.toy else LOAD) | {"device": setting.device, "zero_stage": stage}))
        found = report.tried(f"stage {stage}", lambda load=load: trained(folder, load))
        shutil.rmtree(folder / "run", ignore_errors=True)
        if found is not None:
            report.tell(**{f"stage {stage}": found})
            speed = f"{found['samples_per_second']:,.0f} samples/s, {found['tokens_per_second']:,.0f} tokens/s"
            wait = f"{1000 * found['step_seconds']:.1f} ms a step, {found['data_wait_share']:.1%} of it waiting for data"
            report.row(f"stage {stage}, {load.samples:,} samples a step", f"{speed}, {wait}")


if __name__ == "__main__":
    run_part("trainer", check)
