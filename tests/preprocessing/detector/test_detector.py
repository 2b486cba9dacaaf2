"""The detector against the original implementation's numbers, brute force, and its own batch of one."""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou
from torchvision.ops.boxes import clip_boxes_to_image

from megainter.errors import DamagedError, UsageError
from preprocessing.detector import load_detector
from preprocessing.detector.backbones import BACKBONES, build_backbone
from preprocessing.detector.command import DEFAULTS
from preprocessing.detector.detector import (
    BACKGROUND,
    Detector,
    DetectorConfig,
    Regions,
    build_model,
    network_size,
    save_detector,
    to_input,
)
from preprocessing.detector.network import Input
from preprocessing.detector.selection import confidence_after_nms, pairwise_iou, select_caffe, select_d2
from preprocessing.detector.torchvision_models import TorchvisionDetection
from tests.places import SHARED

GOLDEN = SHARED / "golden" / "frcnn_small.npz"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the original detector's outputs (shared/golden) are not beside the repository")


def drawn(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)


def predictor_of(name: str, rows: int, gain: float, features: np.ndarray) -> Tensor:
    """A linear layer of the golden detector, its weights drawn by the recipe of shared/golden/README.md."""
    x = drawn(f"roi_heads.box_predictor.{name}.weight", (rows, 2048))
    weight = (x - x.mean(axis=1, keepdims=True)) * gain / np.sqrt(2048)
    return torch.from_numpy(features @ weight.T + 0.1 * drawn(f"roi_heads.box_predictor.{name}.bias", (rows,)))


@golden
def test_caffe_rule_agrees_with_the_original_implementation() -> None:
    data = np.load(GOLDEN)
    probs = predictor_of("cls_score", 1601, 8.0, data["features"]).softmax(dim=1).roll(1, dims=1)  # background is last there
    boxes = torch.from_numpy(data["caffe_rule_boxes"])
    # some proposals pool the very same cells: their features are equal, and which of them wins a tie is left to the sorting algorithm
    twin = (data["features"][:, None] == data["features"][None]).all(axis=2).argmax(axis=1)
    single = np.bincount(twin, minlength=len(twin))[twin] == 1
    confidence = confidence_after_nms(boxes, probs, pixel=1.0).numpy()
    np.testing.assert_allclose(confidence[single], data["caffe_rule_max_conf"][single], atol=1e-4)
    assert single.sum() >= 30
    assert select_caffe(boxes, probs, 10, 100, pixel=1.0).tolist() == data["caffe_rule_keep_10_100"].tolist()
    assert twin[select_caffe(boxes, probs, 36, 36, pixel=1.0)].tolist() == twin[data["caffe_rule_keep_36"]].tolist()


@golden
def test_d2_rule_agrees_with_the_original_implementation() -> None:
    data = np.load(GOLDEN)
    top, label = predictor_of("cls_score", 1601, 8.0, data["features"]).softmax(dim=1)[:, :-1].max(dim=1)
    deltas = predictor_of("bbox_pred", 6400, 1.0, data["features"])
    decoded = BoxCoder((10.0, 10.0, 5.0, 5.0)).decode(deltas, [torch.from_numpy(data["proposals"])])
    boxes = clip_boxes_to_image(decoded[torch.arange(48), label], tuple(data["resized_hw"]))
    rows = select_d2(boxes, top, 24, 24)
    np.testing.assert_allclose(boxes[rows], data["d2_rule_boxes"], atol=0.05)
    np.testing.assert_allclose(top[rows], data["d2_rule_prob"], rtol=1e-3)
    assert label[rows].tolist() == data["d2_rule_class"].tolist()


def random_boxes(rng: np.random.Generator, count: int) -> Tensor:
    corners = rng.random((count, 2)) * 60
    return torch.from_numpy(np.concatenate([corners, corners + 5 + rng.random((count, 2)) * 50], axis=1)).float()


def test_iou_agrees_with_torchvision() -> None:
    boxes = random_boxes(np.random.default_rng(0), 20)
    torch.testing.assert_close(pairwise_iou(boxes), box_iou(boxes, boxes))
    shifted = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])  # with the last pixel inside, the box is one pixel wider
    torch.testing.assert_close(pairwise_iou(boxes, pixel=1.0), box_iou(shifted, shifted))


