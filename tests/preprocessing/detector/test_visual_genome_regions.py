"""The Visual Genome detector's rules against plain loops and formulas, and the network as a ``Detector``; the selftest."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from megainter.errors import DamagedError, UsageError
from megainter.verbs.detector import detector_app
from preprocessing.detector.check import examine, problems, read_reference
from preprocessing.detector.detector import Detector, Precision, build_detector
from preprocessing.detector.network import Input
from preprocessing.detector.visual_genome import DIALECTS, VgConfig
from preprocessing.detector.visual_genome_regions import best_proposals, clipped, decoded, input_size, shifted_anchors
from preprocessing.detector.weights import Weights
from tests.preprocessing.detector.vg_weights import SMALL, anchors_of_caffe, anchors_of_d2, as_caffe, small_state

CAFFE = VgConfig(**{**SMALL.__dict__, "dialect": "caffe"})


def make(dialect: str = "d2", precision: Precision = "fp32") -> Detector:
    state = small_state() if dialect == "d2" else as_caffe(small_state(), torch.from_numpy(anchors_of_caffe()))
    return build_detector(Weights("test", SMALL if dialect == "d2" else CAFFE, state), "cpu", precision)


def picture(seed: int = 0, width: int = 140, height: int = 100) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.BICUBIC)


# --- the input -------------------------------------------------------------------------------------------------------------------------


def bilinear(channel: np.ndarray, width: int, height: int, scale: tuple[float, float]) -> np.ndarray:
    """Of each pixel's centre, taken back by ``scale`` (x, y), the four neighbours' weighted mean; no antialiasing."""

    def neighbours(count: int, size: int, factor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.clip((np.arange(count) + 0.5) / factor - 0.5, 0, None)
        low = np.minimum(at.astype(int), size - 1)
        return low, np.minimum(low + 1, size - 1), at - low

    top, bottom, y = neighbours(height, channel.shape[0], scale[1])
    left, right, x = neighbours(width, channel.shape[1], scale[0])
    upper = channel[top][:, left] * (1 - x) + channel[top][:, right] * x
    lower = channel[bottom][:, left] * (1 - x) + channel[bottom][:, right] * x
    return upper * (1 - y)[:, None] + lower * y[:, None]


@pytest.mark.parametrize("dialect", ["caffe", "d2"])
@pytest.mark.parametrize("size", [(500, 333), (97, 61), (640, 100)])
def test_the_input_is_bgr_without_means_resized_without_antialiasing(dialect: str, size: tuple[int, int]) -> None:
    detector, image = make(dialect), picture(1, *size)
    value = detector.inputs([image], 150, 250)[0]
    height, width = value.size
    scale = min(150 / min(size), 250 / max(size))
    scales = (scale, scale) if dialect == "caffe" else (width / size[0], height / size[1])
    centred = np.array(image)[:, :, ::-1].astype(np.float64) - np.array([102.9801, 115.9465, 122.7717])
    wanted = np.stack([bilinear(centred[:, :, channel], width, height, scales) for channel in range(3)])
    np.testing.assert_allclose(value.pixels, wanted, atol=0.01)
    np.testing.assert_allclose(value.ratio, [1 / factor for factor in scales])


def test_sizes_of_either_dialect() -> None:
    assert input_size(640, 480, 600, 1000, "caffe") == ((800, 600), 1.25)
    assert input_size(1500, 1125, 600, 1000, "caffe")[0] == (800, 600)
    assert input_size(2000, 500, 600, 1000, "caffe") == ((1000, 250), 0.5)
    assert input_size(500, 375, 800, 1333, "d2")[0] == (1067, 800)
    assert input_size(2000, 500, 800, 1333, "d2")[0] == (1333, 333)
    assert input_size(1, 3000, 600, 1000, "caffe")[0] == (5, 1000)


@pytest.mark.parametrize("size", [(1, 1), (3, 900), (900, 3)])
def test_extreme_shapes_give_regions(size: tuple[int, int]) -> None:
    for dialect in ("caffe", "d2"):
        record = make(dialect).extract(Image.new("RGB", size, "red"), 1, 5)
        assert 1 <= len(record) <= 5


# --- proposals -------------------------------------------------------------------------------------------------------------------------


def test_anchors_move_by_the_stride_and_run_fastest() -> None:
    base = torch.from_numpy(anchors_of_d2())
    anchors = shifted_anchors(base, 2, 3)
    assert anchors.shape == (2 * 3 * 12, 4)
    torch.testing.assert_close(anchors[(1 * 3 + 2) * 12 + 5], base[5] + torch.tensor([32.0, 16, 32, 16]))


def test_caffe_s_anchors_are_the_published_integers() -> None:
    anchors = anchors_of_caffe()
    assert anchors[0].tolist() == [-38, -16, 53, 31]
    assert anchors[4].tolist() == [-24, -24, 39, 39]
    assert anchors[11].tolist() == [-168, -344, 183, 359]


def slow_proposals(logits: Tensor, deltas: Tensor, anchors: Tensor, value: Input, caffe: bool, most: int, best: int) -> list[list[float]]:
    """Box by box, as the original codes have it."""
    pixel = 1.0 if caffe else 0.0
    height, width = value.size
    rows = []
    for logit, (dx, dy, dw, dh), (x1, y1, x2, y2) in zip(logits.tolist(), deltas.tolist(), anchors.tolist(), strict=True):
        w, h = x2 - x1 + pixel, y2 - y1 + pixel
        x, y = x1 + 0.5 * w + dx * w, y1 + 0.5 * h + dy * h
        limit = math.inf if caffe else math.log(1000 / 16)
        w, h = w * math.exp(min(dw, limit)), h * math.exp(min(dh, limit))
        box = [x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h]
        rows.append((logit, [min(max(box[i], 0.0), (width, height)[i % 2] - pixel) for i in range(4)]))
    big = 16 / value.ratio[0] if caffe else 0.0

    def large(box: list[float]) -> bool:
        sides = box[2] - box[0] + pixel, box[3] - box[1] + pixel
        return min(sides) >= big if caffe else min(sides) > 0

    rows = [row for row in rows if large(row[1])] if caffe else rows
    rows = sorted(rows, key=lambda row: -row[0])[:most]
    kept: list[list[float]] = []
    for _, box in rows:
        wide = torch.tensor([[box[0], box[1], box[2] + pixel, box[3] + pixel]])
        others = torch.tensor([[k[0], k[1], k[2] + pixel, k[3] + pixel] for k in kept]).view(-1, 4)
        if large(box) and not (box_iou(wide, others) > 0.7).any():
            kept.append(box)
    return kept[:best]


@pytest.mark.parametrize("dialect", ["caffe", "d2"])
def test_proposals_are_those_of_the_plain_loop(dialect: str) -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        anchors = shifted_anchors(torch.from_numpy(anchors_of_caffe() if dialect == "caffe" else anchors_of_d2()), 6, 8)
        logits = torch.randn(len(anchors), generator=generator)
        deltas = torch.randn(len(anchors), 4, generator=generator) * torch.tensor([0.5, 0.5, 0.8, 0.8])
        value = Input(torch.zeros(3, 96, 128), (0.5, 0.5))
        config = VgConfig(**{**SMALL.__dict__, "dialect": dialect, "proposals": 40, "proposals_before_nms": 300})
        boxes = best_proposals(logits, deltas, anchors, value, DIALECTS[dialect], config)
        wanted = slow_proposals(logits, deltas, anchors, value, dialect == "caffe", 300, 40)
        np.testing.assert_allclose(boxes, wanted, atol=1e-3)


def test_caffe_drops_boxes_under_16_original_pixels_before_the_cut() -> None:
    boxes, dialect = torch.tensor([[0.0, 0, 29, 29], [0, 0, 30, 30], [40, 40, 90, 90]]), DIALECTS["caffe"]
    config = VgConfig(**{**SMALL.__dict__, "dialect": "caffe", "proposals_before_nms": 2})
    value = Input(torch.zeros(3, 100, 100), (0.5, 0.5))  # 16 original pixels are 32 of the input
    kept = best_proposals(torch.tensor([3.0, 2, 1]), torch.zeros(3, 4), boxes, value, dialect, config)
    assert kept.tolist() == [[0, 0, 31, 31], [40, 40, 91, 91]]  # the original codes decode to a last pixel one further


def test_huge_growth_stays_inside_the_input() -> None:
    deltas = torch.tensor([[0.0, 0, 500, 500]])
    for dialect in DIALECTS.values():
        box = clipped(decoded(deltas, torch.tensor([[40.0, 40, 60, 60]]), dialect), (100, 120), dialect)
        assert box.tolist() == [[0, 0, 120 - dialect.pixel, 100 - dialect.pixel]]


# --- the head --------------------------------------------------------------------------------------------------------------------------


def test_interleaved_lattices_are_the_dilated_stage() -> None:
    network = make().network.network  # type: ignore[attr-defined]
    pooled = torch.rand(3, 128, 14, 14)
    x = pooled
    for block in network.res5:
        inner = F.relu(F.conv2d(F.relu(block.conv1(x)), block.conv2.weight, block.conv2.bias, padding=2, dilation=2))
        x = F.relu(block.conv3(inner) + (x if block.shortcut is None else block.shortcut(x)))
    torch.testing.assert_close(network.res5_mean(pooled), x.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_one_class_s_deltas_are_rows_of_all() -> None:
    network = make().network.network  # type: ignore[attr-defined]
    features, labels = torch.rand(5, 256), torch.tensor([0, 3, 1, 1, 2])
    every = network.box_deltas(features).view(5, 4, 4)
    torch.testing.assert_close(network.deltas_of(features, labels), every[torch.arange(5), labels], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selection", ["caffe", "d2"])
@pytest.mark.parametrize("dialect", ["caffe", "d2"])
def test_a_batch_of_any_sizes_gives_what_its_images_give_alone(dialect: str, selection: str) -> None:
    detector, images = make(dialect), [picture(0), picture(1), picture(2, 100, 140), picture(3)]
    for image, together in zip(images, detector.extract_batch(images, 5, 12, selection), strict=True):  # type: ignore[arg-type]
        alone = detector.extract(image, 5, 12, selection)  # type: ignore[arg-type]
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_allclose(together.features.astype(np.float32), alone.features.astype(np.float32), rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(together.class_probs, alone.class_probs, atol=1e-4)


@pytest.mark.parametrize("dialect", ["caffe", "d2"])
def test_records_fit_the_store(dialect: str) -> None:
    from megainter.data.feature_store.record import check_record

    detector = make(dialect)
    schema = detector.schema()
    assert (schema.feature_size, schema.num_classes, schema.class_names[:2]) == (256, 5, ("__background__", "cat"))
    for selection in ("caffe", "d2"):
        record = detector.extract(picture(4, 333, 222), 10, 20, selection)  # type: ignore[arg-type]
        check_record("photo", record, schema)
        assert 10 <= len(record) <= 20
        assert (record.width, record.height) == (333, 222)


def test_the_caffe_rule_stores_proposals_and_the_d2_rule_regressed_boxes() -> None:
    detector, image = make("caffe"), picture(5)
    proposals = detector.forward(detector.inputs([image]))[0].proposals / (96 / 100)
    stored = torch.from_numpy(detector.extract(image, 5, 24).boxes)
    assert ((stored[:, None] - proposals).abs().amax(dim=2).amin(dim=1) < 1e-3).all()
    stored = torch.from_numpy(detector.extract(image, 5, 24, "d2").boxes)
    assert ((stored[:, None] - proposals).abs().amax(dim=2).amin(dim=1) > 1e-3).any()


def test_attribute_confidences_include_none_in_caffe_only() -> None:
    for dialect in ("caffe", "d2"):
        detector = make(dialect)
        record, labels = detector.describe(picture(6), 5, 12)
        found = detector.forward(detector.inputs([picture(6)]))[0]
        logits = detector.network.network.attribute_logits(found.features, found.class_probs)  # type: ignore[attr-defined]
        probs = logits.softmax(dim=1)
        wanted = probs[:, 1:] if dialect == "caffe" else probs[:, 1:] / probs[:, 1:].sum(dim=1, keepdim=True)
        pairs = {(round(float(p), 4), int(a)) for p, a in zip(*wanted.max(dim=1), strict=True)}
        assert {(round(float(c), 4), int(a)) for c, a in zip(labels.attribute_confidences, labels.attribute_ids, strict=True)} <= pairs
        np.testing.assert_array_equal(labels.class_ids, record.class_probs[:, 1:].argmax(axis=1))
        np.testing.assert_allclose(labels.class_confidences, record.class_probs[:, 1:].max(axis=1))
        assert all(len(values) == len(record) for values in vars(labels).values())


def test_given_boxes_are_read_as_they_stand() -> None:
    detector, images = make(), [picture(7), picture(8, 280, 200)]
    boxes = [np.array([[10, 10, 90, 80], [0, 0, 140, 100]], np.float32), np.array([[20, 20, 180, 160]], np.float32)]
    records = detector.extract_at(images, boxes)
    assert [record.boxes.tolist() for record in records] == [mine.tolist() for mine in boxes]
    stored = detector.extract(images[0], 5, 24)
    again = detector.extract_at(images[:1], [stored.boxes])[0]
    np.testing.assert_allclose(again.features.astype(np.float32), stored.features.astype(np.float32), rtol=1e-2, atol=1e-2)


def test_half_precision_keeps_proposals_and_nearly_the_features() -> None:
    full, half, image = make(), make(precision="bf16"), picture(9)
    a, b = full.forward(full.inputs([image]))[0], half.forward(half.inputs([image]))[0]
    torch.testing.assert_close(a.proposals, b.proposals)
    assert F.cosine_similarity(a.features, b.features).min() > 0.999
    assert full.fingerprint == half.fingerprint
    with pytest.raises(UsageError, match="precision"):
        make(precision="int4")  # type: ignore[arg-type]


# --- check --------------------------------------------------------------------------------------------------------------------------


def write_reference(path: Path, detector: Detector, image: Image.Image) -> None:
    """A row of LXMERT's TSV as its own script writes it."""
    record, labels = detector.describe(image, 20, 24)
    arrays = [labels.class_ids, labels.class_confidences, labels.attribute_ids, labels.attribute_confidences]
    cells = ["photo", image.height, image.width, *map(coded, arrays), len(record), coded(record.boxes)]
    path.write_text("\t".join(map(str, [*cells, coded(record.features.astype(np.float32))])) + "\n")


