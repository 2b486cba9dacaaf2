"""One detector in every format people have it in gives one network; what is wrong, cut off or hostile is refused by name."""

import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2

from megainter.errors import DamagedError, UsageError
from preprocessing.detector import load_detector
from preprocessing.detector.convert import convert_detector
from preprocessing.detector.detector import BACKGROUND
from preprocessing.detector.torchvision_models import to_input
from preprocessing.detector.weights import read_weights
from tests.preprocessing.detector.vg_weights import anchors_of_caffe, as_caffe, small_state

State = dict[str, Tensor]
COUNTER = "backbone.stem.conv1.norm.num_batches_tracked"
PREDICTOR = "roi_heads.box_predictor"


def with_counters(state: State) -> State:
    norms = [name.removesuffix(".weight") for name in state if name.endswith("norm.weight")]
    return OrderedDict({**state, **{f"{norm}.num_batches_tracked": torch.tensor(0) for norm in norms}})


def milvlg(state: State) -> State:
    old = {"cls_embedding.": "cls_embed.", "fc_attr.": "attr_linear1.", "attr_score.": "attr_linear2."}
    return {next((name.replace(a, b) for a, b in old.items() if a in name), name): value for name, value in state.items()}


def pickled(path: Path, content: Any, protocol: int = 2) -> None:
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def arrays(state: State) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in state.items()}


WRITERS = {
    "a torch state dict": lambda path: torch.save(with_counters(small_state()), path),
    "a torch file of before 2020": lambda path: torch.save(with_counters(small_state()), path, _use_new_zipfile_serialization=False),
    "safetensors": lambda path: save_file(small_state(), path, metadata={"format": "pt"}),
    "a pickled model of arrays": lambda path: pickled(path, {"model": arrays(small_state())}),
    "a pickled model, protocol 5": lambda path: pickled(path, {"model": arrays(small_state()), "__author__": "somebody"}, 5),
    "a checkpoint with an iteration": lambda path: torch.save({"model": small_state(), "iteration": 9}, path),
    "saved from several GPUs": lambda path: torch.save({f"module.{k}": v for k, v in small_state().items()}, path),
}


@pytest.mark.parametrize("form", list(WRITERS))
def test_the_same_weights_in_every_form_are_the_same_detector(tmp_path: Path, form: str) -> None:
    path = tmp_path / "any.name"
    WRITERS[form](path)
    weights = read_weights(path)
    assert weights.config.dialect == "d2"  # type: ignore[union-attr]
    for name, value in small_state().items():
        assert torch.equal(weights.state[name], value)
    save_file(small_state(), tmp_path / "first.safetensors")
    assert weights.fingerprint == read_weights(tmp_path / "first.safetensors").fingerprint


