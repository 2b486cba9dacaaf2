"""The run folder: what it records of a run, and whether a new start may go on with it.

``config.json`` (resolved settings), ``ds_config.json``, ``environment.json`` (versions, commit), ``vocab.txt``, ``metrics.jsonl``,
``logs/``, ``cache/``, ``checkpoints/step_0000100`` and ``latest``.
"""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megainter.config.reading import path_settings
from megainter.config.settings import RunConfig, as_dict, section_defaults
from megainter.errors import LockedError, UsageError
from megainter.files import read_json, write_json
from megainter.kinds import task_of
from megainter.process import folder_lock
from megainter.training.job import RunSettings

log = logging.getLogger("megainter")

# A run may go on with another value of these: they change speed, duration or reporting, not what a step computes.
FREE_SECTIONS = ("validation", "engine", "checkpoint", "hangs", "tensorboard", "tracking", "output", "asked", "detector")
FREE_KEYS = {
    "data": ("workers", "other_detector"),
    "training": ("micro_batch", "micro_tokens", "log_every", "steps", "epochs", "profile_steps", "verify_every"),
    "model": ("gradient_checkpointing",),
}
# And of these, which do change the steps to come: what a run that blew up is to go on with. The log says so.
REMEDIES = {
    "optimizer": ("learning_rate", "clip_norm"),
    "training": ("max_skipped", "spike_sigma", "spike_window", "spike_action", "max_roll_backs"),
}
PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "pyarrow", "lmdb", "numpy")


def open_run_folder(
    config: RunSettings,
    ds_config: dict[str, Any],
    digests: dict[str, str],
    asked: Mapping[str, str],
    detector: str | None = None,
    finished: bool = False,
) -> None:
    """Create or continue the folder (rank 0) and record settings and versions; ``UsageError`` where it holds a run of other settings.

    ``asked``: settings as they were given, by ``section.key``, where ``config`` has what they came to; ``detector``: whose
    regions are read; ``finished``: nothing is left to do, so that the folder stays as the run left it.
    """
    folder = config.output
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    settings = as_dict(config) | {"digests": digests, "detector": detector, "asked": dict(asked)}
    before = recorded(folder)
    if before is not None:
        if (task := task_of(before)) != task_of(settings):
            raise UsageError(f"{folder} holds a run of another kind ({task}); name another output folder")
        changed = differences(before, settings, type(config))
        if changed:
            raise UsageError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); use them, or start in another output folder"
            )
        if finished:
            return
        for line in free_changes(before, settings, type(config)):
            log.info("going on with %s", line)
    write_json(folder / "config.json", settings)
    write_json(folder / "ds_config.json", ds_config)
    write_json(folder / "environment.json", environment())


def recorded(folder: Path) -> dict[str, Any] | None:
    """The settings of the run that has a checkpoint in this folder; None where none has."""
    settings = folder / "config.json"
    if not settings.exists() or not any((folder / "checkpoints").glob("step_*")):
        return None
    found: dict[str, Any] = read_json(settings)
    return found


def differences(old: dict[str, Any], new: dict[str, Any], kind: type = RunConfig) -> list[str]:
    """Settings that would make a resumed run of this ``kind`` of configuration another run, as ``section.key: old -> new``.

    What is read from a file is told by its digest, wherever the file lies.
    """
    files = path_settings(kind)
    found = []
    for section in new:
        if section in FREE_SECTIONS:
            continue
        before = section_defaults(section, kind) | old.get(section, {})
        after = new[section] if section != "digests" else dict.fromkeys(before) | new[section]
        for key, value in after.items():
            free = key in FREE_KEYS.get(section, ()) or key in REMEDIES.get(section, ()) or f"{section}.{key}" in files
            if not free and before.get(key) != value:
                found.append(f"{section}.{key}: {before.get(key)} -> {value}")
    return found


def free_changes(old: dict[str, Any], new: dict[str, Any], kind: type = RunConfig) -> list[str]:
    """What a resumed run may change and did, of the engine, of a step's portions and of the optimiser: as ``differences`` has them."""
    names = {"engine": tuple(new["engine"]), "optimizer": REMEDIES["optimizer"], "training": FREE_KEYS["training"] + REMEDIES["training"]}
    return [
        f"{section}.{key}: {before.get(key)} -> {new[section][key]}"
        for section, keys in names.items()
        for before in (section_defaults(section, kind) | old.get(section, {}),)
        for key in keys
        if before.get(key) != new[section][key]
    ]


def environment() -> dict[str, Any]:
    """Versions, platform, command line, the folder it was typed in, and git commit, for whoever wants to repeat the run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "command": sys.argv,
        "folder": os.getcwd(),
        "git_commit": commit_of(Path(__file__).parents[2]),
    }


def commit_of(checkout: Path) -> str | None:
    """The commit checked out there; None where the folder is no checkout, such as site-packages inside somebody's own repository."""
    if not (checkout / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


@contextmanager
def removed_where_nothing_began(folder: Path) -> Iterator[None]:
    """Take away the log, and the folder if nothing else is in it, where a start ends with an error of the user's before anything began."""
    try:
        yield
    except UsageError:
        if folder.is_dir():
            with suppress(LockedError), folder_lock(folder, patience=0.0):  # another run may just be starting in it
                _remove_empty(folder)
        raise


def _remove_empty(folder: Path) -> None:
    """Of a folder with settings something began; without them there are a log of this start, a lock, and what is not ours."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if "config.json" in files:
        return
    ours = {".lock", "logs/train.log"}
    for name in (ours if files <= ours else ours - {".lock"}) & files:
        (folder / name).unlink()
    for below in (folder / "logs", folder / "cache", folder):
        with suppress(OSError):  # not empty, or not there
            below.rmdir()


def start_log(folder: Path | None) -> None:
    """Send the run's log to standard output and, where ``folder`` is given (rank 0), to ``logs/train.log``; other ranks warn only."""
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO if folder is not None else logging.ERROR)
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if folder is not None:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(folder / "logs" / "train.log", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