def coded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def broken(colours: bool, shift: int) -> Detector:
    """The detector with its first layer's colours swapped and its classes moved."""
    state = dict(small_state())
    if colours:
        state["backbone.stem.conv1.weight"] = state["backbone.stem.conv1.weight"].flip(1)
    for part in ("weight", "bias"):
        name = f"roi_heads.box_predictor.cls_score.{part}"
        state[name] = state[name].roll(shift, 0)
    return build_detector(Weights("test", SMALL, state))


@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_the_check_finds_swapped_colours_and_moved_classes(tmp_path: Path, colours: bool, shift: int) -> None:
    image = picture(10, 160, 120)
    write_reference(tmp_path / "rows.tsv", make(), image)
    reference = read_reference(tmp_path / "rows.tsv", "photo", 256)
    found = " ".join(problems(examine(broken(colours, shift), image, reference)))
    assert ("colours are swapped" in found) == colours
    assert ("classes belong one earlier" in found) == (shift == 1)
    assert ("classes belong one later" in found) == (shift == -1)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_without_a_reference_the_background_s_place_tells(shift: int) -> None:
    state = dict(small_state())
    bias = state["roi_heads.box_predictor.cls_score.bias"].clone()
    bias[-1] += 40  # a trained detector finds background in most proposals
    for part, value in (("bias", bias), ("weight", state["roi_heads.box_predictor.cls_score.weight"])):
        state[f"roi_heads.box_predictor.cls_score.{part}"] = value.roll(shift, 0)
    finding = examine(build_detector(Weights("test", SMALL, state)), picture(11))
    assert max(finding.classes, key=lambda key: finding.classes[key]) == -shift


