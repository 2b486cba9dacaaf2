"""Training a Faster R-CNN on a boxes manifest: loop, checkpoints, exact resume, mAP by faster-coco-eval.

The run folder: ``config.json``, ``metrics.jsonl``, ``checkpoint/`` (the newest whole one), ``detector.safetensors`` (the result).
"""

import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from megainter.data.feature_store.lock import WriterLock
from megainter.data.tables.boxes import ImageBoxes, read_boxes
from megainter.devices import torch_device
from megainter.errors import DamagedError, NumericsError, StoppedEarly, UsageError
from megainter.files import apply_umask, aside, read_json, sha256_of, write_json
from megainter.progress import Progress
from preprocessing.detector.batches import BoxesDataset, Sample, batches_from, class_names_of, repeat_factors
from preprocessing.detector.detector import LIGHT, DetectorConfig, build_model, save_detector
from preprocessing.detector.needs import Held, Needs, tell_needs
from preprocessing.detector.settings import DetectorTraining
from preprocessing.detector.unfinished import PATIENCE, Unfinished, finished

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainedDetector:
    """What ``train_detector`` leaves behind: the weights file and the validation scores (empty without a validation set)."""

    weights: Path
    scores: dict[str, float]


def train_detector(
    boxes: Path,
    images: Path,
    output: Path,
    configure: Callable[[tuple[str, ...]], DetectorConfig],
    training: DetectorTraining,
    validation: Path | None = None,
    validation_images: Path | None = None,
    backbone_weights: Path | None = None,
    workers: int = 0,
    device: str = "cpu",
    checkpoint_every: int = 500,
    evaluate_every: int = 0,
    half: bool = False,
    split: str | None = None,
    validation_split: str | None = None,
    stop: Callable[[], bool] = lambda: False,
    ignore_unknown: bool = False,
) -> TrainedDetector:
    """Train, or go on with, the run in ``output``; called again with the same arguments it resumes at the last checkpoint.

    ``configure`` makes the network's configuration from the class names found in the manifest (background first). ``stop`` is asked
    all the time; when it says yes the state is saved and ``StoppedEarly`` raised, also amid a step, which is then done again by the next
    run. ``half`` stores the final weights as float16. Validation boxes whose class is not among the training's are refused, or with
    ``ignore_unknown`` left out. What memory and time the training takes is tried out and said before it begins.
    From its first checkpoint on the folder belongs to one set of settings and boxes: ``UsageError`` for others. ``LockedError`` where
    another process writes to it.
    """
    rows = read_boxes(boxes, split)
    if not rows:
        raise UsageError(f"{boxes} has no rows" + (f" of split {split!r}" if split else ""))
    config = configure(class_names_of(rows))

    # What is learned from and measured on.
    computing = torch_device(device)
    held_out = read_boxes(validation, validation_split) if validation else []
    held_out = known_only(held_out, config.class_names, ignore_unknown)
    data = BoxesDataset(rows, images, config.class_names, config.min_size, config.max_size)
    held_out_data = BoxesDataset(held_out, validation_images or images, config.class_names, config.min_size, config.max_size)
    factors = repeat_factors(rows, training.balance)
    total = max(1, math.floor(training.epochs * factors.sum() / training.batch_size))

    # Steps, each either in the checkpoint or not done.
    with _only_writer(output):
        run = _Run(output, config, training, backbone_weights, computing, data_digest=_digest_of(rows))
        batches = batches_from(factors, training.seed, training.batch_size, training.flip, run.step, total)
        loader = DataLoader(data, batch_sampler=_Fixed(batches), collate_fn=list, num_workers=workers)
        if run.step < total:
            _tell_needs(run, data[(0, False)], total - run.step, stop)
        with Progress("train detector", total, "steps", done=run.step) as bar:
            for samples in loader:
                losses = _step(run, samples, total, stop)
                note = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
                bar.update(1, note)
                if run.step % 20 == 0 or run.step == total:
                    run.log({"step": run.step, "images_per_s": round(bar.rate * training.batch_size, 2), **losses})
                if stop():
                    run.save()
                    raise StoppedEarly(f"stopped at step {run.step} of {total}: the same command goes on from there")
                if checkpoint_every and run.step % checkpoint_every == 0 and run.step < total:
                    run.save()
                if evaluate_every and held_out and run.step % evaluate_every == 0 and run.step < total:
                    run.log({"step": run.step, **_measured(run, held_out_data, stop)})

        # The result, and how good it is.
        run.save()
        weights = output / "detector.safetensors"
        save_detector(weights, config, run.model, half)
        scores = _measured(run, held_out_data, stop) if held_out else {}
        if scores:
            run.log({"step": run.step, **scores})
            print("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()), flush=True)
    return TrainedDetector(weights, scores)


def _step(run: "_Run", samples: list[Sample], total: int, stop: Callable[[], bool]) -> dict[str, float]:
    """A step; on a stop that it is too slow for, ``StoppedEarly``, and the state before it is saved."""
    try:
        return finished(lambda: run.train_step(samples, total), stop, PATIENCE)
    except Unfinished:
        run.give_up()
        raise StoppedEarly(f"stopped amid step {run.step + 1} of {total}: the same command goes on from step {run.step}") from None


def _measured(run: "_Run", data: BoxesDataset, stop: Callable[[], bool]) -> dict[str, float]:
    """``evaluate``; on a stop ``StoppedEarly``, and what was learned is saved."""
    try:
        return finished(lambda: evaluate(run.model, data, run.device), stop, PATIENCE)
    except Unfinished:
        run.save()
        raise StoppedEarly(f"stopped while step {run.step} was measured: the same command goes on from there") from None


def _tell_needs(run: "_Run", sample: Sample, steps: int, stop: Callable[[], bool]) -> None:
    """What the steps take, tried with one image."""
    try:
        needs = finished(lambda: run.tried(sample), stop, PATIENCE)
    except Unfinished:
        raise StoppedEarly("stopped before the first step") from None
    tell_needs(needs, run.config.backbone, str(run.device), run.training.batch_size, run.images_at_once, steps)


def known_only(rows: list[ImageBoxes], class_names: tuple[str, ...], ignore_unknown: bool) -> list[ImageBoxes]:
    """``rows`` of a validation without boxes of classes that the training does not have, which is said; ``UsageError`` unless asked for."""
    unknown = Counter(label for row in rows for label in row.labels if label not in class_names)
    if not unknown:
        return rows
    few = ", ".join(f"{name!r:.60}" for name in sorted(unknown)[:5])
    told = f"{unknown.total():,} validation boxes are of {len(unknown):,} classes that no training image has (first {few})"
    if not ignore_unknown:
        raise UsageError(
            f"{told}: leave these boxes out with --ignore-unknown, train on images with such boxes, or draw the splits anew "
            "(megainter prepare boxes --seed)"
        )
    print(f"note: {told}; they are left out", flush=True)
    kept = [np.array([label in class_names for label in row.labels], bool) for row in rows]
    return [
        replace(row, boxes=row.boxes[mine], labels=[label for label in row.labels if label in class_names])
        for row, mine in zip(rows, kept, strict=True)
    ]


def _only_writer(output: Path) -> WriterLock:
    """The run folder, made and locked."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {output} cannot be made a folder: {error.strerror}") from None
    return WriterLock(output / "detector.lock")


def _digest_of(rows: list[ImageBoxes]) -> str:
    """SHA-256 of what is learned from: images, boxes, labels, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.image, row.width, row.height, row.boxes.tolist(), row.labels]).encode())
    return digest.hexdigest()