@pytest.mark.parametrize("pixel", [0.0, 1.0])
def test_confidence_after_nms_agrees_with_a_loop_over_classes(pixel: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        boxes = random_boxes(rng, 25)
        probs = torch.from_numpy(rng.dirichlet(np.full(9, 0.3), 25)).float()
        overlaps = (pairwise_iou(boxes.double(), pixel) > 0.3).numpy()
        wanted = np.zeros(25)
        for column in probs.numpy().T[1:]:
            alive = list(np.argsort(column)[::-1])
            while alive:
                best = alive.pop(0)
                wanted[best] = max(wanted[best], column[best])
                alive = [other for other in alive if not overlaps[best, other]]
        np.testing.assert_array_equal(confidence_after_nms(boxes, probs, pixel), wanted)


def test_caffe_rule_keeps_proposal_order_within_the_limits_and_ranks_outside_them() -> None:
    boxes = torch.tensor([[20.0 * n, 0, 20 * n + 10, 10] for n in range(6)])  # far apart: no box silences another
    best = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.15, 0.7])
    probs = torch.stack([1 - best, best], dim=1)
    assert select_caffe(boxes, probs, 1, 6).tolist() == [0, 2, 3, 5]
    assert select_caffe(boxes, probs, 5, 6).tolist() == [2, 5, 0, 3, 4]
    assert select_caffe(boxes, probs, 1, 2).tolist() == [2, 5]
    assert select_caffe(boxes, probs, 9, 10).tolist() == [2, 5, 0, 3, 4, 1]


def test_d2_rule_raises_the_threshold_until_enough_boxes_remain() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 8.5], [50, 50, 60, 60]])
    probs = torch.tensor([0.9, 0.8, 0.7, 0.6])
    assert select_d2(boxes, probs, 1, 10).tolist() == [0, 3]
    assert select_d2(boxes, probs, 3, 10).tolist() == [0, 1, 3]
    assert select_d2(boxes, probs, 4, 10).tolist() == [0, 1, 2, 3]
    assert select_d2(boxes, probs, 4, 2).tolist() == [0, 1]


# --- the detector ------------------------------------------------------------------------------------------------------------------

TINY = replace(DEFAULTS["tiny"], class_names=(BACKGROUND, "cat", "dog", "tree"), feature_size=32, min_size=64, max_size=128)


def make(config: DetectorConfig = TINY) -> Detector:
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():  # random weights say little: louder heads give varied scores and boxes
        model.roi_heads.box_predictor.cls_score.weight.mul_(40)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(10)
        model.rpn.head.cls_logits.weight.mul_(20)
    return Detector(TorchvisionDetection(config, model), "test")


def picture(seed: int, width: int = 90, height: int = 70) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("selection", ["caffe", "d2"])
def test_records_are_clipped_in_original_pixels_and_normalised(selection: str) -> None:
    for size in [(90, 70), (300, 200), (20, 400), (5, 5)]:
        record = make().extract(picture(1, *size) if min(size) >= 10 else Image.new("RGB", size, "red"), 4, 20, selection)  # type: ignore[arg-type]
        boxes = record.boxes
        assert (record.width, record.height) == size
        assert 1 <= len(boxes) <= 20
        assert (boxes.dtype, record.features.dtype, record.class_probs.dtype) == (np.float32, np.float16, np.float32)
        assert (record.features.shape, record.class_probs.shape) == ((len(boxes), 32), (len(boxes), 4))
        np.testing.assert_array_equal(boxes, np.clip(boxes, 0, [*size, *size]))
        assert (boxes[:, 2:] >= boxes[:, :2]).all()
        np.testing.assert_allclose(record.class_probs.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("selection", ["caffe", "d2"])
def test_a_batch_gives_what_its_images_give_alone(selection: str) -> None:
    detector, images = make(), [picture(seed) for seed in range(6)]
    for image, together in zip(images, detector.extract_batch(images, 3, 12, selection), strict=True):  # type: ignore[arg-type]
        alone = detector.extract(image, 3, 12, selection)  # type: ignore[arg-type]
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(together.features.astype(np.float32), alone.features.astype(np.float32), atol=2e-3)
        np.testing.assert_allclose(together.class_probs, alone.class_probs, atol=1e-4)


def test_the_feature_is_what_the_classifier_sees_of_the_stored_proposal() -> None:
    """Pool the stored boxes again, independently of the extraction: same features, same probabilities."""
    detector, image = make(), picture(3, 128, 64)
    record = detector.extract(image, 5, 30)
    model = detector.network.model
    with torch.inference_mode():
        tensor = to_input(image, 64, 128)
        images, _ = model.transform([tensor])
        maps = model.backbone(images.tensors)
        features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [torch.from_numpy(record.boxes)], images.image_sizes))
        probs = model.roi_heads.box_predictor(features)[0].softmax(dim=1)
    np.testing.assert_allclose(record.features.astype(np.float32), features, atol=2e-3)
    np.testing.assert_allclose(record.class_probs, probs, atol=1e-4)


def test_the_network_in_eval_mode_detects_what_its_regions_say() -> None:
    """torchvision's own inference (regressed boxes, per-class NMS) keeps class probabilities that ``forward`` reported."""
    detector, image = make(), picture(4)
    tensor = to_input(image, 64, 128)
    with torch.inference_mode():
        found: Regions = detector.forward([Input(tensor, (1.0, 1.0))])[0]
        detections = detector.network.model([tensor])[0]
    assert len(detections["scores"]) > 0
    for score, label in zip(detections["scores"], detections["labels"], strict=True):
        assert (found.class_probs[:, label] - score).abs().min() < 1e-4


