"""The demo: the whole road once, on composed scenes. Everything is in the output folder."""

import sys
from importlib.resources import files
from pathlib import Path

from megainter.files import read_json
from megainter.stages import Stage, conversion, run_stages, seconds_of, training, verb

TRAINING_SCENES = 3000
HELD_OUT_SCENES = 200
GALLERY = 100
CANDIDATES = 20  # of the first stage, for the second
SEED = 2003_13198  # the paper's number
PROCESSES = 2


def run_demo(output: Path) -> None:
    """Run all stages into ``output``; raises ``MegainterError`` with the exit code of the stage that failed."""
    run_stages(output, stages_of(output))
    _farewell(output)


def stages_of(output: Path) -> list[Stage]:
    """The stages in order, over fixed places inside ``output``."""
    images, pairs, store, run = output / "images", output / "pairs.parquet", output / "regions.store", output / "run"
    model, scores, page = output / "model", output / "retrieval.json", output / "index.html"
    weights = Path(str(files("preprocessing") / "assets" / "demo_detector.safetensors"))
    prepare = ["jsonl", output / "captions.jsonl", "--images", images, "--output", pairs, "--replace"]
    boxes = ["--min-boxes", 3, "--max-boxes", 12, "--workers", PROCESSES]
    extract = ["--images", images, "--output", store, "--weights", weights, *boxes]
    pretrain = ["--config", "demo", "--output", run, "--data.pairs", pairs, "--data.store", store]
    gallery = ["--split", "test", "--images", GALLERY, "--captions-per-image", 1]
    report = ["--output", scores, "--replace"]
    evaluate = ["retrieval", model, "--pairs", pairs, "--store", store, *gallery, "--prefilter", CANDIDATES, *report]
    view = ["--images", images, "--pairs", pairs, "--store", store, "--run", run, "--retrieval", scores, "--title", "megainter demo"]
    return [
        Stage("scenes", "compose scenes from OpenMoji glyphs, with captions", lambda: _compose(output)),
        verb("prepare", "captions to a Parquet manifest", "prepare", *prepare),
        verb("extract", "region features of every scene", "extract", *extract),
        training("pretrain", f"pretrain with DeepSpeed, {PROCESSES} processes, ZeRO stage 2", PROCESSES, "pretrain", *pretrain),
        conversion("export", "export to a Hugging Face folder", model, "zero", run, model),
        verb("evaluate", f"zero-shot retrieval among {GALLERY} held-out scenes", "evaluate", *evaluate),
        verb("view", "a page to look at", "view", *view, "--output", page),
    ]


def _compose(output: Path) -> None:
    from preprocessing.scenes.scenes import write_scenes

    write_scenes(output, {"train": TRAINING_SCENES, "val": HELD_OUT_SCENES, "test": GALLERY}, seed=SEED)


def _farewell(output: Path) -> None:
    """What was reached, and what to type next."""
    recall = read_json(output / "retrieval.json")["both_stages"]["text_to_image"]
    seconds = sum(seconds_of(output).values())
    score = f"{recall['r_at_1']:.0%} find their own first (chance {recall['chance_at_1']:.0%}), {recall['r_at_10']:.0%} among ten"
    print(f"""
Done in {seconds / 60:.1f} minutes of work. Of {recall["queries"]} captions of held-out scenes, {score}.
Everything is in {output}: open {output / "index.html"} in a browser.

To type sentences and see what is found (the page of the last command needs `pip install 'megainter[serve]'`):

    source {Path(sys.prefix) / "bin" / "activate"}
    cd {output}
    megainter index model --store regions.store --pairs pairs.parquet --images images --output scenes.index
    megainter search scenes.index "two parrots and a tractor"
    megainter serve scenes.index

With your own images it is the same road, from captions to that page: README.md, "Your own images".
""")
