"""The page of a pretraining step: its samples as the loader makes them, what is masked in them and why, and what each loss scores."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megainter.config.settings import RunConfig
from megainter.data.feature_store.record import RegionRecord
from megainter.data.integers import Int64s
from megainter.data.stream.masking import MaskingRecipe, overlaps
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.files import require_page_place
from megainter.tasks.pretraining.batches import PretrainBatch, PretrainStream
from megainter.tasks.pretraining.sampling import Sampler, Samples
from megainter.tasks.pretraining.sources import open_sources
from megainter.tasks.pretraining.starting import with_start
from megainter.tasks.replaying import settings_of
from megainter.training.loop import steps_of
from megainter.training.replay import without_output
from megainter.training.world import alone
from megainter.view.pages import counted, plain, write_template
from megainter.view.pictures import RegionBox, badge_places, image_files, region_boxes, smallest_last, thumbnail

PHOTO = 420  # pixels of a photo's longer side
BADGE = 8.0  # percent of a photo's width that a region's number takes, photos being small here
MASK, OTHER, SAME = "mask", "other", "same"  # what stands in the place of a masked token
SOURCES = {"own": "its own caption", "any": "a caption of another image", "hard": "a hard caption: one that reads alike", "step": ""}
SOURCES["step"] = "another caption of this step, which the model chooses while it trains"


def write_batch_page(
    output: Path, title: str, *, config: RunConfig | None, run: Path | None, step: int, images: Path | None = None, count: int = 24
) -> Path:
    """Write the page of ``step`` (from 1) of a run, or of what ``config`` would begin, to ``output`` and return it.

    Its first ``count`` samples are shown, with their photos where the folder ``images`` is given. The run folder is only read.
    ``UsageError`` for a run of another task, and as opening its data raises.
    """
    require_page_place(output, "--output")
    if step < 1 or count < 1:
        raise UsageError(f"--step is {step} and --count {count}; give at least 1")
    with tempfile.TemporaryDirectory() as folder, alone() as world:
        config = _settings(config, run, Path(folder))
        sources = open_sources(config, world.rank, world.size)
        values = shown_step(sources.training, sources.vocabulary, config, step, images, count)
        if step > (last := steps_of(config, sources.samples)):
            values["facts"] += f"; the run's last step is {last:,}"
        write_template(output, "batch.html", {"title": plain(title)} | values)
    return output


def _settings(config: RunConfig | None, run: Path | None, folder: Path) -> RunConfig:
    """The settings of the run, or those given, which write what they make into ``folder``."""
    if run is None:
        assert config is not None
        return with_start(dataclasses.replace(config, output=folder))
    found, _ = settings_of(run)
    if not isinstance(found, RunConfig):
        raise UsageError(f"{run} is a run of another task; give a run of `megainter pretrain`")
    settings = without_output(found, folder, run)
    assert isinstance(settings, RunConfig)
    return with_start(settings)


def shown_step(
    stream: PretrainStream, vocabulary: Vocabulary, config: RunConfig, step: int, images: Path | None, count: int
) -> dict[str, Any]:
    """What the template shows of a step, counted from 1."""
    sampler, draws = stream.sampler, stream.draws(step - 1)
    places = np.arange(min(count, len(draws)), dtype=np.int64)
    samples, batch = sampler.samples(draws, places), stream.batch(draws, places)
    whole = stream.batch(draws, np.arange(len(draws), dtype=np.int64)) if len(places) < len(draws) else batch
    training = config.training
    losses = (
        ("masked segments", "token", training.msm_weight), ("masked regions", "region", training.mrm_weight),
        ("matching", "pair", training.itm_weight), ("contrast", "pair", training.itc_weight),
    )  # fmt: skip
    epochs = sorted({int(epoch) for epoch in draws.epochs})
    some = f"the first {len(places):,} shown" if len(places) < len(draws) else "all shown"
    return {
        "facts": f"step {step:,} of seed {config.training.seed}, epoch{'s' * (len(epochs) > 1)} {' and '.join(map(str, epochs))}: "
        f"{counted(len(draws), 'sample')}, {some}",
        "recipe": config.data.masking,
        "counts": [(name, count, what, weight) for (name, what, weight), count in zip(losses, whole.counts(), strict=False)],
        "mismatches": mismatches(int((draws.itm_labels == 1).sum()), int(sampler.drawn_hard(draws).sum())),
        "samples": _samples(sampler, samples, batch, vocabulary, _photos(config, sampler, samples, images)),
    }


def mismatches(count: int, hard: int) -> str:
    """How many samples of a step show a caption of another image, and how many of these captions are hard ones, in a sentence."""
    if count == 0:
        return "No sample shows a caption that is not its own."
    if count == 1:
        return f"1 sample shows a caption that is not its own, {'' if hard else 'not '}a hard one."
    told = {0: "none of these is a hard one", 1: "1 of these is a hard one"}.get(hard, f"{hard:,} of these are hard ones")
    return f"{count:,} samples show a caption that is not their own; {told}."


def _photos(config: RunConfig, sampler: Sampler, samples: Samples, images: Path | None) -> list[str | None]:
    """The samples' pictures, None each where there is no folder of images."""
    if images is None:
        return [None] * len(samples)
    ids = [sampler.pairs.image_id(row) for row in samples.draws.rows.tolist()]
    table = pq.read_table(config.data.pairs, columns=["image_id", "image"], filters=[("image_id", "in", ids)])
    files = image_files(table, ids, images, "this step")
    return [thumbnail(files[image_id], PHOTO) for image_id in ids]


