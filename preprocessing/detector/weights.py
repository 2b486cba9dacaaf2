"""Weights files of detectors, recognised by their content and read without running anything that is in them."""

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megainter.errors import DamagedError, UsageError
from megainter.files import followed
from megainter.weights import locate
from preprocessing.detector import photos
from preprocessing.detector.network import BACKGROUND
from preprocessing.detector.photos import PhotoConfig
from preprocessing.detector.restricted_pickle import load_restricted
from preprocessing.detector.torchvision_models import FORMAT, TORCHVISION_MODELS, DetectorConfig, build_model
from preprocessing.detector.visual_genome import ANCHORS, PREDICTOR, RPN, STAGES, VgConfig, file_shapes

VG_FORMAT = "megainter-vg-detector-1"
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number with which torch.save began before zip files
VG_CLASSES, VG_ATTRIBUTES = 1600, 400
RESNETS = ((3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3))  # blocks per stage of 50, 101 and 152 layers
VG_MARKS = ("backbone.stem.", "backbone.res", "roi_heads.res5.", "proposal_generator.")
TORCHVISION_MARKS = ("backbone.body.", "backbone.fpn.", "rpn.head.")
MILVLG_NAMES = {"cls_embed.": "cls_embedding.", "attr_linear1.": "fc_attr.", "attr_linear2.": "attr_score."}
OLDER_TORCHVISION = (  # names before torchvision 0.13
    (re.compile(r"^(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"^(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
)
COCO_IDS_UNUSED = "N/A"

AnyConfig = DetectorConfig | VgConfig | PhotoConfig


@dataclass(frozen=True)
class Weights:
    """A detector's tensors under the names its network has in files, and what they mean."""

    origin: str  # in words
    config: AnyConfig
    state: dict[str, Tensor]
    left_over: tuple[str, ...] = field(default=())  # entries of the file that are no weights of the detector

    @property
    def fingerprint(self) -> str:
        """16 hex digits of SHA-256 over the configuration and all weights: what a feature store remembers of its detector."""
        return fingerprint_of(self.config.to_json(), self.state)


def fingerprint_of(config: str, state: Mapping[str, Tensor]) -> str:
    """``Weights.fingerprint`` of a configuration as it stands in a file."""
    digest = hashlib.sha256(config.encode())
    for name in sorted(state):
        value = state[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_weights(path: Path, class_names: Path | None = None) -> Weights:
    """The detector in a file: one of ours, a Visual Genome detector of bottom-up-attention's family, or torchvision's Faster R-CNN.

    ``path`` may also be a name (``megainter.weights.locate``), where there is no file of that name.

    Files may be safetensors, torch checkpoints, or pickled dictionaries of numpy arrays. ``class_names`` is a text file with one name per
    line, background left out, for files that hold none (default: ``objects_vocab.txt`` beside the weights, else "class 1", ...).

    Raises ``UsageError`` where the file is none of these or asks for code to be run, ``DamagedError`` where it is cut off, or tensors are
    missing, unexpected, misshapen or not finite; and as ``locate``.
    """
    path = locate(path, "detector").path
    header, content = _read_file(path)
    if header.get("format") in (FORMAT, VG_FORMAT, photos.FORMAT) and "config" in header:
        return _ours(path, header, content)
    state, rest = _tensors(content)
    if _marked(state, VG_MARKS):
        return _visual_genome(path, state, rest, class_names)
    if _marked(state, TORCHVISION_MARKS):
        return _torchvision(path, state, rest, class_names)
    raise UsageError(
        f"{path} holds no detector known here (its header says format {header.get('format')!r}; {len(state)} tensors, first "
        f"{sorted(state)[:3]}): give a Visual Genome Faster R-CNN (bottom-up-attention's ResNet-101), torchvision's "
        "fasterrcnn_resnet50_fpn or _v2, or a detector trained here"
    )


def _marked(state: Mapping[str, Tensor], marks: tuple[str, ...]) -> bool:
    return any(name.startswith(marks) for name in state)


# --- files ---------------------------------------------------------------------------------------------------------------------------


def _read_file(path: Path) -> tuple[dict[str, str], Any]:
    """The header of a safetensors file, else {}, and the content."""
    with open(followed(path), "rb") as file:
        start = file.read(64)
    _refuse_other_kinds(path, start)
    if start.startswith(b"PK\x03\x04") or start.startswith(TORCH_LEGACY):
        return {}, _read_torch(path)
    if start[:1] == b"\x80" and start[8:9] != b"{":
        with open(path, "rb") as file:
            return {}, load_restricted(file, where=path)
    return _read_safetensors(path)


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    """``UsageError`` for a file that was never weights, so that only torn weights count as damaged."""
    if start.startswith(b"PK\x03\x04"):
        other = zipfile.is_zipfile(path) and not any(name.endswith("data.pkl") for name in _names_in_zip(path))
    else:
        other = len(start) > 8 and start[:1] != b"\x80" and start[8:9] != b"{"  # a safetensors header begins there
    if other:
        raise UsageError(f"{path} is no weights file; give safetensors, a torch checkpoint, or a pickled dictionary of numpy arrays")


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise DamagedError(f"{path} is not a whole torch file: {error}") from None


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)|function ([\w.]+)", str(error))
        what = next((name for name in asked.groups() if name), "") if asked else ""
        raise UsageError(f"{path} is refused: its pickle asks for {what or 'more'} than tensors; nothing of it was run") from None
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise DamagedError(f"{path} is not a whole torch file: {' '.join(str(error).split())[:200]}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a whole safetensors file, nor any other kind of weights file: {error}") from None


def _tensors(content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state dict, bare or under "model" or "state_dict", and the names of all else."""
    rest: list[str] = []
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            rest += [str(name) for name in content if name != wrapper]
            content = content[wrapper]
    state: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided:
            state[name] = value.detach()
        elif isinstance(name, str) and isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            state[name] = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
        else:
            rest.append(str(name))
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state, rest


# --- what they are ---------------------------------------------------------------------------------------------------------------------


def _ours(path: Path, header: dict[str, str], state: dict[str, Tensor]) -> Weights:
    """A file of ``save_detector``, stored in any float type."""
    try:
        config, origin = _our_config(header)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: the detector's configuration in its header cannot be read: {error!r:.200}") from None
    _check_state(path, state, expected_shapes(config))
    return Weights(origin, config, state)


def _our_config(header: dict[str, str]) -> tuple[AnyConfig, str]:
    """The configuration in a file's header, and what it is of, in words."""
    if header["format"] == FORMAT:
        ours = DetectorConfig.from_json(header["config"])
        return ours, f"a detector of this project (backbone {ours.backbone})"
    if header["format"] == photos.FORMAT:
        return PhotoConfig.from_json(header["config"]), "the detector for photos (NanoDet)"
    return VgConfig.from_json(header["config"]), "a Visual Genome detector of this project"


def expected_shapes(config: AnyConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file with this configuration holds."""
    if isinstance(config, VgConfig):
        return file_shapes(config)
    if isinstance(config, PhotoConfig):
        return photos.file_shapes(config)
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in build_model(config).state_dict().items()}


def _visual_genome(path: Path, state: dict[str, Tensor], rest: list[str], names: Path | None) -> Weights:
    """Hugging Face's, airsplay's and MILVLG's files. Sizes are read off the tensors: networks fine-tuned to other classes load too."""
    renamed = {name: next((name.replace(a, b) for a, b in MILVLG_NAMES.items() if a in name), name) for name in state}
    milvlg = any(old != new for old, new in renamed.items())
    state, counters = _without_counters({renamed[name]: value for name, value in state.items()})
    classes = _rows(state, f"{PREDICTOR}.cls_score.weight", VG_CLASSES + 1)
    attributes = any(f"{PREDICTOR}.{head}" in name for head in ("cls_embedding", "fc_attr", "attr_score") for name in state)
    count = _rows(state, f"{PREDICTOR}.attr_score.weight", VG_ATTRIBUTES + 1) - 1 if attributes else 0
    anchors = _rows(state, ANCHORS, 12)
    scores = _rows(state, f"{RPN}.objectness_logits.weight", 2 * anchors if milvlg else anchors)
    boxes = _rows(state, f"{PREDICTOR}.bbox_pred.weight", 0)
    blocks = next(depth for depth in RESNETS if depth[2] > _last_block(state, STAGES[2]) or depth is RESNETS[-1])
    config = VgConfig(
        (BACKGROUND, *_names(path, names, classes - 1, "class", "objects_vocab.txt")),
        _names(path, None, count, "attribute", "attributes_vocab.txt") if attributes else (),
        "caffe" if (boxes == 4 * classes if boxes else scores == 2 * anchors) else "d2",
        blocks=blocks,
        width=_rows(state, "backbone.stem.conv1.weight", 64),
        anchors=anchors,
    )
    _check_state(path, state, file_shapes(config))
    origin = f"a Visual Genome Faster R-CNN, {sum(blocks) * 3 + 2} layers, {config.dialect} dialect{', names as in MILVLG' * milvlg}"
    return Weights(origin, config, state, (*rest, *counters))


def _rows(state: Mapping[str, Tensor], name: str, otherwise: int) -> int:
    return len(state[name]) if name in state and state[name].dim() else otherwise


def _last_block(state: Mapping[str, Tensor], stage: str) -> int:
    numbers = (name.removeprefix(f"{stage}.").split(".")[0] for name in state if name.startswith(f"{stage}."))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def _torchvision(path: Path, state: dict[str, Tensor], rest: list[str], names: Path | None) -> Weights:
    """torchvision's Faster R-CNN with 91 COCO classes, or fine-tuned to others."""
    frozen = not any(name.endswith("num_batches_tracked") for name in state)
    state, counters = _without_counters({_newer(name): value for name, value in state.items()})
    second = any(name.startswith(("roi_heads.box_head.0.", "rpn.head.conv.1.")) for name in state)
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is None or scores.dim() != 2 or len(scores) < 2:
        raise DamagedError(f"{path} is a Faster R-CNN of torchvision's, but roi_heads.box_predictor.cls_score.weight is missing")
    name = list(TORCHVISION_MODELS)[second]
    config = DetectorConfig(
        class_names=_coco_names()
        if len(scores) == 91 and names is None
        else (BACKGROUND, *_names(path, names, len(scores) - 1, "class", "")),
        backbone=name,
        feature_size=scores.shape[1],
        min_size=800,
        max_size=1333,
        proposals=1000,
        antialias=False,
        norm_epsilon=0.0 if frozen and not second else 1e-5,
    )
    expected = {key: shape for key, shape in expected_shapes(config).items() if not key.endswith("num_batches_tracked")}
    _check_state(path, state, expected)
    for key in expected_shapes(config).keys() - expected.keys():
        state[key] = torch.tensor(0)
    return Weights(f"torchvision's {name}, {len(scores)} classes", config, state, (*rest, *counters))


def _newer(name: str) -> str:
    for pattern, replacement in OLDER_TORCHVISION:
        name = pattern.sub(replacement, name)
    return name


def _coco_names() -> tuple[str, ...]:
    """torchvision's 91; ids that COCO never used are numbered so that names are distinct."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(f"{name} {row}" if name == COCO_IDS_UNUSED else name for row, name in enumerate(names))


def _without_counters(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors other than the normalisation layers' step counts, which matter in training only; and the names of those."""
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    return {name: value for name, value in state.items() if name not in set(counters)}, counters


def _names(path: Path, names: Path | None, count: int, word: str, beside: str) -> tuple[str, ...]:
    """``count`` names: the lines of ``names``, or of the file called ``beside`` next to the weights, or numbers. Of synonyms the first."""
    if names is None and not (beside and (path.parent / beside).is_file()):
        return tuple(f"{word} {number}" for number in range(1, count + 1))
    source = names or followed(path.parent / beside)
    try:
        lines = source.read_text(encoding="utf-8").strip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"names file {source} cannot be read: {error}") from None
    firsts = tuple(line.split(",")[0].strip() for line in lines)
    if len(firsts) != count or len(set(firsts)) != count or BACKGROUND in firsts:
        raise UsageError(f"names file {source} has {len(firsts)} lines, {len(set(firsts))} distinct; {count} distinct names are needed")
    return firsts


def _check_state(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shared = [name for name in wanted if name in state]
    shapes = [f"{name} {tuple(state[name].shape)} for {wanted[name]}" for name in shared if tuple(state[name].shape) != wanted[name]]
    numbers = [name for name in shared if state[name].is_floating_point() and not state[name].isfinite().all()]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes), ("not finite", numbers)]
    text = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}{', ...' * (len(names) > 5)}" for what, names in problems if names)
    if text:
        raise DamagedError(f"{path} does not hold what its network needs: tensors {text}")
