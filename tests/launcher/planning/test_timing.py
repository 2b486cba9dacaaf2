"""The plan's step times: against shares of the peak that others report, launches that were counted, and a run that was timed."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from launcher.planning.calibration import STAGES, TEXT_SHARE, calibrated
from launcher.planning.device_memory import Layout, flops_per_step, memory
from launcher.planning.layouts import Choice, Corpus, choices, recommended
from launcher.planning.shape import largest_load, load_of, parameters, shape_of
from launcher.planning.timing import Cluster, Device, communication_bytes, device, efficiency, launches, step_time
from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.data.stream.portions import accumulation
from megainter.errors import UsageError
from tests.synthetic import environment

TOKENS = 43.7  # of a sample in the benchmarks


def recipe(name: str, *settings: str) -> RunConfig:
    """A shipped recipe."""
    return load_config(Path(name), settings)


def share_of_peak(name: str, gpu: str, tokens: float) -> float:
    """Operations of a whole step over its planned time, as a share of the GPU's peak in bf16."""
    config, found = recipe(name), device(gpu)
    shape, layout = shape_of(config), Layout(0, 1)
    load = load_of(config, tokens / TOKENS, TOKENS * TEXT_SHARE, TOKENS * (1 - TEXT_SHARE))
    return flops_per_step(shape, load, layout) / step_time(shape, load, layout, Cluster(found)).total / found.flops["bf16"]


@pytest.mark.parametrize(
    ("name", "gpu", "reported"),
    [("base", "a100-80g", 0.426), ("base", "h100", 0.375), ("large", "a100-80g", 0.465)],
    ids=["MPT-125M", "modded-nanogpt", "BERT-large of DeepLearningExamples and MLPerf"],
)
def test_whole_steps_reach_the_shares_that_others_report(name: str, gpu: str, reported: float) -> None:
    """Models of these widths, 35 to 49 % of the peak with 16,000 to 65,000 tokens a micro-batch; within a tenth at their size."""
    assert share_of_peak(name, gpu, 32_000) == pytest.approx(reported, rel=0.1)
    for tokens in (16_000, 65_000):
        assert 0.3 < share_of_peak(name, gpu, tokens) < 0.5


def test_products_reach_more_with_more_tokens_and_with_width() -> None:
    found = device("h100")
    narrow, wide = shape_of(recipe("base")), shape_of(recipe("large"))
    loads = [load_of(recipe("base"), samples, 15, 29) for samples in (8, 64, 512, 4096)]
    base, large = ([efficiency(shape, load, found) for load in loads] for shape in (narrow, wide))
    assert base == sorted(set(base))
    assert all(more > less for more, less in zip(large, base, strict=True))
    assert max(large) < found.products
    fixed = step_time(narrow, loads[0], Layout(0, 1), Cluster(found, efficiency=0.4))
    assert fixed.efficiency == 0.4
    assert fixed.matmul == pytest.approx(flops_per_step(narrow, loads[0], Layout(0, 1)) / 0.4 / 989e12)


def test_a_small_micro_batch_waits_for_its_host() -> None:
    """2,165 launches of a base step at stage 0 were counted over a stand-in for the driver; at 64 samples they are what takes time."""
    shape, found = shape_of(recipe("base")), device("h100")
    assert launches(shape, Layout(0, 1)) == pytest.approx(2165, rel=0.01)
    assert launches(shape, Layout(2, 1)) > launches(shape, Layout(1, 1)) >= launches(shape, Layout(0, 1))
    assert launches(shape, Layout(0, 1, accumulation=4)) == 4 * launches(shape, Layout(0, 1))
    few, many = (step_time(shape, load_of(recipe("base"), n, 15, 29), Layout(0, 1), Cluster(found)) for n in (64, 1024))
    assert few.total == pytest.approx(2165 * found.launch, rel=0.01)
    assert few.idle > few.matmul
    assert many.idle == 0