def test_without_proposals_the_whole_image_is_the_region() -> None:
    detector = make()
    detector.network.model.rpn.score_thresh = 2.0  # no objectness reaches it
    for selection in ("caffe", "d2"):
        record = detector.extract(picture(0), 1, 10, selection)  # type: ignore[arg-type]
        assert len(record.boxes) == 1
        if selection == "caffe":
            assert record.boxes.tolist() == [[0, 0, 90, 70]]


def test_sizes_follow_the_shorter_side_unless_the_longer_would_exceed_its_limit() -> None:
    assert network_size(500, 375, 600, 1000) == (800, 600)
    assert network_size(1000, 400, 600, 1000) == (1000, 400)
    assert network_size(160, 160, 160, 320) == (160, 160)
    assert network_size(1, 3000, 600, 1000) == (1, 1000)
    assert to_input(picture(0), 64, 128).shape == (3, 64, 82)


def test_a_whole_file_loads_to_the_same_detector(tmp_path: Path) -> None:
    detector, path = make(), tmp_path / "detector.safetensors"
    fingerprint = save_detector(path, TINY, detector.network.model)
    loaded = load_detector(path)
    assert (loaded.fingerprint, loaded.config) == (fingerprint, TINY)
    assert (loaded.schema().class_names, loaded.schema().feature_size) == (TINY.class_names, 32)
    np.testing.assert_array_equal(loaded.extract(picture(2)).features, detector.extract(picture(2)).features)
    half = save_detector(tmp_path / "half.safetensors", TINY, detector.network.model, half=True)
    assert half != fingerprint
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * path.stat().st_size
    near = load_detector(tmp_path / "half.safetensors")
    assert near.fingerprint == half
    assert all(value.dtype != torch.float16 for value in near.network.model.state_dict().values())


def test_a_file_that_is_no_detector_or_not_whole_says_so_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "detector.safetensors"
    with pytest.raises(UsageError, match="does not exist"):
        load_detector(path)
    with pytest.raises(UsageError, match="is a folder; give the file"):
        load_detector(tmp_path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(UsageError, match="is no weights file"):
        load_detector(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(UsageError, match="holds no detector known here"):
        load_detector(path)
    save_detector(path, TINY, make().network.model)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(DamagedError):
        load_detector(path)
    path.write_bytes(content)
    state = load_file(path)
    state["extra"] = torch.zeros(1)
    del state["rpn.head.cls_logits.bias"]
    state["roi_heads.box_head.fc7.bias"] = torch.zeros(5)
    save_file(state, path, metadata={"format": "megainter-detector-1", "config": TINY.to_json()})
    with pytest.raises(DamagedError, match=r"1 missing: rpn.head.cls_logits.bias; 1 unexpected: extra; 1 of another shape: .*fc7.bias"):
        load_detector(path)
    config = json.dumps({**json.loads(TINY.to_json()), "colour": "red"})
    save_file(state, path, metadata={"format": "megainter-detector-1", "config": config})
    with pytest.raises(DamagedError, match="colour"):
        load_detector(path)


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(UsageError, match="start with"):
        DetectorConfig(class_names=("cat",))
    with pytest.raises(UsageError, match="max_size"):
        replace(TINY, min_size=300)
    with pytest.raises(UsageError, match="feature levels"):
        build_model(replace(TINY, anchor_sizes=((16,), (32,))))
    with pytest.raises(UsageError, match="unknown backbone 'resnet9': choose one of tiny"):
        build_model(replace(TINY, backbone="resnet9"))
    with pytest.raises(UsageError, match="min_boxes"):
        make().extract(picture(0), 10, 5)
    with pytest.raises(UsageError, match="selection"):
        make().extract(picture(0), 1, 5, "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(BACKBONES))
def test_every_backbone_gives_its_levels_and_freezes_its_first_stages(name: str) -> None:
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite0 needs the imagenet extra")
    backbone = build_backbone(name)
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert len(maps) == backbone.levels
    assert all(value.shape[1] == backbone.out_channels for value in maps.values())
    before = sum(parameter.requires_grad for parameter in backbone.parameters())
    backbone.freeze_stages(2)  # type: ignore[operator]
    assert 0 < sum(parameter.requires_grad for parameter in backbone.parameters()) < before
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.train()
    backbone(torch.rand(2, 3, 64, 96))
    frozen = [key for key in state if key.startswith(("stages.0.", "stem.")) and "running" in key]
    assert all(torch.equal(backbone.state_dict()[key], state[key]) for key in frozen)
    with pytest.raises(UsageError, match="stages"):
        backbone.freeze_stages(99)  # type: ignore[operator]
