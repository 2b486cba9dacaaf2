"""Which of an image's proposals become its regions: the two rules in use for bottom-up-attention features, and a plain one.

"caffe" (bottom-up-attention's generate_tsv; the data of ViLBERT, InterBERT, UNITER): boxes are the proposals as they are.
"d2" (the detectron2 ports; LXMERT): boxes are regressed to the top class, one class-agnostic NMS.
"objectness": what is least likely background, whatever it is.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

CAFFE_NMS = 0.3  # IoU above which a box silences a less probable one of the same class
CAFFE_CONFIDENCE = 0.2
OBJECT = 0.1  # probability of not being background from which the rule "objectness" keeps a region, where a detector does not say otherwise
D2_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def pairwise_iou(boxes: Tensor, pixel: float = 0.0) -> Tensor:
    """IoU of all pairs [R,R] of ``boxes`` [R,4]. ``pixel`` is 1 where the last pixel counts as inside (width = x2 - x1 + 1)."""
    sides = (boxes[:, 2:] - boxes[:, :2] + pixel).clamp(min=0)
    area = sides[:, 0] * sides[:, 1]
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low + pixel).clamp(min=0).prod(dim=2)
    return shared / (area[:, None] + area[None, :] - shared).clamp(min=1e-12)


def confidence_after_nms(boxes: Tensor, class_probs: Tensor, pixel: float = 0.0) -> Tensor:
    """For each box [R], its highest probability among the object classes in whose NMS it survives; 0 where in none. float64, on the CPU.

    ``class_probs`` [R,C] has the background first. All classes are walked at once: step r takes each class's r-th most probable box.
    Of boxes with equal probability the later goes first, as in the released code (a reversed numpy argsort).
    """
    probs = np.ascontiguousarray(class_probs[:, 1:].float().cpu().numpy().T)  # [C-1,R]
    silences = _silenced_by(boxes, pixel)
    silenced = np.zeros((len(probs), silences.shape[1]), np.uint64)
    every = np.arange(len(probs))
    for rows in _rankings(probs):
        bit = silenced[every, rows >> 6] >> (rows & 63).astype(np.uint64)
        alive = np.flatnonzero((bit & np.uint64(1)) == 0)
        silenced[alive] |= silences[rows[alive]]
    survives = np.unpackbits(silenced.view(np.uint8), axis=1, count=len(boxes), bitorder="little") == 0
    return torch.from_numpy(np.where(survives, probs, 0).max(axis=0, initial=0).astype(np.float64))


def _silenced_by(boxes: Tensor, pixel: float) -> np.ndarray:
    """For each box, which others it silences, as bits: uint64 [R, ceil(R / 64)], box r at bit r % 64 of word r // 64."""
    overlaps = (pairwise_iou(boxes.double().cpu(), pixel) > CAFFE_NMS).numpy()
    np.fill_diagonal(overlaps, False)
    bits = np.zeros((len(boxes), -(-len(boxes) // 64) * 64), bool)
    bits[:, : len(boxes)] = overlaps
    return np.packbits(bits, axis=1, bitorder="little").view("<u8").astype(np.uint64)


def _rankings(probs: np.ndarray) -> np.ndarray:
    """Rows of each class by falling probability, int64 [R,C] from ``probs`` float32 [C,R] (none below 0).

    The bits of such numbers rise with them: a number and its row in one integer sort 10 times as fast as an argsort.
    """
    keys = (probs.view(np.uint32).astype(np.uint64) << np.uint64(32)) | np.arange(probs.shape[1], dtype=np.uint64)
    keys.sort(axis=1)
    return np.ascontiguousarray((keys & np.uint64(2**32 - 1)).astype(np.int64).T[::-1])


def select_caffe(boxes: Tensor, class_probs: Tensor, min_boxes: int, max_boxes: int, pixel: float = 0.0) -> Tensor:
    """Rows of the chosen boxes. Confident ones in proposal order; where they are too few or too many, by falling confidence."""
    confidence = confidence_after_nms(boxes, class_probs, pixel)
    keep = torch.where(confidence >= CAFFE_CONFIDENCE)[0]
    if min_boxes <= len(keep) <= max_boxes:
        return keep
    wanted = min_boxes if len(keep) < min_boxes else max_boxes
    return confidence.argsort(stable=True).flip(0)[:wanted]


def select_d2(boxes: Tensor, top_probs: Tensor, min_boxes: int, max_boxes: int) -> Tensor:
    """Rows of the chosen boxes by falling probability: NMS at the lowest threshold that leaves ``min_boxes`` (else the highest).

    ``boxes`` [R,4] are regressed to the top object class, whose probability is ``top_probs`` [R].
    """
    keep = torch.arange(0, device=boxes.device)
    for threshold in D2_THRESHOLDS:
        keep = nms(boxes, top_probs, threshold)
        if len(keep) >= min_boxes:
            break
    return keep[:max_boxes]


def select_objects(class_probs: Tensor, min_boxes: int, max_boxes: int, least: float = OBJECT) -> Tensor:
    """Rows of the chosen boxes by falling probability of not being background: those of ``least`` or more, within the bounds.

    ``class_probs`` [R,C] has the background first.
    """
    objectness = 1 - class_probs[:, 0]
    wanted = int((objectness >= least).sum().clamp(min_boxes, max_boxes))
    return objectness.argsort(descending=True, stable=True)[:wanted]