def test_an_update_on_the_host_is_never_free() -> None:
    """Where launches are what takes time too: a host that updates launches nothing. By hand, for each parameter of the rank's share."""
    shape, cluster = shape_of(recipe("base")), Cluster(device("h100"))
    for samples in (8, 1024):
        load = load_of(recipe("base"), samples, 15, 29)
        here, there = (step_time(shape, load, Layout(2, 8, offload=offload), cluster) for offload in (False, True))
        assert there.optimizer == pytest.approx(parameters(shape) / 8 * (6 / 25e9 + 28 / 50e9))
        assert there.total >= here.total + there.optimizer - here.optimizer
        assert there.total > here.total
        faster = dataclasses.replace(cluster, host_memory=100e9, host_link=50e9)
        assert step_time(shape, load, Layout(2, 8, offload=True), faster).optimizer == pytest.approx(there.optimizer / 2)


def written(folder: Path, truth: Device, sizes: tuple[int, ...], memory_factor: float = 1.0) -> Path:
    """A results.jsonl as benchmarks.gpu leaves it, of a device that is as ``truth`` says."""
    config = recipe("base")
    shape, figures = shape_of(config), {}
    for samples in sizes:
        load = load_of(config, samples, TOKENS * TEXT_SHARE, TOKENS * (1 - TEXT_SHARE))
        layouts = {name: Layout(stage, 1) for name, stage in STAGES.items()}
        needs = {name: memory(shape, load, layout) for name, layout in layouts.items()}
        figures[f"{samples} samples"] = {
            "date": "2026-12-01", "samples_per_step": samples, "real_tokens_per_step": TOKENS * samples,
            "seconds_per_step": {name: step_time(shape, load, layout, Cluster(truth)).total for name, layout in layouts.items()}
            | {"bert-bf16": 9.0},
            "peak_mib": {name: memory_factor * (need.device - need.overhead) / 2**20 for name, need in needs.items()},
        }  # fmt: skip
    lines = [{"part": "environment", "figures": {}}, {"part": "throughput", "figures": figures | {"rows": []}}]
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("products", "half_tokens", "launch"), [(0.6, 5000, 6e-6), (0.3, 800, 2.5e-5)])
def test_a_timed_run_becomes_a_measured_row(products: float, half_tokens: float, launch: float, tmp_path: Path) -> None:
    """The plan is within 1 % of what was timed, at those micro-batches, and within 2 % between them."""
    known = device("h100")
    truth = dataclasses.replace(known, products=products, half_tokens=half_tokens, launch=launch)
    results = written(tmp_path, truth, (64, 256, 512, 1024, 2048), memory_factor=1.25)
    found = calibrated(results, known)
    assert found.measured == "2026-12-01"
    assert found.off == (pytest.approx(0, abs=0.01), pytest.approx(0.2, abs=1e-6))
    shape = shape_of(recipe("base"))
    for samples in (128, 700, 1500):
        load = load_of(recipe("base"), samples, 15, 29)
        planned, true = (step_time(shape, load, Layout(1, 1), Cluster(each)).total for each in (found, truth))
        assert planned == pytest.approx(true, rel=0.02)


def test_the_measured_row_is_read_back_and_told_with_its_date(tmp_path: Path) -> None:
    known = device("h100")
    results = written(tmp_path, dataclasses.replace(known, products=0.5, launch=2e-5), (64, 256, 1024), memory_factor=1.25)
    found = calibrated(results, known)
    printed = said(["-m", "launcher.planning.calibration", str(results), "h100"])
    (tmp_path / "mine.toml").write_text(printed)
    again = device(str(tmp_path / "mine.toml"))
    assert (again.flops, again.hbm, again.memory) == (known.flops, known.hbm, known.memory)
    assert (again.products, again.launch) == (pytest.approx(found.products, rel=0.01), pytest.approx(found.launch, rel=0.01))
    told = said(["-m", "megainter", "plan", "--config", "base", "--gpus", "8", "--gpu", str(tmp_path / "mine.toml")])
    assert "measured on 2026-12-01: the plan was within " in told
    assert "20% of the memory; precision bf16" in told
    assert "estimated, never measured on this GPU" in said(["-m", "megainter", "plan", "--config", "base", "--gpus", "8", "--gpu", "h100"])


def said(words: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_too_few_sizes_calibrate_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at 3 micro-batches on a GPU"):
        calibrated(written(tmp_path, device("h100"), (4,)), device("h100"))
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"broken\.jsonl cannot be read"):
        calibrated(tmp_path / "broken.jsonl", device("h100"))