def words(folder: Path, weights: str) -> list[str]:
    """The options of `megainter detector check`."""
    return ["--weights", str(folder / weights), "--image", str(folder / "photo.png"), "--regions", str(folder / "rows.tsv")]


def test_the_check_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = picture(12, 160, 120)
    image.save(tmp_path / "photo.png")
    write_reference(tmp_path / "rows.tsv", make(), image)
    torch.save(small_state(), tmp_path / "weights.pth")
    torch.save({**small_state(), "backbone.stem.conv1.weight": small_state()["backbone.stem.conv1.weight"].flip(1)}, tmp_path / "wrong.pth")
    detector_app(["check", *words(tmp_path, "weights.pth")], result_action="return_value")
    assert "as they should be" in capsys.readouterr().out
    with pytest.raises(DamagedError, match="colours are swapped"):
        detector_app(["check", *words(tmp_path, "wrong.pth"), "--json"], result_action="return_value")
    told = json.loads(capsys.readouterr().out)
    assert told["colours"]["swapped"] > told["colours"]["as_fed"]
    assert len(told["problems"]) == 1
    with pytest.raises(UsageError, match="no row of the photo"):
        read_reference(tmp_path / "rows.tsv", "other", 256)
    with pytest.raises(UsageError, match="features of 256 numbers"):
        read_reference(tmp_path / "rows.tsv", "photo", 2048)
