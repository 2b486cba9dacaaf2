"""The demo: the whole road once, on composed scenes, each stage the very command a user types.

A finished stage leaves ``stages/NAME.json`` and is not run again; a killed demo goes on where it was. Everything is in the output folder.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from megainter.errors import MegainterError
from megainter.files import read_json, write_json
from megainter.process import WATCH_VARIABLE, folder_lock, free_port

TRAINING_SCENES = 3000
HELD_OUT_SCENES = 200
GALLERY = 100
CANDIDATES = 20  # of the first stage, for the second
SEED = 2003_13198  # the paper's number
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """One stage: what it is for, and how it is run."""

    name: str
    purpose: str
    run: Callable[[], None]


def run_demo(output: Path) -> None:
    """Run all stages into ``output``; raises ``MegainterError`` with the exit code of the stage that failed."""
    output.mkdir(parents=True, exist_ok=True)
    with folder_lock(output):
        stages = stages_of(output)
        for number, stage in enumerate(stages, start=1):
            _run_stage(output, stage, f"[{number}/{len(stages)}] {stage.purpose}")
        _farewell(output)


def stages_of(output: Path) -> list[Stage]:
    """The stages in order, over fixed places inside ``output``."""
    images, pairs, store, run = output / "images", output / "pairs.parquet", output / "regions.store", output / "run"
    model, scores, page = output / "model", output / "retrieval.json", output / "index.html"
    weights = Path(str(files("preprocessing") / "assets" / "demo_detector.safetensors"))
    prepare = ["jsonl", output / "captions.jsonl", "--images", images, "--output", pairs, "--replace"]
    boxes = ["--min-boxes", 3, "--max-boxes", 12, "--workers", PROCESSES]
    extract = ["--images", images, "--output", store, "--weights", weights, *boxes]
    pretrain = ["--module", "megainter.pretrain", "--config", "demo", "--output", run, "--data.pairs", pairs, "--data.store", store]
    gallery = ["--split", "test", "--images", GALLERY, "--captions-per-image", 1]
    evaluate = ["retrieval", model, "--pairs", pairs, "--store", store, *gallery, "--prefilter", CANDIDATES, "--output", scores]
    view = ["--images", images, "--pairs", pairs, "--store", store, "--run", run, "--retrieval", scores, "--title", "megainter demo"]
    return [
        Stage("scenes", "compose scenes from OpenMoji glyphs, with captions", lambda: _compose(output)),
        Stage("prepare", "captions to a Parquet manifest", lambda: _megainter("prepare", *prepare)),
        Stage("extract", "region features of every scene", lambda: _megainter("extract", *extract)),
        Stage("pretrain", f"pretrain with DeepSpeed, {PROCESSES} processes, ZeRO stage 2", lambda: _deepspeed(*pretrain)),
        Stage("export", "export to a Hugging Face folder", lambda: _export(run, model)),
        Stage("evaluate", f"zero-shot retrieval among {GALLERY} held-out scenes", lambda: _megainter("evaluate", *evaluate)),
        Stage("view", "a page to look at", lambda: _megainter("view", *view, "--output", page)),
    ]


def _run_stage(output: Path, stage: Stage, title: str) -> None:
    record = output / "stages" / f"{stage.name}.json"
    if record.exists():
        print(f"{title}: done before, in {read_json(record)['seconds']:.0f} s", flush=True)
        return
    print(f"\n{title}", flush=True)
    start = time.monotonic()
    stage.run()
    record.parent.mkdir(exist_ok=True)
    write_json(record, {"stage": stage.name, "seconds": round(time.monotonic() - start, 1)})


def _compose(output: Path) -> None:
    from preprocessing.scenes.scenes import write_scenes

    write_scenes(output, {"train": TRAINING_SCENES, "val": HELD_OUT_SCENES, "test": GALLERY}, seed=SEED)


def _megainter(*arguments: object) -> None:
    """Run a verb as its own process, after showing the command."""
    _run("megainter", [sys.executable, "-m", "megainter"], arguments)


def _deepspeed(*arguments: object) -> None:
    """Run under DeepSpeed's launcher with local processes, after showing the command."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    _run("deepspeed", launcher, ["--num_gpus", PROCESSES, "--master_port", free_port(), *arguments])


def _run(shown: str, program: list[str], arguments: Iterable[object]) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ {shown} {' '.join(words)}", flush=True)
    environment = os.environ | {WATCH_VARIABLE: str(os.getpid()), "OMP_NUM_THREADS": "1"}
    code = subprocess.run([*program, *words], env=environment, check=False).returncode
    if code:
        raise _failed(shown, words, code)


def _failed(shown: str, words: list[str], code: int) -> MegainterError:
    error = MegainterError(f"`{shown} {words[0]} ...` ended with exit code {code}, see above; the same command goes on where it stopped")
    error.exit_code = code if 0 < code < 128 else 1
    return error


def _export(run: Path, model: Path) -> None:
    if model.exists():
        shutil.rmtree(model)  # of a killed start: without the stage's record it is not known to be this run's
    _megainter("convert", "zero", run, model)


def _farewell(output: Path) -> None:
    """What was reached, and what to type next."""
    recall = read_json(output / "retrieval.json")["both_stages"]["text_to_image"]
    seconds = sum(read_json(path)["seconds"] for path in (output / "stages").glob("*.json"))
    score = f"{recall['r_at_1']:.0%} find their own first (chance {recall['chance_at_1']:.0%}), {recall['r_at_10']:.0%} among ten"
    print(f"""
Done in {seconds / 60:.1f} minutes of work. Of {recall["queries"]} captions of held-out scenes, {score}.
Everything is in {output}: open {output / "index.html"} in a browser.

To type sentences and see what is found (the page of the last command needs `pip install 'megainter[serve]'`):

    source {Path(sys.prefix) / "bin" / "activate"}
    cd {output}
    megainter index model --store regions.store --pairs pairs.parquet --images images --output scenes.index
    megainter search scenes.index "an apple and two cats"
    megainter serve scenes.index

With your own images it is the same road, from captions to that page: README.md, "Your own images".
""")
