"""Does a detector see a known photo as its weights were trained to? Catches swapped colours and classes read in the other dialect's order.

    megainter detector check --weights FILE --image PHOTO [--regions ROWS.tsv]

With reference regions of that photo (its row of an LXMERT TSV file) the detector reads the same boxes, and every way of feeding it is
compared with the reference. Without them trained weights still tell: the right colours make them more certain, and the background is
the class with the largest share of all proposals. Exit code 0: as it should be; 4: something is swapped, and the line says what.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megainter.errors import DamagedError, UsageError
from preprocessing.detector.detector import Detector, load_detector
from preprocessing.detector.network import Regions
from preprocessing.features.formats.entry import BadEntryError
from preprocessing.features.formats.entry import ForeignRegions as Reference
from preprocessing.features.formats.tsv import read_lxmert
from preprocessing.images.decode import load_image

SHIFTS = {0: "as read", 1: "one later: the background is last in the file", -1: "one earlier: the background is first in the file"}
SAME_DETECTOR = 0.7  # mean cosine of features; below it the reference comes from other weights


@dataclass(frozen=True)
class Finding:
    """How well each way of feeding the detector fits, higher is better. ``colours``: as fed, and swapped; ``classes`` by ``SHIFTS``."""

    what: tuple[str, str]  # is measured for colours and for classes
    colours: tuple[float, float]
    classes: dict[int, float]
    compared: bool  # with a reference


def examine(detector: Detector, image: Image.Image, reference: Reference | None = None) -> Finding:
    """Feed the photo in its colours and in swapped ones, and look at the classes in either order."""
    swapped = Image.merge("RGB", image.split()[::-1])
    if reference is None:
        found = _seen(detector, image)
        certainties = tuple(float(_certainty(regions)) for regions in (found, _seen(detector, swapped)))
        share = found.class_probs.mean(dim=0)
        classes = {shift: float(share[-shift]) for shift in SHIFTS}
        return Finding(("mean certainty of a region's class", "share of the background"), certainties, classes, False)  # type: ignore[arg-type]
    found = _seen(detector, image, reference.boxes)
    cosines = tuple(_cosine(regions, reference) for regions in (found, _seen(detector, swapped, reference.boxes)))
    best = found if cosines[0] >= cosines[1] else _seen(detector, swapped, reference.boxes)
    ids = torch.from_numpy(np.array(reference.extras["objects_id"])).to(best.class_probs.device)
    classes = {shift: float((best.class_probs.roll(shift, 1)[:, 1:].argmax(dim=1) == ids).float().mean()) for shift in SHIFTS}
    return Finding(("mean cosine with the reference features", "regions of the reference's class"), cosines, classes, True)  # type: ignore[arg-type]


def problems(finding: Finding) -> list[str]:
    """What is wrong, a sentence each; empty where nothing is."""
    found = []
    if finding.compared and max(finding.colours) < SAME_DETECTOR:
        return [f"the reference features are another detector's (cosine {max(finding.colours):.3f} at best)"]
    if finding.colours[1] > finding.colours[0]:
        found.append(f"the colours are swapped (red for blue): {finding.colours[1]:.3f} when swapped back, {finding.colours[0]:.3f} as fed")
    best = max(finding.classes, key=lambda shift: finding.classes[shift])
    if finding.classes[best] > finding.classes[0]:
        found.append(f"the classes belong {SHIFTS[best]} (fits {finding.classes[best]:.3f}, as read {finding.classes[0]:.3f})")
    return found


def facts(finding: Finding) -> dict[str, Any]:
    """A finding and what is wrong, as JSON types."""
    colours = {"measured": finding.what[0], "as_fed": finding.colours[0], "swapped": finding.colours[1]}
    classes = {"measured": finding.what[1], **{f"shifted_{shift}": value for shift, value in finding.classes.items()}}
    return {"colours": colours, "classes": classes, "compared": finding.compared, "problems": problems(finding)}


@torch.inference_mode()
def _seen(detector: Detector, image: Image.Image, boxes: np.ndarray | None = None) -> Regions:
    """What the network says of the given boxes, in the image's pixels, or of its own proposals."""
    inputs = detector.inputs([image])
    if boxes is None:
        return detector.forward(inputs)[0]
    frames = torch.tensor(boxes, device=inputs[0].pixels.device) / inputs[0].pixels.new_tensor(inputs[0].ratio * 2)
    return detector.network.read(detector.network.maps(inputs), inputs, [frames])[0]


def _certainty(found: Regions) -> torch.Tensor:
    return found.class_probs.max(dim=1).values.mean()


def _cosine(found: Regions, reference: Reference) -> float:
    wanted = torch.tensor(reference.features, device=found.features.device)
    return float(torch.nn.functional.cosine_similarity(found.features.float(), wanted.float()).mean())


def read_reference(path: Path, image_id: str, feature_size: int) -> Reference:
    """The photo's row of an LXMERT TSV file; ``UsageError`` where there is none, or one of other features."""
    if not path.is_file():
        raise UsageError(f"reference regions {path} do not exist")
    for entry in read_lxmert(path).entries():
        if entry.image_id == image_id:
            try:
                reference = entry.load()
            except BadEntryError as error:
                raise DamagedError(f"{path}, {entry.where}: {error}") from None
            if reference.features.shape[1] != feature_size:
                raise UsageError(f"{path} has features of {reference.features.shape[1]} numbers, the detector gives {feature_size}")
            return reference
    raise UsageError(f"{path} has no row of the photo {image_id!r} (the file's name without its suffix)")


def check(weights: Path, image: Path, regions: Path | None, device: str) -> Finding:
    """Print how well the detector fits the photo."""
    detector = load_detector(weights, device)
    reference = None if regions is None else read_reference(regions, image.stem, detector.config.feature_size)
    finding = examine(detector, load_image(image), reference)
    print(f"{finding.what[0]}: {finding.colours[0]:.4f} as fed, {finding.colours[1]:.4f} with colours swapped")
    print(f"{finding.what[1]}: " + "; ".join(f"{value:.4f} {SHIFTS[shift]}" for shift, value in finding.classes.items()))
    return finding


def require_right(weights: Path, finding: Finding) -> None:
    """``DamagedError`` naming what is swapped."""
    if found := problems(finding):
        raise DamagedError(f"{weights}: {'; '.join(found)}")
