"""``python -m tests.net RECORD.json [--against RECORD.json] [--only PART ...]``: what a change of structure must leave equal to the bit.

Losses of 20 steps on two ranks at every ZeRO stage, digests of the training stream, of a store and of the pairs, losses of the three
fine-tuning tasks, and an evaluation's scores; all on small made-up data. Numbers are equal on one machine and one set of versions: record
before a change, compare after it. Exit code 1 where something differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.synthetic import environment, settings, train, write_data

KEPT = ("loss", "msm_loss", "mrm_loss", "itm_loss", "matching_loss", "gradient_norm", "learning_rate")


def main() -> int:
    """Record or compare; returns the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("record", type=Path)
    options.add_argument("--against", type=Path, help="a record to compare with")
    options.add_argument("--only", nargs="*", choices=sorted(PARTS), default=sorted(PARTS))
    given = options.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))
        for name in given.only:
            found |= {f"{name}: {key}": value for key, value in PARTS[name](Path(folder), *data).items()}
            given.record.write_text(json.dumps(found, indent=1) + "\n")
            print(f"{name}: done", flush=True)
    if given.against is None:
        return 0
    known = {key: value for key, value in json.loads(given.against.read_text()).items() if key.partition(":")[0] in given.only}
    unlike = [key for key in sorted(known.keys() | found.keys()) if known.get(key) != found.get(key)]
    print("\n".join(f"DIFFERS {key}" for key in unlike) or f"equal to the bit: {len(known)} records")
    return 1 if unlike else 0


def pretraining(folder: Path, pairs: Path, store: Path) -> dict[str, Any]:
    """Two ranks, micro-batches of 4, dropout on."""
    found = {}
    for precision in ("fp32", "bf16"):
        for stage in (0, 1, 2, 3):
            run = folder / f"{precision}-{stage}"
            done = train(settings(pairs, store, run, engine__precision=precision, engine__zero_stage=stage), processes=2)
            found[f"{precision}, stage {stage}"] = _records(done, run)
    return found


def stream(folder: Path, pairs: Path, store: Path) -> dict[str, Any]:
    """Digests of whole steps, by masking; of the store and of the pairs."""
    from megainter.config.reading import load_config
    from megainter.tasks.pretraining.sources import open_sources
    from megainter.training import engine

    found: dict[str, Any] = {"store": json.loads((store / "store.json").read_text())["digest"]}
    with engine.distributed():
        for masking in ("official", "paper", "bert"):
            config = load_config(None, settings(pairs, store, folder / f"stream-{masking}", data__masking=masking))
            config.output.mkdir()
            sources = open_sources(config, 0, 1)
            found[masking] = [sources.training.digest(step) for step in (0, 1, 17)]
            found["pairs"] = dict(sources.digests)["pairs"]
    return found


def tasks(folder: Path, pairs: Path, store: Path) -> dict[str, Any]:
    """Fine-tuning for retrieval, VCR and classification, 12 steps each, and the scores of the retrieval model."""
    from tests.tasks.classification import data as classification_data
    from tests.tasks.vcr import data as vcr_data

    start = folder / "start"
    done = train(settings(pairs, store, folder / "pretrained", training__steps=5, training__log_every=5))
    assert done.returncode == 0, done.stderr
    _run("megainter", "convert", "zero", folder / "pretrained", start)
    shared = {
        "training.steps": 12, "training.global_batch": 12, "training.micro_batch": 3, "training.log_every": 1, "engine.precision": "fp32",
        "engine.zero_stage": 1, "optimizer.learning_rate": 0.002, "validation.every_steps": 6, "tensorboard": "false", "data.workers": 0,
    }  # fmt: skip
    retrieval = {"data.pairs": pairs, "data.store": store, "model.start_from": start, "data.hard_captions": 1, "data.hard_images": 1}
    files = vcr_data.write_scene_questions(folder / "scenes", {"train": 8, "val": 4})
    vcr_start = vcr_data.write_start(folder / "vcr-start", files.questions)
    vcr = {"data.questions": files.questions, "data.store": files.store, "data.objects_store": files.objects_store,
           "data.max_regions": 8, "model.start_from": vcr_start}  # fmt: skip
    reviews = classification_data.write_reviews(folder / "reviews.parquet", 60)
    text_start = classification_data.write_start(folder / "text-start")
    classification = {"data.examples": reviews, "data.max_text_tokens": 16, "model.start_from": text_start}
    found = {}
    for task, own in (("retrieval", retrieval), ("vcr", vcr), ("classification", classification)):
        run = folder / task
        words = [word for key, value in ({"output": run} | shared | own).items() for word in (f"--{key}", value)]
        found[task] = _records(_run("megainter.finetune", task, *words), run)
    model, report = folder / "retrieval" / "model", folder / "scores.json"
    words = ["--pairs", pairs, "--store", store, "--split", "val", "--precision", "fp32", "--processes", "1", "--output", report]
    _run("megainter", "evaluate", "retrieval", model, *words, "--scores", folder / "matrix")
    found["recalls"] = {key: value for key, value in json.loads(report.read_text()).items() if key.startswith(("text_to", "image_to"))}
    matrix = [path for path in sorted(folder.glob("matrix*")) if path.is_file()]
    found["scores"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in matrix}
    return found


def _run(module: str, *words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", module, *map(str, words)], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _records(done: subprocess.CompletedProcess[str], run: Path) -> list[dict[str, float]]:
    """The losses and norms that a run recorded, without its times."""
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key in (*KEPT, "step") or key.endswith(("_accuracy", "_at_1"))} for line in lines]


PARTS: dict[str, Callable[[Path, Path, Path], dict[str, Any]]] = {"pretraining": pretraining, "stream": stream, "tasks": tasks}

if __name__ == "__main__":
    sys.exit(main())
