"""What a path holds, for whoever was given something of another verb's: an error that says so saves a search."""

from pathlib import Path
from typing import Any

from megainter.errors import MegainterError
from megainter.files import read_json

RUN, TUNING, CHECKPOINT, MODEL = "a training run", "a fine-tuning run", "a checkpoint of a run", "a model's folder"
STORE, INDEX, PREFILTER, TABLE = "a feature store", "an index for searching", "a first stage of retrieval", "a Parquet table"
_TASKS = {"questions": "vcr", "examples": "classification", "objective": "retrieval"}  # by what a run's [data] has


def kind_of(path: Path) -> str:
    """One of the kinds above; "" for anything else, and for what is not there."""
    if path.is_file():
        return TABLE if path.suffix == ".parquet" else ""
    if not path.is_dir():
        return ""
    if (path / "checkpoints").is_dir() and not _has(path, "model*.safetensors"):
        return TUNING if task_of(_settings(path / "config.json")) != "pretrain" else RUN
    if _has(path, "weights-*.safetensors"):
        return CHECKPOINT
    for name, kind in (("store.json", STORE), ("index.json", INDEX), ("config.json", MODEL), ("prefilter.json", PREFILTER)):
        if (path / name).is_file():
            return kind
    return ""


def task_of(settings: dict[str, Any]) -> str:
    """What a run's settings (config.json) train: "pretrain", or a task of `finetune`."""
    data = settings.get("data")
    return next((task for key, task in _TASKS.items() if isinstance(data, dict) and key in data), "pretrain")


def instead(path: Path) -> str:
    """ "; it is ..." where a path that does not fit holds something that is known, else ""."""
    kind = kind_of(path)
    return f"; it is {kind}" if kind else ""


def model_of(path: Path) -> str:
    """What to give where a model's folder is wanted and ``path`` is a run or a checkpoint; "" where it is neither."""
    kind = kind_of(path)
    if kind == TUNING:
        result = path / "model"
        return f"its result is {result}" if result.is_dir() else f"its result, {result}, is there when it has ended"
    return f"`megainter convert zero {path} MODEL` writes the folder MODEL to give here" if kind in (RUN, CHECKPOINT) else ""


def _has(path: Path, pattern: str) -> bool:
    return next(path.glob(pattern), None) is not None


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.is_file() else {}
    except MegainterError:
        return {}
    return found if isinstance(found, dict) else {}