def _samples(
    sampler: Sampler, samples: Samples, batch: PretrainBatch, vocabulary: Vocabulary, photos: list[str | None]
) -> list[dict[str, Any]]:
    """Every sample for itself: rows of the packed batch that the losses score, as places in the sample."""
    entries, pairs = {number: entry for entry, number in vocabulary.ids.items()}, sampler.pairs
    spoken = _by_sample(batch.msm_positions.numpy(), samples.text_lengths)
    scored = _by_sample(batch.mrm_positions.numpy(), samples.regions.counts + 1)
    anchors = np.split(sampler.anchors(samples), np.cumsum(samples.regions.counts)[:-1])
    hard, in_step = sampler.drawn_hard(samples.draws), sampler.drawn_in_step(samples.draws)
    names = tuple(plain(name) for name in samples.regions.schema.class_names)
    found = []
    for i, sample in enumerate(samples):
        source = "own" if sample.itm_label == 0 else "step" if in_step[i] else "hard" if hard[i] else "any"
        record = sampler.store[pairs.image_id(sample.row)]
        labels = dict(zip(sample.msm_positions.tolist(), sample.msm_labels.tolist(), strict=True))
        reasons = masking_reasons(sample.boxes, sample.masked, anchors[i], sampler.recipe)
        boxes = _boxes(record, names, reasons, sample.masked, sample.zeroed)
        numbered = [box["place"] for box in boxes if box["kind"]]
        shown = {
            "id": plain(pairs.image_id(sample.row)), "epoch": sample.epoch, "n": sample.n, "picture": photos[i],
            "ratio": f"{sample.width} / {sample.height}", "matched": sample.itm_label == 0, "source": source, "told": SOURCES[source],
            "own": plain(pairs.caption(sample.row)), "of": plain(pairs.image_id(sample.caption_row)),
            "tokens": [_token(place, token, labels, spoken[i], entries, vocabulary) for place, token in enumerate(sample.ids.tolist())],
            "spoken": len(spoken[i]), "scored": len(scored[i]), "masked": int(sample.masked.sum()),
            "boxes": boxes, "badges": badge_places(numbered, sample.width / sample.height, BADGE),
        }  # fmt: skip
        found.append(shown)
    return found


def _by_sample(positions: Int64s, lengths: Int64s) -> list[set[int]]:
    """Rows of a packed tensor as places in the sample that each belongs to."""
    ends = np.cumsum(lengths)
    owners = np.searchsorted(ends, positions, side="right")
    return [set((positions[owners == i] - (ends[i] - lengths[i])).tolist()) for i in range(len(lengths))]


def masking_reasons(
    boxes: np.ndarray, masked: np.ndarray, anchors: np.ndarray, recipe: MaskingRecipe
) -> dict[int, tuple[int, float] | None]:
    """Why each masked region is: None for an anchor, which was drawn; else the anchor that it overlaps most, and by how much."""
    drawn, reasons = np.flatnonzero(anchors), dict[int, tuple[int, float] | None]()
    shared = overlaps(boxes[drawn], boxes, 1.0 if recipe.pixel_inclusive else 0.0)
    for row in np.flatnonzero(masked).tolist():
        best = int(shared[:, row].argmax())
        reasons[row] = None if anchors[row] else (int(drawn[best]), float(shared[best, row]))
    return reasons


def _token(
    place: int, token: int, labels: dict[int, int], spoken: set[int], entries: dict[int, str], vocabulary: Vocabulary
) -> dict[str, Any]:
    """What the model reads at a place of the caption, and where it is masked what it must say there."""
    if place not in labels:
        return {"read": plain(entries[token]), "kind": "", "label": "", "scored": False}
    kind = MASK if token == vocabulary.facts.mask_id else SAME if token == labels[place] else OTHER
    return {"read": plain(entries[token]), "kind": kind, "label": plain(entries[labels[place]]), "scored": place in spoken}


def _boxes(
    record: RegionRecord, names: tuple[str, ...], reasons: dict[int, tuple[int, float] | None], masked: np.ndarray, zeroed: np.ndarray
) -> list[dict[str, Any]]:
    """Regions to draw, those that are masked on top, with the reason in words."""
    boxes = smallest_last([box for box in region_boxes(record, names) if box.row < len(masked)])
    boxes.sort(key=lambda box: bool(masked[box.row]))
    return [_box(box, reasons, bool(masked[box.row]), bool(zeroed[box.row])) for box in boxes]


def _box(box: RegionBox, reasons: dict[int, tuple[int, float] | None], masked: bool, zeroed: bool) -> dict[str, Any]:
    if not masked:
        return {"place": box, "kind": "", "told": f"{box.row + 1}: {box.label}, in sight"}
    reason, sight = reasons[box.row], "" if zeroed else "; its feature stays in sight"
    if reason is None:
        return {"place": box, "kind": "anchor", "told": f"{box.row + 1}: {box.label}, drawn{sight}"}
    anchor, share = reason
    return {"place": box, "kind": "beside", "told": f"{box.row + 1}: {box.label}, overlaps {anchor + 1} by {share:.2f}{sight}"}
