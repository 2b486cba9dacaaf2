"""Small data made by the real writers: images of colours whose captions name them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import Pair, write_pairs

CLASSES = ("__background__", "red", "green", "blue", "white", "black", "amber", "violet")
FEATURE_SIZE = 16


def write_data(folder: Path, images: int = 40, seed: int = 0, captions: int = 2) -> tuple[Path, Path]:
    """A pairs manifest (three quarters train, the rest val) and a sealed store; returns both paths."""
    rng = np.random.default_rng(seed)
    prototypes = rng.standard_normal((len(CLASSES), FEATURE_SIZE)).astype(np.float32)
    schema = StoreSchema(FEATURE_SIZE, len(CLASSES), CLASSES, "synthetic")
    pairs, store = folder / "pairs.parquet", folder / "regions.store"
    rows = []
    with FeatureStoreWriter(store, schema) as writer:
        for number in range(images):
            kinds = rng.integers(1, len(CLASSES), rng.integers(1, 7))
            image_id = f"image-{number:03d}"
            writer.add(image_id, _record(rng, kinds, prototypes))
            names = [CLASSES[kind] for kind in kinds]
            for index in range(captions):
                text = " and ".join(names) if index == 0 else f"a picture of {', '.join(reversed(names))}"
                split = "train" if number < images * 3 // 4 else "val"
                rows.append(Pair(f"{image_id}#{index}", image_id, f"{image_id}.jpg", text, split))
    seal_store(store)
    write_pairs(pairs, rows)
    return pairs, store


def _record(rng: np.random.Generator, kinds: np.ndarray, prototypes: np.ndarray) -> RegionRecord:
    corners = rng.uniform(0, 60, (len(kinds), 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 36, (len(kinds), 2))], axis=1).astype(np.float32)
    features = (prototypes[kinds] + 0.1 * rng.standard_normal((len(kinds), FEATURE_SIZE))).astype(np.float16)
    probs = np.full((len(kinds), len(CLASSES)), 0.02, dtype=np.float32)
    probs[np.arange(len(kinds)), kinds] = 1 - 0.02 * (len(CLASSES) - 1)
    return RegionRecord(boxes=boxes, features=features, class_probs=probs, width=100, height=100)


TINY = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_interaction_layers": 1, "num_text_layers": 1,
    "num_region_layers": 1, "num_region_attention_heads": 2, "pooler_size": 32,
}  # fmt: skip


def settings(pairs: Path, store: Path, output: Path, **changes: object) -> list[str]:
    """Command-line settings of a tiny run; ``changes`` are given with ``__`` for the dot."""
    values: dict[str, object] = {
        "output": output, "data.pairs": pairs, "data.store": store, "data.vocabulary_size": 60, "data.workers": 0, "data.max_regions": 6,
        "training.steps": 20, "training.global_batch": 16, "training.micro_batch": 4, "training.log_every": 1, "training.seed": 7,
        "optimizer.learning_rate": 0.002, "engine.precision": "fp32", "engine.zero_stage": 1, "checkpoint.every_steps": 1000,
        "validation.every_steps": 0, "tensorboard": "false",
    }  # fmt: skip
    values |= {f"model.{key}": value for key, value in TINY.items()}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


NO_DROPOUT = {"model__hidden_dropout_prob": 0, "model__attention_probs_dropout_prob": 0, "model__region_hidden_dropout_prob": 0}


def train(arguments: list[str], processes: int = 1, timeout: float = 300, faults: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``megainter.pretrain`` in real processes: alone, or under torchrun; with ``faults`` as ``tests.faulty`` has them."""
    worker = ["tests.faulty", "pretrain"] if faults else ["megainter.pretrain"]
    launcher = ["-m"] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "--module"]
    command = [sys.executable, *launcher, *worker, *arguments]
    told = environment() | {"MEGAINTER_TEST_FAULTS": faults}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=told)


def environment() -> dict[str, str]:
    """The environment of a child process: one thread each, CPU."""
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}


def losses(run: Path) -> list[float]:
    """The logged total loss of every step."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def open_store(path: Path) -> FeatureStore:
    """The store, opened."""
    return FeatureStore(path)
