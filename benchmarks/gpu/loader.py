"""How many samples a second the trainer's own loader feeds on all cores: read, checked, masked, packed, pinned."""

import os
import time
from pathlib import Path

from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.trainer import write_data
from megainter.config.settings import DataConfig, PretrainingConfig, RunConfig
from megainter.data.stream.loader import make_loader
from megainter.tasks.pretraining.training import open_job
from megainter.training import engine

RECORDS, BATCH, PORTION = 800, 1024, 512
MEASURED = 12  # steps for each process, of which each makes two ahead


def check(setting: Setting, report: Report) -> None:
    """Drawn images of 10 to 100 regions, from the system's cache, five captions each; by the number of loader processes."""
    folder, cores = setting.work("loader"), len(os.sched_getaffinity(0))
    write_data(folder, 12 if setting.toy else RECORDS)
    workers = [1] if setting.toy else sorted({1, 4, cores // 2, cores} - {0})
    with engine.distributed() as world:
        job = open_job(_config(folder, setting.toy), world)
        for count in workers:
            speed = feed_rate(job.batches, count, job.samples, 8 if setting.toy else BATCH)
            report.tell(**{f"{count} processes, samples/s": speed})
            report.row(f"{count} loader process(es)", f"{speed:,.0f} samples/s, {speed / count:,.0f} for each process")


def _config(folder: Path, toy: bool) -> RunConfig:
    samples, portion = (8, 4) if toy else (BATCH, PORTION)
    return RunConfig(
        output=_made(folder / "run"),
        data=DataConfig(pairs=folder / "pairs.parquet", store=folder / "regions.store", vocabulary_size=500),
        training=PretrainingConfig(steps=1000, global_batch=samples, micro_batch=portion),
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def feed_rate(batches: object, workers: int, epoch: int, samples: int) -> float:
    """Samples a second that arrive here, by the clock: of steps of so many samples, after an epoch and what is made ahead at the start."""
    first = -(-epoch // samples) + 3 * workers
    steps = first + MEASURED * workers
    with make_loader(batches, 0, steps, workers=workers) as loader:  # type: ignore[arg-type]
        for number, _ in enumerate(loader):
            if number + 1 == first:
                began = time.perf_counter()
        return samples * (steps - first) / (time.perf_counter() - began)


if __name__ == "__main__":
    run_part("loader", check)
