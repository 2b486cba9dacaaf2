"""The page of a step: what it shows is what the loader yields, and the reasons that it gives for masks are the masks'."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megainter.config.reading import load_config
from megainter.config.settings import RunConfig, as_dict
from megainter.data.stream.masking import BERT, OFFICIAL, PAPER, MaskingRecipe, drawn_anchors, mask_regions_of_images
from megainter.data.stream.negatives import write_hard_negatives
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.errors import UsageError
from megainter.tasks.pretraining.sources import Sources, open_sources
from megainter.training.run_folder import environment
from megainter.training.world import alone
from megainter.view.batch_page import BADGE, masking_reasons, mismatches, shown_step, write_batch_page
from tests.synthetic import settings, write_data
from tests.view.test_view import HOSTILE, Tags

STEP = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_data(tmp_path_factory.mktemp("data"))


def config_of(data: tuple[Path, Path], output: Path, **changes: object) -> RunConfig:
    return load_config(None, settings(*data, output, **changes))


@pytest.fixture(scope="module")
def opened(data: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Sources, RunConfig]:
    config = config_of(data, tmp_path_factory.mktemp("run"), data__masking="paper")
    with alone():
        sources = open_sources(config, 0, 1)
    return sources, config


def test_the_step_is_what_the_loader_yields(opened: tuple[Sources, RunConfig]) -> None:
    """Tokens as read, labels, which regions are predicted and which pair is matched, sample by sample of the packed micro-batches."""
    sources, config = opened
    stream, entries = sources.training, list(sources.vocabulary.ids)
    shown = shown_step(stream, sources.vocabulary, config, STEP, None, 100)
    assert len(shown["samples"]) == 16
    yielded = dict[int, dict[str, Any]]()
    for places, batch in zip(stream.places(STEP - 1), stream[STEP - 1], strict=True):
        texts, first, region = batch.inputs.text_lengths.tolist(), 0, 0
        for i, place in enumerate(places.tolist()):
            labels = {
                position - first: entries[label]
                for position, label in zip(batch.msm_positions.tolist(), batch.msm_labels.tolist(), strict=True)
                if first <= position < first + texts[i]
            }
            width = int(batch.inputs.region_lengths[i])
            rows = [position - region - 1 for position in batch.mrm_positions.tolist() if region <= position < region + width]
            read = [entries[token] for token in batch.inputs.input_ids[first : first + texts[i]].tolist()]
            yielded[place] = {"read": read, "labels": labels, "scored": rows, "matched": int(batch.itm_labels[i]) == 0}
            first, region = first + texts[i], region + width
    for place, sample in enumerate(shown["samples"]):
        expected = yielded[place]
        assert [token["read"] for token in sample["tokens"]] == expected["read"]
        assert {i: token["label"] for i, token in enumerate(sample["tokens"]) if token["scored"]} == expected["labels"]
        assert sample["matched"] == expected["matched"]
        masked = sorted(box["place"].row for box in sample["boxes"] if box["kind"])
        assert masked == expected["scored"] if sample["matched"] else expected["scored"] == []
        assert sample["scored"] == len(expected["scored"])
    totals = np.sum([batch.counts() for batch in stream[STEP - 1]], axis=0)
    assert [count for _, count, _, _ in shown["counts"]] == totals.tolist()


@pytest.mark.parametrize("recipe", [PAPER, OFFICIAL, BERT], ids=lambda recipe: recipe.name)
def test_every_mask_has_its_reason(recipe: MaskingRecipe) -> None:
    """Against loops over boxes: an anchor was drawn; any other masked region overlaps the anchor named, by so much, and none more."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 30, (40, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 40, (40, 2))], axis=1).astype(np.float32)
    draws, inclusive = rng.random((2, 40)), 1.0 if recipe.pixel_inclusive else 0.0
    masked, _ = mask_regions_of_images(boxes, np.array([40]), draws, recipe)
    anchors = drawn_anchors(draws, recipe)
    reasons = masking_reasons(boxes, masked, anchors, recipe)
    assert sorted(reasons) == np.flatnonzero(masked).tolist()

    def shared(a: int, b: int) -> float:
        sides = [min(boxes[a][2 + k], boxes[b][2 + k]) - max(boxes[a][k], boxes[b][k]) + inclusive for k in (0, 1)]
        areas = [float(np.prod(boxes[i][2:].astype(float) - boxes[i][:2] + inclusive)) for i in (a, b)]
        both = max(float(sides[0]), 0) * max(float(sides[1]), 0)
        return both / (sum(areas) - both)

    beside = 0
    for row, reason in reasons.items():
        if reason is None:
            assert anchors[row]
            continue
        beside += 1
        assert reason[1] == pytest.approx(max(shared(anchor, row) for anchor in np.flatnonzero(anchors)), rel=1e-5)
        assert shared(reason[0], row) == pytest.approx(reason[1], rel=1e-5)
        assert recipe.iou_threshold is not None
        assert reason[1] >= recipe.iou_threshold
    assert (beside > 0) == (recipe.iou_threshold is not None)