def test_an_unknown_device_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.planning.calibration", str(tmp_path / "results.jsonl"), "rtx9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no device 'rtx9'; did you mean rtx5090? known: v100, " in done.stderr


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 1), (1, 1), (2, 3), (3, 2)])
def test_gradients_in_bf16_are_half_of_what_is_sent_for_them(stage: int, accumulation: int) -> None:
    shape = shape_of(recipe("base"))
    layout = Layout(stage, 8, "bf16", accumulation=accumulation)
    whole, half = (communication_bytes(shape, dataclasses.replace(layout, communication=name)) for name in ("fp32", "bf16"))
    sent = {0: 8, 1: 8, 2: 8 * accumulation, 3: 4 * accumulation}[stage] * parameters(shape) * 7 / 8  # of gradients in fp32
    assert whole - half == pytest.approx(sent / 2)


def test_what_is_in_the_way_of_more_devices_is_said() -> None:
    settings = ["-m", "megainter", "plan", "--config", "base", "--gpu", "h100"]
    told = said([*settings, "--gpus", "8"])
    assert "much of a step waits for the host" in told
    recommended, *_, unfilled = told.partition("\n\nassumed")[0].splitlines()[2:]
    assert recommended.endswith("--training.micro_tokens 16384")
    assert "micro_tokens 16,384 is the most" in unfilled
    assert "a device has 64 samples of a step, about 3,392 tokens: a larger training.global_batch would fill it" in unfilled
    assert "engine.communication bf16" in said([*settings, "--gpus", "16", "--network", "1"])


CORPUS = Corpus(10**6, 15, 29)


def by_tokens(tokens: int, ranks: int = 8, batch: int = 16_384) -> list[Choice]:
    """Layouts of the base recipe with so many tokens a micro-batch."""
    config = recipe("base", "--training.micro_tokens", str(tokens), "--training.global_batch", str(batch))
    return choices(config, ranks, Cluster(device("h100")), CORPUS)


def test_a_token_budget_is_planned_as_the_trainer_cuts_it() -> None:
    """As many micro-batches as the trainer takes for lengths drawn at random; those of the plan stand for them."""
    rng = np.random.default_rng(5)
    for tokens in (2_000, 16_384, 65_536):
        config = recipe("base", "--training.micro_tokens", str(tokens), "--training.global_batch", "16384")
        drawn = np.minimum(rng.poisson(15, 16_384), 36) + rng.integers(10, 38, 16_384) + 5
        cuts = accumulation(config.training, 8, lambda step, drawn=drawn: drawn)
        [choice, *_] = by_tokens(tokens)
        assert choice.layout.accumulation == pytest.approx(cuts, rel=0.1, abs=1)
        assert choice.micro_batch == round(16_384 / 8 / choice.layout.accumulation)
        assert choice.micro_batch * (CORPUS.text + CORPUS.regions) <= tokens
        assert choice.settings().endswith(f"--training.micro_tokens {tokens}")


def test_memory_and_time_follow_the_token_budget() -> None:
    """Memory is for a budget of the longest samples, no more than a rank's share; a larger budget is faster until it does not fit."""
    options = [by_tokens(tokens)[0] for tokens in (2_000, 16_384, 65_536)]
    assert [choice.memory.device for choice in options] == sorted(choice.memory.device for choice in options)
    assert [choice.time.total for choice in options] == sorted((choice.time.total for choice in options), reverse=True)
    config = recipe("base", "--training.micro_tokens", "65536", "--training.global_batch", "64")
    assert largest_load(config, 8).samples == 8
    longest = 36 + 36 + 1
    assert largest_load(recipe("base", "--training.micro_tokens", "7300"), 1).samples == pytest.approx(7300 / longest)
    assert not by_tokens(10**7, ranks=1, batch=10**6)[0].fits
    with pytest.raises(UsageError, match=r"10,000,000 tokens a micro-batch needs .* GiB a device; lower training\.micro_tokens, use more"):
        recommended(by_tokens(10**7, ranks=1, batch=10**6))
    assert recommended(by_tokens(16_384, ranks=3)).fits, "a global batch of tokens need not divide"
