"""`megainter convert detector`: anybody's detector weights into one safetensors file with its configuration inside."""

import json
from pathlib import Path

from megainter.errors import UsageError
from megainter.weights import ORIGIN, locate
from preprocessing.detector.detector import save_weights
from preprocessing.detector.weights import Weights, read_weights


def convert_detector(source: Path, destination: Path, class_names: Path | None = None) -> Weights:
    """Write ``destination`` from any file or name that ``read_weights`` knows, whole or not at all, and print what was taken.

    Its header says which weights by name they were.

    Raises ``UsageError`` where ``destination`` exists, and whatever ``read_weights`` raises.
    """
    if destination.exists():
        raise UsageError(f"{destination} exists; give a new file name or remove it")
    found = locate(source, "detector")
    if found.told:
        print(found.told, flush=True)
    weights = read_weights(found.path, class_names)
    destination.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = save_weights(destination, weights.config, weights.state, {ORIGIN: json.dumps(found.facts)} if found.digests else {})
    print(f"{source}: {weights.origin}\n")
    print(table(weights))
    print(f"\n{destination}: {destination.stat().st_size / 1e6:.1f} MB, fingerprint {fingerprint}, classes {_example(weights)}")
    return weights


def taken(weights: Weights) -> dict[str, dict[str, int]]:
    """Tensors and numbers that were taken, by part of the network."""
    parts: dict[str, dict[str, int]] = {}
    for name, value in weights.state.items():
        part = parts.setdefault(_part(name), {"tensors": 0, "numbers": 0})
        part["tensors"] += 1
        part["numbers"] += value.numel()
    return parts


def table(weights: Weights) -> str:
    """What was taken by part of the network, and what was left over."""
    parts = taken(weights)
    rows = [(part, f"{each['tensors']:,}", f"{each['numbers']:,}") for part, each in parts.items()]
    tensors, numbers = (sum(each[name] for each in parts.values()) for name in ("tensors", "numbers"))
    rows = [("part", "tensors", "numbers"), *rows, ("taken", f"{tensors:,}", f"{numbers:,}")]
    lines = [f"{part:<{max(len(row[0]) for row in rows)}}  {count:>7}  {size:>12}" for part, count, size in rows]
    counters = sum(name.endswith("num_batches_tracked") for name in weights.left_over)
    others = [name for name in weights.left_over if not name.endswith("num_batches_tracked")]
    left = f"{counters} step counters of normalisation layers" + "".join(f", {name}" for name in others[:20])
    return "\n".join([*lines, f"left over: {left}{', ...' * (len(others) > 20)}"])


def _part(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[: 3 if name.startswith(("roi_heads.box_predictor", "proposal_generator", "backbone.body")) else 2])


def _example(weights: Weights) -> str:
    names = weights.config.class_names[1:]
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)} ({len(names):,})"