def picture(width: int = 120, height: int = 90, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    return Image.fromarray(pixels, "RGB").resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("names", [lambda state: state, milvlg], ids=["detectron2 names", "MILVLG names"])
def test_both_dialects_of_one_detector_say_the_same_of_a_region(tmp_path: Path, names: Any) -> None:
    """Classes, attributes and regressed boxes at one given box do not depend on the dialect that the file is in."""
    save_file(small_state(), tmp_path / "d2.safetensors")
    torch.save({"model": names(as_caffe(small_state()))}, tmp_path / "caffe.pth")
    d2, caffe = load_detector(tmp_path / "d2.safetensors"), load_detector(tmp_path / "caffe.pth")
    assert (d2.config.dialect, caffe.config.dialect) == ("d2", "caffe")
    assert d2.fingerprint != caffe.fingerprint
    box = torch.tensor([[16.0, 10, 90, 80], [0, 0, 120, 90]])
    found = []
    for detector in (d2, caffe):
        inputs = detector.inputs([picture()], 90, 120)
        found.append(detector.network.read(detector.network.maps(inputs), inputs, [box])[0])
    torch.testing.assert_close(found[0].class_probs, found[1].class_probs)
    assert d2.network.attributes(found[0])[0].tolist() == caffe.network.attributes(found[1])[0].tolist()  # type: ignore[attr-defined]
    deltas = [detector.network.network.deltas_of(found[0].features, torch.tensor([0, 3])) for detector in (d2, caffe)]  # type: ignore[attr-defined]
    torch.testing.assert_close(deltas[0] / torch.tensor([10.0, 10, 5, 5]), deltas[1])


def test_anchors_in_the_file_are_used_as_they_stand(tmp_path: Path) -> None:
    anchors = torch.from_numpy(anchors_of_caffe()) + 0.25
    torch.save(as_caffe(small_state(), anchors), tmp_path / "caffe.pth")
    assert torch.equal(load_detector(tmp_path / "caffe.pth").network.network.cell_anchors, anchors)  # type: ignore[attr-defined]


def test_a_file_without_attributes_extracts_and_does_not_describe(tmp_path: Path) -> None:
    heads = ("cls_embedding", "fc_attr", "attr_score")
    state = {name: value for name, value in small_state().items() if not any(head in name for head in heads)}
    pickled(tmp_path / "faster_rcnn.pkl", {"model": arrays(state)})
    detector = load_detector(tmp_path / "faster_rcnn.pkl")
    assert len(detector.extract(picture(), 3, 10)) >= 3
    with pytest.raises(UsageError, match="no attributes"):
        detector.describe(picture(), 3, 10)


def test_class_names_come_from_a_file_given_or_beside_the_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(small_state(), path)
    assert load_detector(path).config.class_names == (BACKGROUND, "class 1", "class 2", "class 3", "class 4")
    (tmp_path / "objects_vocab.txt").write_text("cat,kitty\ndog\ntree\nsky")
    (tmp_path / "attributes_vocab.txt").write_text("red\nwet\nold")
    assert load_detector(path).schema().class_names == (BACKGROUND, "cat", "dog", "tree", "sky")
    assert load_detector(path).config.attribute_names == ("red", "wet", "old")
    (tmp_path / "mine.txt").write_text("a\nb\nc\nd\n")
    assert load_detector(path, class_names=tmp_path / "mine.txt").config.class_names[1:] == ("a", "b", "c", "d")
    (tmp_path / "mine.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match=r"mine.txt has 3 lines, 3 distinct; 4 distinct names are needed"):
        load_detector(path, class_names=tmp_path / "mine.txt")


# --- torchvision -----------------------------------------------------------------------------------------------------------------------

BUILDERS = {"fasterrcnn_resnet50_fpn": fasterrcnn_resnet50_fpn, "fasterrcnn_resnet50_fpn_v2": fasterrcnn_resnet50_fpn_v2}


@pytest.mark.parametrize("name", list(BUILDERS))
def test_torchvision_s_own_networks_say_what_torchvision_says(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = BUILDERS[name](weights=None, weights_backbone=None, num_classes=91, min_size=96, max_size=128).eval()
    torch.save(model.state_dict(), tmp_path / "model.pth")
    detector, image = load_detector(tmp_path / "model.pth"), picture(300, 200)
    assert (detector.config.backbone, detector.config.feature_size, detector.config.class_names[1]) == (name, 1024, "person")
    inputs = detector.inputs([image], 96, 128)
    with torch.inference_mode():
        images, _ = model.transform([to_tensor(image)])
        maps = model.backbone(images.tensors)
        boxes = torch.tensor([[5.0, 5, 60, 70], [0, 0, 127, 84]])
        features = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, [boxes], images.image_sizes))
        probs = model.roi_heads.box_predictor(features)[0].softmax(dim=1)
        found = detector.network.read(detector.network.maps(inputs), inputs, [boxes])[0]
    assert inputs[0].size == tuple(images.image_sizes[0])
    torch.testing.assert_close(found.features, features, rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(found.class_probs, probs, rtol=1e-3, atol=1e-5)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def test_torchvision_resizing_leaves_pixels_out_and_cuts_sizes() -> None:
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    image = picture(330, 170)
    wanted, _ = GeneralizedRCNNTransform(60, 100, [0.0] * 3, [1.0] * 3, size_divisible=1)([to_tensor(image)])
    torch.testing.assert_close(to_input(image, 60, 100, antialias=False), wanted.tensors[0])


def test_names_of_older_torchvision_files_load(tmp_path: Path) -> None:
    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    older = {name.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value for name, value in state.items()}
    older = {(name.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "fpn." in name else name): v for name, v in older.items()}
    assert "backbone.fpn.inner_blocks.0.weight" in older
    torch.save(older, tmp_path / "older.pth")
    weights = read_weights(tmp_path / "older.pth")
    assert weights.config.norm_epsilon == 0.0  # type: ignore[union-attr]  # frozen normalisation, as in torchvision's COCO weights
    assert all(torch.equal(weights.state[name], value) for name, value in state.items())


# --- refusals ----------------------------------------------------------------------------------------------------------------------------


def test_partial_files_are_refused_with_what_is_missing_and_unexpected(tmp_path: Path) -> None:
    state = dict(small_state())
    del state["backbone.res4.3.conv2.norm.running_var"]
    state["extra"] = torch.zeros(1)
    state[f"{PREDICTOR}.fc_attr.bias"] = torch.zeros(7)
    state["backbone.stem.conv1.norm.bias"] = torch.full((8,), torch.nan)
    torch.save(state, tmp_path / "part.pth")
    wanted = r"1 missing: backbone.res4.3.conv2.norm.running_var; 1 unexpected: extra; 1 of another shape: .*fc_attr"
    with pytest.raises(DamagedError, match=wanted + r".*; 1 not finite: .*norm.bias"):
        read_weights(tmp_path / "part.pth")
    torch.save({name: value for name, value in state.items() if name.startswith("backbone")}, tmp_path / "backbone.pth")
    with pytest.raises(DamagedError, match=r"62 missing: .*proposal_generator.anchor_generator.cell_anchors.0, "):
        read_weights(tmp_path / "backbone.pth")


@pytest.mark.parametrize("content", [{"fc.weight": torch.zeros(2)}, {}, [1, 2], {"model": {}}, torch.zeros(3)])
def test_other_networks_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="holds no detector known here"):
        read_weights(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["README.md", "features.npz", "photo.jpg", "boxes.parquet"])
def test_a_file_that_was_never_weights_is_the_wrong_kind(tmp_path: Path, name: str) -> None:
    path, starts = tmp_path / name, {"README.md": b"# A detector\n", "photo.jpg": b"\xff\xd8\xff\xe0\x00\x10JFIF", "boxes.parquet": b"PAR1"}
    np.savez(path, features=np.ones(3)) if name.endswith("npz") else path.write_bytes(starts[name] + bytes(range(100)))
    with pytest.raises(UsageError, match=f"{name} is no weights file; give safetensors"):
        read_weights(path)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.3, 0.999])
