"""Fine-tuning for retrieval where titles repeat: an image whose title reads the same is no mismatch, drawn at random or as a neighbour."""

from pathlib import Path

import numpy as np

from megainter.data.feature_store import FeatureStore
from megainter.data.stream.negatives import plain_text
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.data.text.token_table import build_token_table
from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary
from megainter.tasks.retrieval.batches import GroupSettings, RetrievalStream
from tests.synthetic import write_data

TITLES = ["新款 T恤", "新款Ｔ恤！", "新款t恤", "女鞋", "男鞋 黑色", "男鞋，黑色"]


def test_images_with_the_same_title_are_never_set_against_one_another(tmp_path: Path) -> None:
    _, store = write_data(tmp_path, images=24)
    titles = [TITLES[i % len(TITLES)] for i in range(24)]
    write_pairs(tmp_path / "t.parquet", [Pair(f"p{i}", f"image-{i:03d}", f"{i}.jpg", title, "train") for i, title in enumerate(titles)])
    pairs = read_pairs(tmp_path / "t.parquet", "train")
    vocabulary = load_vocabulary(train_vocabulary(titles, 60, tmp_path / "vocab.txt"))
    tokens = build_token_table(pairs, vocabulary, 12, tmp_path / "tokens.arrow", progress=False)
    near = np.array([[(i + 6) % 24, (i + 1) % 24] for i in range(24)], np.int32)  # the first of the two has the same title
    stream = RetrievalStream(pairs, FeatureStore(store), tokens, vocabulary.facts, GroupSettings(3, 24, 24, 1, 1, 1, 1), 5, False, near)
    plain = [plain_text(title) for title in titles]
    neighbours = 0
    for step in range(20):
        groups = stream.groups(step)
        for images, captions in zip(groups.images, groups.captions, strict=True):
            assert not any(plain[image] == plain[caption] for image, caption in zip(images[1:], captions[1:], strict=True))
            neighbours += captions[3] == (images[0] + 1) % 24
    assert neighbours > 0.2 * 20 * 24