def test_anchors_of_a_step_explain_its_masks(opened: tuple[Sources, RunConfig]) -> None:
    sampler = opened[0].training.sampler
    draws = opened[0].training.draws(STEP)
    samples = sampler.samples(draws, np.arange(len(draws)))
    anchors = sampler.anchors(samples)
    assert anchors.any()
    assert not (anchors & ~samples.masked).any()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_hard_caption_is_called_one(data: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    pairs = read_pairs(data[0], "train")
    others = [np.flatnonzero(pairs.image_numbers != number)[:2].astype(np.int32) for number in pairs.image_numbers]
    parts = [(np.full(len(others), 2, np.int32), np.concatenate(others))]
    write_hard_negatives(tmp_path / "hard.parquet", parts, {"pairs_digest": pairs.digest, "split": "train"})
    config = config_of(data, tmp_path / "run", data__hard_negatives=tmp_path / "hard.parquet", data__hard_negative_share=share)
    with alone():
        sources = open_sources(config, 0, 1)
        shown = shown_step(sources.training, sources.vocabulary, config, 1, None, 100)
    mismatched = [sample for sample in shown["samples"] if not sample["matched"]]
    assert mismatched
    hard = [sample for sample in mismatched if sample["source"] == "hard"]
    assert shown["mismatches"] == mismatches(len(mismatched), len(hard))
    if share == 0:
        assert hard == []
    else:  # all but those whose hard caption reads like their own
        assert len(hard) >= len(mismatched) - 2
        assert {sample["of"] for sample in hard} <= {"image-000", "image-001"}


def test_mismatches_are_told_in_whole_sentences() -> None:
    assert mismatches(0, 0) == "No sample shows a caption that is not its own."
    assert mismatches(1, 1) == "1 sample shows a caption that is not its own, a hard one."
    assert mismatches(1, 0) == "1 sample shows a caption that is not its own, not a hard one."
    assert mismatches(15, 0) == "15 samples show a caption that is not their own; none of these is a hard one."
    assert mismatches(15, 2) == "15 samples show a caption that is not their own; 2 of these are hard ones."


def test_numbers_of_masked_regions_stand_within_the_photo(opened: tuple[Sources, RunConfig]) -> None:
    sources, config = opened
    shown = shown_step(sources.training, sources.vocabulary, config, STEP, None, 100)
    for sample in shown["samples"]:
        assert set(sample["badges"]) == {box["place"].row for box in sample["boxes"] if box["kind"]}
        assert all(0 <= left <= 100 - BADGE and 0 <= top < 100 for left, top in sample["badges"].values())


def test_a_run_is_shown_by_its_own_settings_and_only_read(data: tuple[Path, Path], tmp_path: Path) -> None:
    run, from_recipe = tmp_path / "run", tmp_path / "recipe.html"
    (run / "checkpoints").mkdir(parents=True)
    config = config_of(data, run)
    (run / "config.json").write_text(json.dumps(as_dict(config) | {"digests": {}, "asked": {}, "detector": None}))
    before = sorted(run.rglob("*"))
    page = write_batch_page(tmp_path / "page.html", "t", config=None, run=run, step=2, count=5).read_text()
    assert sorted(run.rglob("*")) == before
    assert page == write_batch_page(from_recipe, "t", config=config, run=None, step=2, count=5).read_text()
    assert len(Tags(page).of("article")) == 5
    assert "step 2 of seed 7" in page
    assert 'Masks: "' in page
    assert "(data.masking)" in page
    assert not re.findall(r"\b1 (?:tokens|regions|pairs|samples|masked regions)\b", re.sub("<[^>]+>", "", page))
    assert "the run's last step is" not in page
    later = write_batch_page(tmp_path / "later.html", "t", config=None, run=run, step=config.training.steps + 1, count=5).read_text()
    assert f"the run&#39;s last step is {config.training.steps}" in later


def test_a_run_is_shown_from_another_folder_than_it_was_begun_in(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are those that were typed there."""
    began = data[0].parent
    monkeypatch.chdir(began)
    config = config_of((Path(data[0].name), Path(data[1].name)), tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps(as_dict(config) | {"digests": {}, "asked": {}, "detector": None}))
    (tmp_path / "run" / "environment.json").write_text(json.dumps(environment()))
    there = write_batch_page(tmp_path / "there.html", "t", config=None, run=tmp_path / "run", step=2, count=5).read_text()
    monkeypatch.chdir(tmp_path)
    assert write_batch_page(tmp_path / "here.html", "t", config=None, run=tmp_path / "run", step=2, count=5).read_text() == there
    (tmp_path / "run" / "environment.json").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        write_batch_page(tmp_path / "here.html", "t", config=None, run=tmp_path / "run", step=2, count=5)


def hostile_pairs(folder: Path) -> tuple[Path, Path, Path]:
    """Pairs with hostile captions, their store, and the folder of their images."""
    made, store = write_data(folder / "made")
    (folder / "images").mkdir()
    pairs = read_pairs(made)
    rows = [
        Pair(pairs.pair_id(row), pairs.image_id(row), f"{pairs.image_id(row)}.jpg", HOSTILE + pairs.caption(row), "train")
        for row in range(len(pairs))
    ]
    write_pairs(folder / "pairs.parquet", rows)
    for image_id in pairs.image_ids:
        Image.new("RGB", (100, 100)).save(folder / "images" / f"{image_id}.jpg")
    return folder / "pairs.parquet", store, folder / "images"


def test_photos_are_shown_and_other_peoples_texts_are_inert(tmp_path: Path) -> None:
    pairs, store, images = hostile_pairs(tmp_path)
    config = config_of((pairs, store), tmp_path / "run")
    page = write_batch_page(tmp_path / "p.html", "<i>t</i>", config=config, run=None, step=1, images=images, count=8).read_text()
    tags = Tags(page)
    assert len(tags.of("img")) == 8
    assert not {"script", "i", "link", "iframe"} & {tag for tag, _ in tags.found}
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))


def test_what_is_no_step_is_one_line(data: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--step is 0"):
        write_batch_page(tmp_path / "p.html", "t", config=config_of(data, tmp_path / "run"), run=None, step=0)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="is no run folder"):
        write_batch_page(tmp_path / "p.html", "t", config=None, run=tmp_path, step=1)