@pytest.mark.parametrize("form", list(WRITERS)[:5])
def test_a_file_cut_off_anywhere_is_damaged(tmp_path: Path, form: str, share: float) -> None:
    path = tmp_path / "weights"
    WRITERS[form](path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DamagedError, match="whole"):
        read_weights(path)


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("writer", ["pickle", "torch", "old torch"])
@pytest.mark.parametrize("wrap", [lambda bad: bad, lambda bad: {"model": {**small_state(), "bad": bad}}], ids=["alone", "nested"])
def test_hostile_files_are_refused_and_run_nothing(tmp_path: Path, writer: str, wrap: Any) -> None:
    trace, path = tmp_path / "was-here", tmp_path / "weights.pth"
    content = wrap(Call(open, str(trace), "w"))
    if writer == "pickle":
        pickled(path, content if isinstance(content, Call) else {"model": {"weight": np.zeros(2), "bad": content["model"]["bad"]}})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    trace.unlink(missing_ok=True)
    with pytest.raises(UsageError, match=r"weights.pth is refused: its pickle asks for .*open.* nothing of it was run"):
        read_weights(path)
    assert not trace.exists()


# --- conversion --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["d2", "caffe", "torchvision"])
def test_a_converted_file_is_the_same_detector(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, ours = tmp_path / "foreign.pth", tmp_path / "ours.safetensors"
    if source == "torchvision":
        torch.save(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).state_dict(), foreign)
    else:
        torch.save({"model": with_counters(small_state() if source == "d2" else milvlg(as_caffe(small_state()))), "iteration": 5}, foreign)
    (tmp_path / "names.txt").write_text("a\nb" if source == "torchvision" else "a\nb\nc\nd")
    convert_detector(foreign, ours, tmp_path / "names.txt")
    before, after = read_weights(foreign, tmp_path / "names.txt"), read_weights(ours)
    assert (before.config, before.fingerprint) == (after.config, after.fingerprint)
    assert all(torch.equal(after.state[name], value) for name, value in before.state.items())
    text = capsys.readouterr().out
    assert "left over" in text
    if source != "torchvision":
        assert "iteration" in text
        np.testing.assert_array_equal(load_detector(foreign).extract(picture()).features, load_detector(ours).extract(picture()).features)


def test_a_file_of_ours_that_lost_a_tensor_is_damaged(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "foreign.pth")
    ours = tmp_path / "ours.safetensors"
    convert_detector(tmp_path / "foreign.pth", ours)
    header = {"format": "megainter-vg-detector-1", "config": read_weights(ours).config.to_json()}
    state = load_file(ours)
    state.pop(f"{PREDICTOR}.cls_score.bias")
    save_file(state, ours, metadata=header)
    with pytest.raises(DamagedError, match=r"1 missing: .*cls_score.bias"):
        read_weights(ours)
    save_file(state, ours, metadata={**header, "config": "{}"})
    with pytest.raises(DamagedError, match="configuration"):
        read_weights(ours)


def test_conversion_overwrites_nothing_and_leaves_nothing_half(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UsageError):
        convert_detector(tmp_path / "other.pth", tmp_path / "ours.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pth"]
    with pytest.raises(UsageError, match="exists"):
        convert_detector(tmp_path / "other.pth", tmp_path / "other.pth")


def test_the_command_ends_with_documented_codes(tmp_path: Path) -> None:
    torch.save(small_state(), tmp_path / "good.pth")
    torch.save({name: value for name, value in small_state().items() if "res5" not in name}, tmp_path / "partial.pth")
    pickled(tmp_path / "hostile.pkl", Call(open, str(tmp_path / "was-here"), "w"))
    (tmp_path / "was-here").unlink(missing_ok=True)
    program = "import sys; from megainter.cli import main; main(sys.argv[1:])"
    for name, code, text in [("good.pth", 0, ""), ("partial.pth", 4, "missing: roi_heads.res5"), ("hostile.pkl", 2, "is refused")]:
        command = [sys.executable, "-c", program, "convert", "detector", str(tmp_path / name), str(tmp_path / f"{name}.safetensors")]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (ended.returncode, text in ended.stderr, "Traceback" in ended.stderr) == (code, True, False)
        assert (tmp_path / f"{name}.safetensors").exists() == (code == 0)
    assert not (tmp_path / "was-here").exists()
