"""Region features: the R-101 detector of Visual Genome and a light one, images a second by precision, agreement, and the whole command."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.extract import CONFIG, agreement, composed, full_precision, ours
from benchmarks.gpu.part import Report, Setting, Wrong, run_part
from benchmarks.timing import seconds_of
from preprocessing.detector.detector import Detector, load_detector, save_weights
from tests.preprocessing.detector.vg_weights import SMALL, drawn_state

LIGHT = Path(__file__).parents[2] / "preprocessing" / "assets" / "demo_detector.safetensors"
BATCH, ROUNDS = 8, 3
COSINE, SAME_BOXES = 0.99, 0.9  # of features of equal proposals at the least; of the plain program's 36 boxes on average
SECONDS = 25.0  # that a whole command is watched for after its first images


@dataclass(frozen=True)
class Way:
    """A precision by name; ``full``: without the TF32 that PyTorch takes for convolutions of fp32 by itself."""

    name: str
    dtype: torch.dtype | None
    full: bool = False


WAYS = (
    Way("full fp32", None, full=True),
    Way("fp32 as PyTorch is by itself", None),
    Way("bf16", torch.bfloat16),
    Way("fp16", torch.float16),
)


def check(setting: Setting, report: Report) -> None:
    """Weights of R-101 are drawn, so boxes mean nothing, but the arithmetic is that of real ones; the light one is the demo's."""
    device = torch.device(setting.device)
    config = SMALL if setting.toy else CONFIG
    state = {name: tensor.to(device) for name, tensor in drawn_state(config).items()}
    images = [composed(number) for number in range(2 if setting.toy else BATCH)]
    for way in WAYS[::2] if setting.toy else WAYS:
        _speed(report, setting, f"R-101, {way.name}", lambda way=way: ours(state, way.dtype, device, config), images, way)
    count = 1 if setting.toy else 4
    half = ours(state, torch.bfloat16, device, config)
    with full_precision():
        _agree(report, "R-101, bf16, the rest in full fp32", agreement(half, state, images[:count]), setting.toy)
    _agree(report, "R-101, bf16, as PyTorch is by itself", agreement(half, state, images[:count]), setting.toy)
    for name in ("fp32", "bf16"):
        light = lambda name=name: load_detector(LIGHT, device, name)  # noqa: E731 - called later, by its precision
        _speed(report, setting, f"light (the demo's), {name}", light, images, WAYS[2])

    folder = setting.work("extraction")
    save_weights(folder / "r101.safetensors", config, state)
    for name, weights in (("light (the demo's)", LIGHT), ("R-101", folder / "r101.safetensors")):
        report.tried(f"megainter extract, {name}", lambda name=name, weights=weights: _command(report, setting, name, weights))


def _agree(report: Report, name: str, found: dict[str, Any], toy: bool) -> None:
    """What `benchmarks.extract` measures against a plain program in full fp32."""
    shares = f"{found['same_boxes_mean']:.1%} of the 36 boxes, {found['equal_proposals']:.1%} of the proposals"
    said = f"lowest cosine {found['lowest_cosine']:.4f}, {shares}"
    report.tell(**{name: found})
    report.row(f"{name}, against a plain fp32 program", said)
    if not toy and not (found["lowest_cosine"] >= COSINE and found["same_boxes_mean"] >= SAME_BOXES):
        report.tell(failures=[f"{name}: {said}; at least {COSINE} and {SAME_BOXES:.0%} are asked for"])


def _speed(report: Report, setting: Setting, name: str, build: Callable[[], Detector], images: list[Image.Image], way: Way) -> None:
    """Images a second of a batch, decoding and disk left out: the network alone, and with resizing and the choice of regions."""
    device = torch.device(setting.device)
    detector = build()
    with torch.inference_mode(), full_precision() if way.full else nullcontext():
        inputs = detector.inputs(images)
        rounds = 1 if setting.toy else ROUNDS
        network = _rate(lambda: detector.forward(inputs), device, rounds, len(images))
        whole = _rate(lambda: detector.extract_batch(images, 36, 36), device, rounds, len(images))
    report.tell(**{name: {"network_images_per_second": network, "images_per_second": whole}})
    report.row(name, f"{whole:.1f} images/s with the choice of regions, {network:.1f} of the network alone")


def _rate(action: Callable[[], object], device: torch.device, rounds: int, images: int) -> float:
    action()
    return images / min(seconds_of(action, device) for _ in range(rounds))


def _command(report: Report, setting: Setting, name: str, weights: Path) -> None:
    """`megainter extract` with decoding and writing, as many workers as it takes by itself, once they are all at work."""
    folder = setting.work(f"extraction/{weights.stem}")
    _photos(folder / "images", 4 if setting.toy else 6000)
    words = [
        "extract",
        "--images",
        folder / "images",
        "--output",
        folder / "regions.store",
        "--weights",
        weights,
        "--device",
        setting.device,
    ]
    words += ["--precision", "bf16", "--min-boxes", 36, "--max-boxes", 36, *(["--workers", 1] if setting.toy else [])]
    command = [sys.executable, "-m", "megainter", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts = list(_watched(process))
    code = process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    if code not in (0, 75) or not counts:
        raise Wrong(f"ended with exit code {code}; its last lines are in the log")
    (first, begin), (last, end) = counts[0], counts[-1]
    if len(counts) > 1 and last > first:
        report.row(f"megainter extract, {name}", f"{(last - first) / (end - begin):.1f} images/s, decoding and writing included")
    else:
        report.row(f"megainter extract, {name}", f"{last} images; ended too early for a rate without its start")


def _watched(process: subprocess.Popen[str]) -> Iterator[tuple[int, float]]:
    """How many images were done when, by the command's own lines; it is asked to stop when it has been watched long enough."""
    begin, asked = None, False
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        words = line.removeprefix("extract: ").split("/")
        if line.startswith("extract: ") and words[0].replace(",", "").isdigit():
            now = time.monotonic()
            begin = begin or now
            yield int(words[0].replace(",", "")), now
            if now - begin > SECONDS and not asked:
                process.send_signal(signal.SIGTERM)
                asked = True


def _photos(folder: Path, count: int) -> None:
    """So many JPEG files, eight different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(min(count, 8)):
        composed(number).save(folder / f"{number:05}.jpg", quality=90)
    for number in range(8, count):
        shutil.copyfile(folder / f"{number % 8:05}.jpg", folder / f"{number:05}.jpg")


if __name__ == "__main__":
    run_part("extraction", check)
