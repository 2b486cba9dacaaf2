"""``python -m benchmarks.search FOLDER``: a large gallery through `megainter index` and searching, with random weights and regions.

Its size on disk, the seconds to index and to open it, and the milliseconds of a query by stage. What is in FOLDER of an earlier call is
used again. The model is a small one (hidden size 256, two layers of each kind); the vectors have the 256 numbers of every first stage.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch

from benchmarks.timing import CPU, machine, peak_mib
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.tables.pairs import Pair, write_pairs
from megainter.data.text.vocabulary import load_vocabulary
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.retrieval.prefilter.towers import DualEncoder, PrefilterSettings, save_prefilter
from megainter.tasks.retrieval.search.building import build_index
from megainter.tasks.retrieval.search.index import Index, open_index
from megainter.tasks.retrieval.search.options import IndexOptions, SearchOptions
from megainter.tasks.retrieval.search.searching import Found, Searcher, take_threads

REGIONS, FEATURES, CLASSES = 6, 64, 8
WORDS = [f"word{number}" for number in range(1000)]
QUERIES = 20
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def main() -> None:
    """Make what is missing, measure, and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--images", type=int, default=100_000)
    options.add_argument("--captions", type=int, default=5, help="of each image")
    given = options.parse_args()
    folder: Path = given.folder
    take_threads(SearchOptions())
    write_inputs(folder, given.images, given.captions)

    start = time.perf_counter()
    index_path = folder / "index"
    inputs = IndexOptions(store=folder / "regions.store", pairs=folder / "pairs.parquet", output=index_path)
    build_index(folder / "model", inputs)
    indexing = time.perf_counter() - start

    start = time.perf_counter()
    index = open_index(index_path)
    searcher = Searcher(index, SearchOptions())
    _ = searcher.look
    opening = time.perf_counter() - start
    print(json.dumps({
        "date": date.today().isoformat(), "machine": machine(CPU), "threads": torch.get_num_threads(), "images": index.facts.image_count,
        "captions": index.facts.caption_count, "megabytes": sum(path.stat().st_size for path in index_path.iterdir()) / 1e6,
        "indexing_seconds": indexing, "opening_seconds": opening, "peak_memory_mib": peak_mib(CPU),
        "milliseconds": measure(searcher, index),
    }, indent=2))  # fmt: skip


def measure(searcher: Searcher, index: Index) -> dict[str, dict[str, float]]:
    """Medians over queries, the first of which (which reads the vectors from the disk) stands by itself."""
    texts = [index.caption(int(number)) for number in np.linspace(0, len(index.captions) - 1, QUERIES).astype(int)]
    first = searcher.images_of(texts[:1], 10, "first")[0]
    found = [searcher.images_of([text], 10)[0] for text in texts]
    together = searcher.images_of(texts, 10, "first")[0]
    of_captions = [searcher.captions_of(searcher.record(row), 10, "first") for row in range(QUERIES)]
    return {
        "first query": _times([first]),
        "image by text": _times(found[1:]),
        "captions by image, vectors alone": _times(of_captions[1:]),
        f"{QUERIES} texts at once, vectors alone": _times([together]),
    }


def _times(found: list[Found]) -> dict[str, float]:
    parts = {"encode": [each.encode_ms for each in found], "nearest": [each.nearest_ms for each in found]}
    parts["second stage"] = [each.second_ms for each in found]
    return {name: round(statistics.median(values), 2) for name, values in parts.items()}


def write_inputs(folder: Path, images: int, captions: int) -> None:
    """Random regions, captions of random words, a model and a first stage of random weights; each only where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    store, pairs, model = folder / "regions.store", folder / "pairs.parquet", folder / "model"
    if not store.exists():
        write_store(store, images)
    if not pairs.exists():
        write_pairs(pairs, rows_of(images, captions))
    if not (model / "prefilter").exists():
        write_models(model, FeatureStore(store))


def write_store(path: Path, images: int) -> None:
    """Records of random regions, the same few again and again under other ids: what they hold does not matter here."""
    rng, names = np.random.default_rng(0), ("__background__", *(f"class {number}" for number in range(1, CLASSES)))
    corners = rng.uniform(0, 60, (64, REGIONS, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + 30], axis=2)
    features = rng.standard_normal((64, REGIONS, FEATURES)).astype(np.float16)
    probs = np.full((REGIONS, CLASSES), 1 / CLASSES, np.float32)
    records = [RegionRecord(boxes[i], features[i], probs, 100, 100) for i in range(64)]
    with FeatureStoreWriter(path, StoreSchema(FEATURES, CLASSES, names, "random")) as writer:
        for start in range(0, images, 1000):
            writer.add_all([(f"image-{i:07d}", records[i % 64]) for i in range(start, min(images, start + 1000))])
    seal_store(path)


def rows_of(images: int, captions: int) -> Iterator[Pair]:
    """Captions of ten random words."""
    rng = np.random.default_rng(1)
    for i in range(images):
        for k in range(captions):
            words = " ".join(WORDS[word] for word in rng.integers(0, len(WORDS), 10))
            yield Pair(f"{i}#{k}", f"image-{i:07d}", f"{i // 1000}/{i}.jpg", words, "train")


def write_models(folder: Path, store: FeatureStore) -> None:
    """The model, its vocabulary, and its first stage."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *WORDS]) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    vocabulary = load_vocabulary(folder)
    torch.manual_seed(0)
    config = InterBertConfig(vocab_size=vocabulary.size, hidden_size=256, num_attention_heads=4, num_region_attention_heads=4,
                             intermediate_size=1024, pooler_size=256, num_interaction_layers=2, num_text_layers=2, num_region_layers=2,
                             region_feature_size=FEATURES, num_region_classes=CLASSES)  # fmt: skip
    InterBertForPreTraining(config).save_pretrained(folder)
    settings = PrefilterSettings(vocabulary_digest=vocabulary.digest, vocabulary_size=vocabulary.size, word_size=256,
                                 feature_size=store.schema.feature_size, max_text_tokens=36, max_regions=36)  # fmt: skip
    save_prefilter(folder / "prefilter", DualEncoder(settings))


if __name__ == "__main__":
    main()
