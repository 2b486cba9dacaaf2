"""``python -m megainter.preflight_probe PART ...``: what `megainter preflight` asks of a host, in a process of its own; one line of JSON.

``host SETTINGS``: versions, devices, digests of the data, the vocabulary's round trip, the resolved DeepSpeed configuration. A part that
fails gives ``{"error": text, "code": exit code}`` in its place. ``collective FILE``: as one of several ranks, all-reduce bandwidth.
"""

import dataclasses
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.errors import MegainterError
from megainter.memory import available_memory
from megainter.verbs.pretrain import split_config

MARK = "megainter-probe: "
ROUND_TRIP = 1000  # captions


def main(words: Sequence[str]) -> None:
    """Print the answer, marked, as other programs write to standard output too."""
    part, *rest = words
    if part == "collective":
        _collective(Path(rest[0]))
        return
    config = load_config(*split_config(rest))
    parts: dict[str, Callable[[RunConfig], Any]] = {
        "versions": _versions, "devices": _devices, "data": _data, "vocabulary": _vocabulary, "engine": _engine,
    }  # fmt: skip
    print(MARK + json.dumps({name: _told(part, config) for name, part in parts.items()}), flush=True)


def _told(part: Callable[[RunConfig], Any], config: RunConfig) -> Any:
    try:
        return part(config)
    except MegainterError as error:
        return {"error": str(error), "code": error.exit_code}
    except Exception as error:  # a probe reports whatever is wrong on a host, it does not end with it
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())}", "code": 1}


def _versions(config: RunConfig) -> dict[str, str]:
    from megainter.training.run_folder import environment

    found = environment()
    return {"python": platform.python_version(), **found["packages"], "commit": str(found["git_commit"])}


def _devices(config: RunConfig) -> dict[str, Any]:
    import torch

    from megainter.devices import units_of

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    memory = [torch.cuda.get_device_properties(number).total_memory for number in range(len(names))]
    units = [units_of(torch.device("cuda", number)) for number in range(len(names))] or [units_of(torch.device("cpu"))]
    return {
        "host": socket.gethostname(), "names": names, "memory": memory, "host_memory_free": available_memory(), "cores": os.cpu_count(),
        "units": [{"name": each.name, "computes": sorted(each.computes)} for each in units],
    }  # fmt: skip


def _data(config: RunConfig) -> dict[str, Any]:
    from megainter.data.feature_store.reader import FeatureStore
    from megainter.data.tables.pairs import read_pairs

    pairs = read_pairs(config.data.pairs, split=config.data.split)
    with FeatureStore(config.data.store) as store:
        schema = store.schema
        return {
            "pairs": pairs.digest, "captions": len(pairs), "store": store.digest, "images": len(store),
            "feature_size": schema.feature_size, "num_classes": schema.num_classes,
        }  # fmt: skip


def _vocabulary(config: RunConfig) -> dict[str, Any]:
    """Encode, decode and encode again: the ids must be the same; and how much of the captions the vocabulary does not know."""
    from megainter.data.tables.pairs import read_pairs
    from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary

    captions = read_pairs(config.data.pairs, split=config.data.split).table.column("caption").slice(0, ROUND_TRIP).to_pylist()
    with tempfile.TemporaryDirectory() as folder:
        path = config.data.vocabulary
        if path is None:
            path = train_vocabulary(
                iter(captions), config.data.vocabulary_size, Path(folder) / "vocab.txt", lowercase=config.data.lowercase
            )
        vocabulary = load_vocabulary(path, lowercase=config.data.lowercase)
    first = vocabulary.encode(captions, 512)
    unknown = vocabulary.ids["[UNK]"]
    known = [ids for ids in first if not (ids == unknown).any()]
    again = vocabulary.encode([vocabulary.decode(ids) for ids in known], 512)
    changed = sum(list(a) != list(b) for a, b in zip(known, again, strict=True))
    tokens = sum(len(ids) for ids in first)
    return {
        "size": vocabulary.size, "captions": len(captions), "changed": changed, "mean_tokens": tokens / max(len(first), 1) + 2,
        "unknown": sum(int((ids == unknown).sum()) for ids in first) / max(tokens, 1),
    }  # fmt: skip


def _engine(config: RunConfig) -> dict[str, Any]:
    """What DeepSpeed would be given; unknown settings and contradictions are errors here."""
    from megainter.config.portions import check_portions
    from megainter.precision import Units, automatic_in_training
    from megainter.training.engine import deepspeed_config

    ranks = int(os.environ.get("MEGAINTER_PREFLIGHT_RANKS", "1"))
    check_portions(config.training, ranks)
    engine = config.engine
    if engine.precision == "auto":
        units = [Units(each["name"], frozenset(each["computes"])) for each in _devices(config)["units"]]
        engine = dataclasses.replace(engine, precision=automatic_in_training(units, engine.zero_stage, engine.deepspeed)[0])
    return deepspeed_config(engine, config.optimizer, config.training, ranks)


def _collective(answer: Path, megabytes: int = 64, rounds: int = 5) -> None:
    """All-reduce ``megabytes`` over all ranks; rank 0 writes ranks, backend, whether the sum is right, and the bus bandwidth in GB/s."""
    import torch
    import torch.distributed as dist

    from megainter.process import adopt_rank

    adopt_rank()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    size = dist.get_world_size()
    buffer = torch.ones(megabytes * 2**20 // 4, device=device)
    dist.all_reduce(buffer)
    right = bool((buffer == size).all())
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(buffer)
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / rounds
    if dist.get_rank() == 0:
        bandwidth = buffer.nbytes * 2 * (size - 1) / size / seconds / 1e9
        answer.write_text(json.dumps({"ranks": size, "backend": dist.get_backend(), "right": right, "gigabytes_per_second": bandwidth}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main([word for word in sys.argv[1:] if not word.startswith("--local_rank")])
