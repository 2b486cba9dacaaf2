"""Bits flipped in every kind of file of ours, and ends cut off: `python -m tests.flips [--rounds 2000] [--seed 0]`.

Each round changes one file of a checkpoint, a model's folder, a feature store (sealed or not) or a run's cache, and reads it as the product
does, in a process of its own. It must be refused or named, be made again, or give the same content ("harmless": the change fell into what
means nothing). Another content without a word is a miss, a signal a crash: the exit code is then 1.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megainter import InterBertForPreTraining
from megainter.conversion.foreign_files import open_tensors
from megainter.conversion.official import to_official
from megainter.conversion.zero import convert
from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import FeatureStoreWriter, stored_ids
from megainter.data.pairs_index.index import build_pairs_index, open_pairs_index
from megainter.data.tables.pairs import read_pairs
from megainter.data.text.token_table import build_token_table
from megainter.data.text.vocabulary import load_vocabulary
from megainter.errors import MegainterError
from megainter.model.folder import read_config, read_vocabulary
from megainter.training import checkpoint
from tests.synthetic import settings, train, write_data

HANG = 60  # seconds of one reading


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and how the product reads them: ``read`` gives a digest of the content, ``named`` where it said what is wrong."""

    name: str
    files: Sequence[Path]
    read: Callable[[], str]


class Named(Exception):
    """The product said that something is wrong, and went on with what is right."""


def content(*parts: object) -> str:
    """A digest of what was read."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().contiguous().view(-1).view(torch.uint8).numpy()
        digest.update(np.ascontiguousarray(part).tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()


def read_checkpoint(root: Path) -> str:
    """The newest checkpoint, as a run takes it up again."""
    told: list[str] = []
    saved = checkpoint.newest(root, told.append)
    assert saved is not None
    if told:
        raise Named(told[0])
    with checkpoint.reader(saved) as read:
        kinds = ("weights", "exp_avg", "exp_avg_sq")
        tensors = [read(kind, name) for kind in kinds for name in sorted(checkpoint.weight_names(saved, kind))]
    return content(saved.folder.name, json.dumps(saved.state, sort_keys=True), *tensors, (saved.folder / "vocab.txt").read_bytes())


def read_model(folder: Path) -> str:
    """A converted model, as evaluation and fine-tuning open it."""
    config = read_config(folder)
    vocabulary = read_vocabulary(folder, config)
    model = InterBertForPreTraining.from_pretrained(folder, config=config, use_safetensors=True)
    return content(config.to_json_string(), vocabulary.digest, vocabulary.lowercase, *(one for _, one in sorted(model.named_parameters())))


def read_weights(path: Path) -> str:
    """A file in the official format."""
    return content(*((name, tensor.read()) for name, tensor in sorted(open_tensors(path).items())))


def read_store(path: Path, partial: bool = False) -> str:
    """Every record, whole and by views, and what the store says of itself."""
    if partial:
        stored_ids(path)
    with FeatureStore(path, allow_partial=partial) as store:
        parts: list[object] = [store.schema.to_json(), store.digest, list(store.ids)]
        for image_id in store.ids:
            record = store[image_id]
            parts += [record.boxes, record.features, record.class_probs, (record.width, record.height)]
        regions = store.first_regions(np.arange(len(store)), 2)
        return content(*parts, regions.boxes)


def read_caches(pairs: Path, store: Path, vocabulary: Path, cache: Path) -> str:
    """Matched pairs and token ids, taken from the cache or made again, as a run begins."""
    tokens = build_token_table(read_pairs(pairs), load_vocabulary(vocabulary, True), 20, cache / "tokens.arrow", progress=False)
    with FeatureStore(store) as opened:
        key, facts = build_pairs_index(pairs, "train", opened, cache / "pairs", progress=False)
        found = open_pairs_index(cache / "pairs", key, opened)
        ids = [tokens[row] for row in range(len(tokens))]
        return content(facts, found.table.to_pydict(), found.image_numbers, list(found.image_ids), *ids)


def prepared(folder: Path) -> list[Kind]:
    """One of each kind, made by the product."""
    pairs, store = write_data(folder, images=24)
    done = train([*settings(pairs, store, folder / "run", training__steps=4, checkpoint__every_steps=2), "--checkpoint.keep", "2"])
    assert done.returncode == 0, done.stdout + done.stderr
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        convert(folder / "run", folder / "model")
        to_official(folder / "model", folder / "official.bin")
    with FeatureStore(store) as sealed, FeatureStoreWriter(folder / "open.store", sealed.schema) as writer:
        for image_id in sealed.ids:
            writer.add(image_id, sealed[image_id])
    checkpoints, cache, open_store = folder / "run" / "checkpoints", folder / "cache", folder / "open.store"
    cache.mkdir()
    read_caches(pairs, store, folder / "model", cache)

    def files(root: Path) -> list[Path]:
        return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".lock" and path.stat().st_size)

    return [
        Kind("checkpoint", files(checkpoints), lambda: read_checkpoint(checkpoints)),
        Kind("model folder", files(folder / "model"), lambda: read_model(folder / "model")),
        Kind("official file", [folder / "official.bin"], lambda: read_weights(folder / "official.bin")),
        Kind("feature store", files(store), lambda: read_store(store)),
        Kind("unsealed store", files(open_store), lambda: read_store(open_store, partial=True)),
        Kind("caches of a run", files(cache), lambda: read_caches(pairs, store, folder / "model", cache)),
    ]


def damaged(whole: bytes, chosen: random.Random) -> tuple[bytes, str]:
    """``whole`` with one bit flipped (four rounds of five) or its end cut off, and which."""
    if chosen.random() < 0.8:
        place, bit = chosen.randrange(len(whole)), chosen.randrange(8)
        return whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :], f"bit {bit} of byte {place}"
    kept = chosen.choice((0, len(whole) - 1, len(whole) // 2, chosen.randrange(len(whole))))
    return whole[:kept], f"cut to {kept} bytes"


def reading(kind: Kind, pristine: str) -> tuple[str, str]:
    """What comes of reading in a child: "named", "harmless", "other content", "crash", "hang" or "error"; and what was said."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG)
        os.write(sender, json.dumps(_read(kind, pristine)).encode()[:60000])
        os._exit(0)
    os.close(sender)
    with open(receiver, "rb") as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hang" if number == signal.SIGALRM else "crash"), signal.Signals(number).name
    outcome, text = json.loads(said)
    return outcome, text