class _Fixed:
    """Batches prepared in advance, for DataLoader's ``batch_sampler``."""

    def __init__(self, batches: Iterator[list[tuple[int, bool]]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        return self.batches


class _Run:
    """Network, optimiser and step number of a run folder."""

    def __init__(
        self,
        folder: Path,
        config: DetectorConfig,
        training: DetectorTraining,
        backbone_weights: Path | None = None,
        device: torch.device = CPU,
        data_digest: str = "",
    ) -> None:
        self.folder, self.config, self.training, self.device, self.step = folder, config, training, device, 0
        settings = {"detector": asdict(config), "training": asdict(training), "data": {"boxes": data_digest}}
        self.settings = json.loads(json.dumps(settings))  # tuples as lists, as they are read again
        self._refuse_other_settings()
        torch.manual_seed(training.seed)
        self.model = build_model(config, backbone_weights)
        self.model.roi_heads.fg_bg_sampler.batch_size_per_image = training.regions_per_image
        self.model.rpn.fg_bg_sampler.batch_size_per_image = training.anchors_per_image
        self.model.backbone.freeze_stages(training.freeze_backbone_stages)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.named = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        # norms and biases are vectors: no decay on them
        decayed = [value for value in self.named.values() if value.ndim > 1]
        plain = [value for value in self.named.values() if value.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=training.learning_rate)
        light = config.backbone in LIGHT or self.device.type != "cpu"
        self.images_at_once = training.images_at_once or (training.batch_size if light else 1)
        # What a step changes before its update: statistics of normalisation. As they were before it, while it is in work.
        self.before: dict[str, Tensor] | None = None
        self.updating, self.given_up = Lock(), False
        self._resume()

    def _refuse_other_settings(self) -> None:
        """A folder with a checkpoint belongs to its settings and boxes; what a start without one left behind is replaced."""
        if not any(self.folder.glob("checkpoint-*")):
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
            return
        mine, theirs = self.settings, read_json(self.folder / "config.json")
        differing = [f"{part}.{key}" for part in mine for key in mine[part] if mine[part][key] != theirs.get(part, mine[part]).get(key)]
        if differing:
            raise UsageError(f"{self.folder} holds a run with other settings ({', '.join(differing[:5])}): choose another --output")

    def train_step(self, samples: list[Sample], total: int) -> dict[str, float]:
        """One optimiser step; returns the four losses and their sum."""
        self.before = self._statistics()
        rate = learning_rate_at(self.step, total, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # the samplers of anchors and regions draw from torch's generator: seeded by the step, a resumed run draws the same
        torch.manual_seed(self.training.seed * 1_000_003 + self.step)
        self.optimizer.zero_grad(set_to_none=True)
        means = Counter[str]()
        for first in range(0, len(samples), self.images_at_once):
            part = samples[first : first + self.images_at_once]
            share = len(part) / len(samples)
            means.update({name: share * value for name, value in self._losses(part, share, rate).items()})

        nn.utils.clip_grad_norm_(list(self.named.values()), self.training.clip_norm)
        with self.updating:
            if self.given_up:
                return {}
            self.optimizer.step()
            self.step, self.before = self.step + 1, None
        return dict(means)

    def _losses(self, samples: list[Sample], share: float, rate: float) -> dict[str, float]:
        """The losses of some of a step's images, whose gradients are added up by their ``share`` of it."""
        images = [sample.image.to(self.device) for sample in samples]
        targets = [{key: value.to(self.device) for key, value in sample.target().items()} for sample in samples]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.precision == "bf16"):
            losses: dict[str, Tensor] = self.model(images, targets)
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        if not torch.isfinite(loss):
            raise NumericsError(f"the detector's loss is {loss.item()} at step {self.step}: lower --learning-rate ({rate:.2e} now)")
        (loss * share).backward()
        return {"loss": loss.item(), **{name.removeprefix("loss_"): value.item() for name, value in losses.items()}}

    def tried(self, sample: Sample) -> Needs:
        """What a step's pass with one image takes; the run is as before."""
        self.before = self._statistics()
        torch.manual_seed(self.training.seed)
        self.model.train()
        held = Held([*self.named.values()])
        start = time.monotonic()
        with held:
            self._losses([sample], 1.0, self.training.learning_rate)
        seconds = time.monotonic() - start
        self.optimizer.zero_grad(set_to_none=True)
        self.model.load_state_dict(self.before, strict=False)
        self.before = None
        return Needs(seconds, held.bytes, sum(value.numel() for value in self.named.values()))

    def _statistics(self) -> dict[str, Tensor]:
        """Copies of what is in the state beside the weights."""
        weights = {name for name, _ in self.model.named_parameters()}
        return {name: value.clone() for name, value in self.model.state_dict().items() if name not in weights}

    def give_up(self) -> None:
        """Save the state before the step that another thread is in, which from here on changes nothing that counts."""
        with self.updating:
            self.given_up = True
            if self.step:
                self.save()

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 1), **values}) + "\n")

    def save(self) -> None:
        """Publish a checkpoint whole: written aside with its digests, renamed, and only then the one before removed."""
        final = self.folder / f"checkpoint-{self.step:08d}"
        with aside(final) as partial:
            partial.mkdir()
            state = self.model.state_dict() | (self.before or {})
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, partial / "model.safetensors")
            save_file(self._optimizer_tensors(), partial / "optimizer.safetensors")
            for path in sorted(partial.iterdir()):
                apply_umask(path)
            digests = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
            write_json(partial / "state.json", {"step": self.step, "sha256": digests})
            write_json(self.folder / "config.json", self.settings)
        for old in self.folder.glob("checkpoint-*"):
            if old != final:
                shutil.rmtree(old)

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        return tensors

    def _resume(self) -> None:
        """Load the newest checkpoint that is whole."""
        for folder in sorted(self.folder.glob("checkpoint-*"), reverse=True):
            state = read_json(folder / "state.json")
            broken = [name for name, digest in state["sha256"].items() if not _matches(folder / name, digest)]
            if broken:
                raise DamagedError(f"{folder} is damaged ({', '.join(broken)}): remove it to start again from the beginning")
            self.model.load_state_dict(load_file(folder / "model.safetensors", device=str(self.device)))
            moments = load_file(folder / "optimizer.safetensors", device=str(self.device))
            for name, parameter in self.named.items():
                keys = [key for key in moments if key.rpartition("/")[0] == name]
                self.optimizer.state[parameter] = {key.rpartition("/")[2]: moments[key] for key in keys}
                if "step" in self.optimizer.state[parameter]:
                    self.optimizer.state[parameter]["step"] = self.optimizer.state[parameter]["step"].cpu()
            self.step = state["step"]
            print(f"resuming {self.folder} at step {self.step}", flush=True)
            return


