"""Every stage of the Visual Genome detector against the original implementation's numbers, each from the stored input of that stage."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from preprocessing.detector.detector import Detector
from preprocessing.detector.network import Input, Regions
from preprocessing.detector.visual_genome import build_vg_network, file_shapes
from preprocessing.detector.visual_genome_regions import VgDetection, clipped, decoded, shifted_anchors
from tests.preprocessing.detector.vg_weights import FULL, GOLDEN, KEYS, golden_state

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason="the original detector's outputs (shared/golden) are not beside the repository")


@pytest.fixture(scope="module")
def detection() -> Iterator[VgDetection]:
    yield VgDetection(FULL, build_vg_network(FULL, golden_state()))
    golden_state.cache_clear()


@pytest.fixture(scope="module")
def data() -> Any:
    return dict(np.load(GOLDEN))


def tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def assert_near(actual: torch.Tensor, wanted: np.ndarray, tolerance: float = 1e-4) -> None:
    """Relative to the largest number of the stage."""
    wanted = wanted.astype(np.float32)
    assert np.abs(actual.detach().numpy() - wanted).max() <= tolerance * np.abs(wanted).max()


def test_names_and_shapes_are_the_published_ones() -> None:
    rows = [line.split("\t") for line in KEYS.read_text().splitlines()]
    published = {name: shape for name, shape, _ in rows if not name.endswith("num_batches_tracked")}
    assert {name: str(shape) for name, shape in file_shapes(FULL).items()} == published


def test_the_picture_becomes_the_network_s_input(detection: VgDetection, data: Any) -> None:
    value = detection.prepare(Image.open(GOLDEN.with_name("frcnn_input.png")), 240, 320)
    assert value.size == tuple(data["resized_hw"])
    assert_near(value.pixels, data["image_chw"])


@torch.inference_mode()
def test_backbone(detection: VgDetection, data: Any) -> None:
    assert_near(detection.network.backbone(tensor(data["image_chw"])[None])[0], data["res4"])


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of their boxes that we have too, within 0.05 px."""
    return float((np.abs(ours[:, None] - theirs[None]).max(axis=2).min(axis=0) < 0.05).mean())


@torch.inference_mode()
def test_proposals(detection: VgDetection, data: Any) -> None:
    value = Input(tensor(data["image_chw"]), (1.0, 1.0))
    boxes = detection.propose([tensor(data["res4"])[None]], [value])[0]
    assert_near(boxes, data["proposals"])


@torch.inference_mode()
def test_proposal_logits(detection: VgDetection, data: Any) -> None:
    """Each stored proposal is some anchor's box, under that anchor's logit."""
    logits, deltas = detection.network.rpn(tensor(data["res4"])[None])
    anchors = shifted_anchors(detection.network.cell_anchors, *data["res4"].shape[1:])
    boxes = clipped(decoded(deltas[0], anchors, detection.dialect), tuple(data["resized_hw"]), detection.dialect)
    distance = (boxes[None] - tensor(data["proposals"])[:, None]).abs().amax(dim=2)
    near = (distance < 0.05) & ((logits - tensor(data["proposal_logits"])[:, None]).abs() <= 1e-4 * np.abs(data["proposal_logits"]).max())
    assert near.any(dim=1).all()


@torch.inference_mode()
def test_region_features(detection: VgDetection, data: Any) -> None:
    assert_near(detection.features(tensor(data["res4"])[None], tensor(data["proposals"])), data["features"])


def found_in(data: Any, detection: VgDetection) -> Regions:
    features = tensor(data["features"])
    return Regions(tensor(data["proposals"]), features, detection.network.class_probs(features))


@torch.inference_mode()
def test_class_probabilities_are_the_original_s_with_the_background_first(detection: VgDetection, data: Any) -> None:
    probs = found_in(data, detection).class_probs.roll(-1, dims=1)
    np.testing.assert_allclose(probs, data["class_prob"].astype(np.float32), rtol=1e-3, atol=1e-6)  # stored as float16


@torch.inference_mode()
def test_attribute_logits(detection: VgDetection, data: Any) -> None:
    found = found_in(data, detection)
    logits = detection.network.attribute_logits(found.features, found.class_probs).roll(-1, dims=1)
    assert_near(logits, data["attribute_logits"], 6e-4)  # stored as float16


@torch.inference_mode()
def test_the_d2_rule_picks_the_same_boxes(detection: VgDetection, data: Any) -> None:
    detector, image = Detector(detection, "golden"), Image.new("RGB", (320, 240))
    found = found_in(data, detection)
    choice = detector.choose(found, image, Input(torch.zeros(3, 240, 320), (1.0, 1.0)), 24, 24, "d2")
    np.testing.assert_allclose(choice.boxes[choice.rows], data["d2_rule_boxes"], atol=0.02)
    np.testing.assert_allclose(found.features[choice.rows], data["d2_rule_features"], rtol=1e-4, atol=1e-5)
    top, label = found.class_probs[choice.rows, 1:].max(dim=1)
    assert label.tolist() == data["d2_rule_class"].tolist()
    np.testing.assert_allclose(top, data["d2_rule_prob"], rtol=1e-3)
    assert detection.attributes(found)[0][choice.rows].tolist() == data["d2_rule_attribute"].tolist()


@torch.inference_mode()
def test_the_caffe_rule_picks_the_same_boxes(detection: VgDetection, data: Any) -> None:
    detector, image = Detector(detection, "golden"), Image.new("RGB", (320, 240))
    found, value = found_in(data, detection), Input(torch.zeros(3, 240, 320), (1.0, 1.0))
    # some proposals pool the very same cells: their features are equal, and which of them wins a tie is left to the sorting algorithm
    twin = (data["features"][:, None] == data["features"][None]).all(axis=2).argmax(axis=1)
    for least, most, name in [(10, 100, "caffe_rule_keep_10_100"), (36, 36, "caffe_rule_keep_36")]:
        choice = detector.choose(found, image, value, least, most, "caffe")
        assert twin[choice.rows].tolist() == twin[data[name]].tolist()
    np.testing.assert_allclose(choice.boxes[choice.rows], data["caffe_rule_boxes"][choice.rows], atol=1e-3)


@torch.inference_mode()
def test_end_to_end_proposals_agree_as_a_set(detection: VgDetection, data: Any) -> None:
    value = detection.prepare(Image.open(GOLDEN.with_name("frcnn_input.png")), 240, 320)
    boxes = detection.propose(detection.maps([value]), [value])[0].numpy()
    assert overlap(boxes, data["proposals"]) >= 44 / 48