def _read(kind: Kind, pristine: str) -> tuple[str, str]:
    try:
        return ("harmless", "") if kind.read() == pristine else ("other content", "")
    except (MegainterError, Named) as error:
        return "named", str(error)
    except BaseException:
        return "error", traceback.format_exc()[-2000:]


def main(tokens: Sequence[str] | None = None) -> int:
    """Prepare, damage, read, and tell."""
    parser = argparse.ArgumentParser(prog="python -m tests.flips", description=__doc__)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long, with the rounds that were done")
    options = parser.parse_args(tokens)
    torch.set_num_threads(1)  # a forked child has none of its parent's threads, here and in tokenizers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chosen, outcomes, begin = random.Random(options.seed), Counter[tuple[str, str]](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        kinds = prepared(Path(folder))
        pristine = {kind.name: kind.read() for kind in kinds}
        for number in range(options.rounds):
            if time.monotonic() - begin > options.seconds:
                break
            kind = kinds[number % len(kinds)]
            path = kind.files[number // len(kinds) % len(kind.files)]
            places = {file: file.read_bytes() for file in kind.files}
            content, how = damaged(places[path], chosen)
            path.write_bytes(content)
            outcome, text = reading(kind, pristine[kind.name])
            outcomes[kind.name, outcome] += 1
            if outcome not in ("named", "harmless"):
                print(f"round {number}: {kind.name}, {path.relative_to(folder)}, {how}: {outcome} {text}", flush=True)
            for file, before in places.items():  # a cache may have been made again
                if not file.exists() or file.read_bytes() != before:
                    file.write_bytes(before)

    print(f"{'':18} {'rounds':>7} {'named':>7} {'harmless':>9} {'missed':>7} {'crashed':>8} {'hung':>5} {'errors':>7}")
    for kind in kinds:
        row = [outcomes[kind.name, one] for one in ("named", "harmless", "other content", "crash", "hang", "error")]
        print(f"{kind.name:18} {sum(row):>7} {row[0]:>7} {row[1]:>9} {row[2]:>7} {row[3]:>8} {row[4]:>5} {row[5]:>7}")
    bad = sum(count for (_, outcome), count in outcomes.items() if outcome not in ("named", "harmless"))
    print(f"{sum(outcomes.values()):,} rounds with seed {options.seed} in {time.monotonic() - begin:.0f} s: {bad} not as promised")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
