"""Which of an image's proposals become its regions: the two rules in use for bottom-up-attention features.

"caffe" (bottom-up-attention's generate_tsv; the data of ViLBERT, InterBERT, UNITER): boxes are the proposals as they are.
"d2" (the detectron2 ports; LXMERT): boxes are regressed to the top class, one class-agnostic NMS.
"""

import torch
from torch import Tensor
from torchvision.ops import nms

CAFFE_NMS = 0.3  # IoU above which a box silences a less probable one of the same class
CAFFE_CONFIDENCE = 0.2
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
    """For each box [R], its highest probability among the object classes in whose NMS it survives; 0 where in none.

    ``class_probs`` [R,C] has the background first. All classes are walked at once: step r takes each class's r-th most probable box.
    Of boxes with equal probability the later goes first, as in the released code (a reversed numpy argsort).
    """
    probs = class_probs[:, 1:].double()
    overlaps = pairwise_iou(boxes.double(), pixel) > CAFFE_NMS
    order = probs.argsort(dim=0, stable=True).flip(0)
    columns = torch.arange(probs.shape[1], device=probs.device)
    silenced = torch.zeros_like(probs, dtype=torch.bool)
    confidence = torch.zeros(len(boxes), dtype=torch.float64, device=probs.device)
    for rows in order:
        alive = ~silenced[rows, columns]
        confidence.scatter_reduce_(0, rows, torch.where(alive, probs[rows, columns], 0.0), "amax")
        silenced |= overlaps[:, rows] & alive
    return confidence


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
