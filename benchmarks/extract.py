"""``python -m benchmarks.extract``: the Visual Genome detector on 600 x 800 images, ours against a plain fp32 program, A B A B, medians.

Weights are drawn (no public ones are shipped), so boxes mean nothing, but the arithmetic is that of the real ones. Prints seconds on one
image, the agreement of features and of the 36 chosen boxes on each of several (``--photos`` takes them from a folder, otherwise they are
composed), a breakdown by stage with each one's share of what the matrix products could reach, and the peak memory of ours, measured in
a process of its own (``--memory``). ``--agreement`` prints the agreement alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import plain_detector
from benchmarks.timing import CPU, machine, peak_mib, product_rate, seconds_of
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.writer import FeatureStoreWriter
from preprocessing.detector.detector import Detector, _record
from preprocessing.detector.selection import select_caffe
from preprocessing.detector.visual_genome import VgConfig, build_vg_network
from preprocessing.detector.visual_genome_regions import REGIONS_AT_ONCE, VgDetection, best_proposals, shifted_anchors
from preprocessing.images.decode import load_image
from tests.preprocessing.detector.vg_weights import FULL, drawn_state

CONFIG = replace(FULL, proposals=300)
# 10^9 operations (a multiply and an add are two) at 600 x 800, of the real network: backbone, region proposals, one region in res5.
BACKBONE_GFLOP, RPN_GFLOP, REGION_GFLOP = 132.0, 18.0, 5.86


def main() -> None:
    """Measure and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--memory", action="store_true")
    options.add_argument("--agreement", action="store_true")
    options.add_argument("--photos", type=Path)
    options.add_argument("--count", type=int, default=12, help="images on which the agreement is measured")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    given = options.parse_args()
    device = torch.device(given.device)
    state = {name: tensor.to(device) for name, tensor in drawn_state(CONFIG).items()}
    if given.memory:
        # the weights stand in memory twice here, as drawn and as loaded: a worker that reads a file frees the first
        ours(state, torch.bfloat16, device).extract(composed(0), 36, 36)
        print(json.dumps({"peak_mib": peak_mib(device)}))
        return
    half, images = ours(state, torch.bfloat16, device), pictures(given.photos, given.count)
    if given.agreement:
        print(json.dumps({"agreement": agreement(half, state, images)}, indent=2))
        return
    full, image = ours(state, None, device), images[0]
    pixels = half.inputs([image])[0].pixels
    programs: dict[str, Callable[[], Any]] = {
        "plain-fp32": lambda: plain(state, pixels),
        "ours-bf16": lambda: half.extract(image, 36, 36),
        "ours-fp32": lambda: full.extract(image, 36, 36),
    }
    seconds = alternated(programs, given.rounds, device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {name: product_rate(dtype, device=device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    memory = subprocess.run(
        [sys.executable, "-m", "benchmarks.extract", "--memory", "--device", given.device], capture_output=True, text=True, check=True
    )
    print(json.dumps({
        "date": date.today().isoformat(), "machine": machine(device), "torch": torch.__version__,
        "input": list(pixels.shape), "seconds": seconds, "median_seconds": medians,
        "speedup": {name: medians["plain-fp32"] / medians[name] for name in ("ours-bf16", "ours-fp32")},
        "matrix_product_gflop_per_s": rates, "breakdown_bf16": breakdown(half, image, rates),
        "selection_milliseconds": selection_milliseconds(), "memory": json.loads(memory.stdout.splitlines()[-1]),
        "agreement": agreement(half, state, images),
    }, indent=2))  # fmt: skip


def pictures(folder: Path | None, count: int) -> list[Image.Image]:
    """So many images of 640 x 480: spread over the photos of a folder in the order of their names, or composed."""
    if folder is None:
        return [composed(number) for number in range(count)]
    paths = sorted(folder.glob("*.jpg"))
    return [Image.open(path).convert("RGB").resize((640, 480)) for path in paths[:: max(1, len(paths) // count)][:count]]


def composed(seed: int) -> Image.Image:
    """640 x 480 with shapes of many sizes, so that proposals differ."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((480, 640, 3), np.float32)
    for side in (4, 8, 16, 32, 64, 160):
        blocks = rng.random((-(-480 // side), -(-640 // side), 3), dtype=np.float32)
        pixels += np.kron(blocks, np.ones((side, side, 1), np.float32))[:480, :640]
    return Image.fromarray((pixels / pixels.max() * 255).astype(np.uint8))


def ours(state: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device = CPU, config: VgConfig = CONFIG) -> Detector:
    """Our detector with these weights."""
    return Detector(VgDetection(config, build_vg_network(config, state), device, dtype), "drawn")


@contextmanager
def full_precision() -> Iterator[None]:
    """A block whose convolutions and products of fp32 are not in TF32 on a GPU, where PyTorch takes it for convolutions by itself."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def plain(state: dict[str, Tensor], pixels: Tensor, config: VgConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor]:
    """The plain program from the network's input to the chosen rows: (rows, boxes, features)."""
    with full_precision():
        boxes, features, probs = plain_detector.detect(state, config, pixels)
    return plain_detector.select(boxes * 0.8, probs, 36, 36), boxes, features


def alternated(programs: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every program, one after the other in each round; the first round is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            spent = seconds_of(program, device)
            if number:
                seconds[name].append(spent)
    return seconds


def agreement(half: Detector, state: dict[str, Tensor], images: list[Image.Image]) -> dict[str, Any]:
    """Mean and worst over the images of what ``agreement_on`` measures."""
    found = []
    for image in images:
        found.append(agreement_on(half, state, image))
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    shares = [one["same_boxes_of_36"] for one in found]
    return {"images": len(found), "equal_proposals": min(one["equal_proposals"] / one["proposals"] for one in found),
            "lowest_cosine": min(one["lowest_cosine"] for one in found), "same_boxes_mean": statistics.mean(shares),
            "same_boxes_worst": min(shares), "same_boxes": [round(36 * share) for share in shares]}  # fmt: skip


def agreement_on(half: Detector, state: dict[str, Tensor], image: Image.Image) -> dict[str, float]:
    """Lowest cosine of the features of equal proposals, and the share of the plain program's 36 boxes that ours chose too."""
    inputs = half.inputs([image])
    rows, boxes, features = plain(state, inputs[0].pixels, half.config)
    found = half.forward(inputs)[0]
    choice = half.choose(found, image, inputs[0], 36, 36, "caffe")
    distance = (boxes[:, None] - found.proposals[None]).abs().amax(2)
    nearest = distance.argmin(1)
    same = distance.amin(1) < 0.05
    cosine = torch.cosine_similarity(features[same], found.features[nearest[same]])
    # some proposals pool the very same cells, and which of such twins is chosen is a matter of the sorting algorithm alone
    twin = (torch.cdist(features, features) < 1e-4 * features.norm(dim=1)).int().argmax(1)
    ours_of = {int(nearest[row]): int(twin[row]) for row in range(len(boxes)) if same[row]}
    chosen = Counter(ours_of.get(row, -1) for row in choice.rows.tolist())
    shared = sum((chosen & Counter(twin[rows].tolist())).values())
    return {"proposals": len(boxes), "equal_proposals": int(same.sum()), "lowest_cosine": float(cosine.min()),
            "same_boxes_of_36": shared / len(rows)}  # fmt: skip


@torch.inference_mode()
def breakdown(detector: Detector, image: Image.Image, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds of each stage, and the share of the product rate that the arithmetic ones and the whole reach."""
    network = detector.network
    assert isinstance(network, VgDetection)
    clock = _Clock(network.device)
    with tempfile.TemporaryDirectory() as folder:
        image.save(Path(folder, "image.jpg"))
        clock("decode", lambda: load_image(Path(folder, "image.jpg"), draft=True))
    inputs = clock("resize", lambda: detector.inputs([image]))
    maps = clock("backbone", lambda: network.maps(inputs))
    logits, deltas = clock("RPN", lambda: network.network.rpn(maps[0]))
    anchors = shifted_anchors(network.network.cell_anchors, *maps[0].shape[-2:])
    clock("NMS of proposals", lambda: best_proposals(logits[0], deltas[0], anchors, inputs[0], network.dialect, network.config))
    boxes = network.propose(maps, inputs)[0]
    pooled = clock("RoIPool", lambda: [network.pool(maps[0], part) for part in boxes.split(REGIONS_AT_ONCE)])
    features = clock("res5", lambda: torch.cat([network.network.res5_mean(part) for part in pooled]))
    probs = clock("classes", lambda: network.network.class_probs(features))
    clock("NMS of classes, selection", lambda: select_caffe(boxes * 0.8, probs, 36, 36, 1.0))
    found = detector.forward(inputs)[0]
    record = _record(image, found, detector.choose(found, image, inputs[0], 36, 36, "caffe"))
    with tempfile.TemporaryDirectory() as folder, FeatureStoreWriter(Path(folder, "store"), detector.schema()) as writer:
        clock("write", lambda: write_batch(writer, record))
        clock.seconds["write"] /= writer.batch_records
    return against_limits(clock.seconds, len(boxes), rates)


def write_batch(writer: FeatureStoreWriter, record: RegionRecord) -> None:
    """Store the record under new ids, as many as a transaction holds, and wait until they are on the disk."""
    first = len(writer)
    writer.add_all([(f"image-{first + number}", record) for number in range(writer.batch_records)])
    writer.commit()


def against_limits(seconds: dict[str, float], regions: int, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Seconds of each stage and of the whole; of these and the arithmetic ones also the share of the speed that the product rate allows."""
    gflop = {"backbone": (BACKBONE_GFLOP, "fp32"), "RPN": (RPN_GFLOP, "fp32"), "res5": (REGION_GFLOP * regions, "bf16")}
    least = {name: amount / rates[kind] for name, (amount, kind) in gflop.items()}
    rows = {name: {"seconds": spent} for name, spent in seconds.items()} | {"whole": {"seconds": sum(seconds.values())}}
    for name, limit in (least | {"whole": sum(least.values())}).items():
        rows[name]["share_of_limit"] = limit / rows[name]["seconds"]
    return rows


class _Clock:
    """Runs a stage three times and keeps the median."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, stage: Callable[[], Any]) -> Any:
        results: list[Any] = []
        self.seconds[name] = statistics.median(seconds_of(lambda: results.append(stage()), self.device) for _ in range(3))
        return results[-1]


def selection_milliseconds() -> float:
    """The caffe rule over 300 boxes and 1,601 classes, the median of 20."""
    torch.manual_seed(0)
    corners, sides = torch.rand(300, 2) * 500, torch.rand(300, 2) * 250
    boxes, probs = torch.cat([corners, corners + sides], 1), torch.randn(300, 1601).mul(3).softmax(1)
    return 1000 * statistics.median(seconds_of(lambda: select_caffe(boxes, probs, 10, 100, 1.0), CPU) for _ in range(20))


if __name__ == "__main__":
    main()