def _matches(path: Path, digest: str) -> bool:
    return path.is_file() and sha256_of(path) == digest


def learning_rate_at(step: int, total: int, training: DetectorTraining) -> float:
    """Linear warm-up from 0, then half a cosine down to 1 % of the peak."""
    warmup = min(training.warmup_steps, total // 4)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return training.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


# --- evaluation --------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(model: nn.Module, data: BoxesDataset, device: torch.device = CPU, batch_size: int = 8) -> dict[str, float]:
    """COCO's box mAP over ``data``: {"map_50", "map_50_95"}, classes weighted equally, at most 100 detections per image."""
    model.eval()
    images, annotations, detections = [], [], []
    with Progress("evaluate detector", len(data), "images") as bar:
        for first in range(0, len(data), batch_size):
            numbers = range(first, min(first + batch_size, len(data)))
            samples = [data[(number, False)] for number in numbers]
            outputs = model([sample.image.to(device) for sample in samples])
            for number, sample, output in zip(numbers, samples, outputs, strict=True):
                images.append({"id": number, "width": sample.image.shape[2], "height": sample.image.shape[1]})
                annotations += _coco_rows(number, sample.boxes, sample.labels)
                detections += _coco_rows(number, output["boxes"].cpu(), output["labels"].cpu(), output["scores"].cpu())
            bar.update(len(numbers))
    return coco_map(images, annotations, detections)


def _coco_rows(image: int, boxes: Tensor, labels: Tensor, scores: Tensor | None = None) -> list[dict[str, Any]]:
    """COCO's dictionaries, boxes as x, y, width, height."""
    sizes = boxes[:, 2:] - boxes[:, :2]
    rows = []
    for number, (corner, size, label) in enumerate(zip(boxes[:, :2].tolist(), sizes.tolist(), labels.tolist(), strict=True)):
        row: dict[str, Any] = {"image_id": image, "category_id": label, "bbox": [*corner, *size], "area": size[0] * size[1], "iscrowd": 0}
        rows.append(row if scores is None else {**row, "score": float(scores[number])})
    return rows


def coco_map(images: list[dict[str, Any]], annotations: list[dict[str, Any]], detections: list[dict[str, Any]]) -> dict[str, float]:
    """mAP by faster-coco-eval from COCO's dictionaries; 0 without any detection."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ModuleNotFoundError:
        raise UsageError("mAP needs faster-coco-eval: pip install 'megainter[detector]', or leave out --validation") from None
    if not detections:
        return {"map_50": 0.0, "map_50_95": 0.0}
    numbered = [{**row, "id": number} for number, row in enumerate(annotations, start=1)]
    categories = [{"id": int(number), "name": str(number)} for number in np.unique([row["category_id"] for row in annotations])]
    truth = COCO({"images": images, "annotations": numbered, "categories": categories})
    scorer = COCOeval_faster(truth, truth.loadRes(detections), iouType="bbox", print_function=lambda *_: None)
    scorer.run()
    return {"map_50": float(scorer.stats[1]), "map_50_95": float(scorer.stats[0])}
