"""The selection rules at full size against loops over classes and boxes, their order, and their time."""

import time

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from preprocessing.detector.photos import PhotoDetection
from preprocessing.detector.selection import confidence_after_nms, pairwise_iou, select_caffe, select_d2, select_objects
from preprocessing.detector.torchvision_models import TorchvisionDetection
from preprocessing.detector.visual_genome_regions import VgDetection


def regions(seed: int, spread: float, sharpness: float = 3.0, count: int = 300) -> tuple[Tensor, Tensor]:
    """Boxes [R,4] closer together the smaller ``spread`` is, and probabilities of 1,600 classes and the background [R,1601]."""
    rng = np.random.default_rng(seed)
    corners = rng.random((count, 2)) * spread
    boxes = np.concatenate([corners, corners + 40 + rng.random((count, 2)) * 200], axis=1)
    logits = torch.from_numpy(rng.standard_normal((count, 1601)) * sharpness)
    return torch.from_numpy(boxes).float(), logits.float().softmax(dim=1)


def looped(boxes: Tensor, probs: Tensor, pixel: float) -> np.ndarray:
    """bottom-up-attention's loop: NMS class by class, boxes in the order of a reversed argsort."""
    overlaps = (pairwise_iou(boxes.double(), pixel) > 0.3).numpy()
    confidence = np.zeros(len(boxes))
    for column in probs.numpy().T[1:]:
        silenced = np.zeros(len(boxes), bool)
        for row in np.argsort(column, kind="stable")[::-1]:
            if not silenced[row]:
                confidence[row] = max(confidence[row], column[row])
                silenced |= overlaps[row]
    return confidence


@pytest.mark.parametrize(("seed", "spread"), [(0, 500.0), (1, 150.0), (2, 20.0)])
def test_all_classes_at_once_are_the_loop_over_classes(seed: int, spread: float) -> None:
    boxes, probs = regions(seed, spread)
    np.testing.assert_array_equal(confidence_after_nms(boxes, probs, 1.0), looped(boxes, probs, 1.0))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 130])
def test_any_number_of_boxes_with_equal_probabilities_among_them(count: int) -> None:
    boxes, probs = regions(3, 100.0, count=count)
    probs = (probs * 64).round() / 64  # many ties, and zeros
    np.testing.assert_array_equal(confidence_after_nms(boxes, probs, 1.0), looped(boxes, probs, 1.0))


def test_1600_classes_of_300_boxes_take_under_50_ms_of_one_core() -> None:
    boxes, probs = regions(0, 500.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(7):
            start = time.process_time()
            select_caffe(boxes, probs, 36, 36, pixel=1.0)
            seconds.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 0.05


def test_the_caffe_rule_s_order_depends_on_its_branch() -> None:
    boxes, probs = regions(4, 700.0, sharpness=4.0)
    confidence = looped(boxes, probs, 1.0)
    passing = np.flatnonzero(confidence >= 0.2)
    ranked = np.argsort(confidence, kind="stable")[::-1]
    assert 20 < len(passing) < 250
    assert select_caffe(boxes, probs, 10, 300, 1.0).tolist() == passing.tolist()
    assert select_caffe(boxes, probs, 10, 15, 1.0).tolist() == ranked[:15].tolist()
    assert select_caffe(boxes, probs, 280, 300, 1.0).tolist() == ranked[:280].tolist()
    assert select_caffe(boxes, probs, 36, 36, 1.0).tolist() == ranked[:36].tolist()


def test_fewer_boxes_than_wanted_are_all_kept() -> None:
    boxes, probs = regions(5, 100.0, count=7)
    assert sorted(select_caffe(boxes, probs, 36, 36, 1.0).tolist()) == list(range(7))


def test_a_box_counts_its_last_pixel_only_where_the_rule_says() -> None:
    boxes = torch.tensor([[0.0, 0, 3, 3], [0, 2, 3, 5]])  # IoU 1/5 as it stands, 2/6 with the last pixel inside
    probs = torch.tensor([[0.2, 0.8], [0.3, 0.7]])
    assert confidence_after_nms(boxes, probs, 0.0).tolist() == pytest.approx([0.8, 0.7])
    assert confidence_after_nms(boxes, probs, 1.0).tolist() == pytest.approx([0.8, 0.0])


@pytest.mark.parametrize("least", [10, 36, 100, 299])
def test_the_d2_rule_takes_the_first_threshold_that_leaves_enough(least: int) -> None:
    boxes, probs = regions(6, 60.0)
    top = probs[:, 1:].max(dim=1).values
    kept = [nms(boxes, top, threshold) for threshold in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)]
    wanted = next((rows for rows in kept if len(rows) >= least), kept[-1])
    assert select_d2(boxes, top, least, 300).tolist() == wanted.tolist()


def test_objectness_keeps_what_its_detector_calls_something() -> None:
    background = torch.tensor([0.95, 0.85, 0.4, 0.05])
    probs = torch.stack([background, 1 - background], dim=1)
    assert select_objects(probs, 1, 4).tolist() == [3, 2, 1], "from 0.1 where a detector does not say otherwise"
    assert select_objects(probs, 1, 4, least=0.9).tolist() == [3]
    assert select_objects(probs, 2, 2).tolist() == [3, 2]
    kinds = (PhotoDetection, TorchvisionDetection, VgDetection)
    assert [kind.object_from for kind in kinds] == [0.9, 0.1, 0.1]
