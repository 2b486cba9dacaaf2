"""Hard negatives against all pairs compared in plain numpy: the same lists, in memory that does not grow with the pairs."""

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from megainter.data.stream.negatives import read_hard_negatives
from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.errors import UsageError
from preprocessing.prepare import hard_negatives
from preprocessing.prepare.hard_negatives import mine, similar, tfidf, words_of
from tests.places import SHARED

FLICKR8K = SHARED / "data" / "flickr8k"


def write(path: Path, captions: list[str], each: int = 2) -> Pairs:
    write_pairs(path, [Pair(f"p{i}", f"i{i // each}", f"{i // each}.jpg", text, "train") for i, text in enumerate(captions)])
    return read_pairs(path, "train")


def composed(count: int, seed: int = 0) -> list[str]:
    """Captions of 2 to 9 words, some words far more frequent than others."""
    rng = np.random.default_rng(seed)
    words = [f"w{min(int(rank), 400)}" for rank in rng.pareto(0.7, count * 9) * 3]
    return [" ".join(words[9 * i : 9 * i + int(rng.integers(2, 10))]) for i in range(count)]


def lists_of(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[list[int]]:
    counts, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    edges = np.concatenate([[0], np.cumsum(counts)])
    return [rows[a:b].tolist() for a, b in itertools.pairwise(edges)]


def brute_force(similarity: np.ndarray, images: np.ndarray, top: int, below: float) -> list[list[int]]:
    """Every pair looked at, a row at a time."""
    result = []
    for row, values in enumerate(similarity):
        allowed = np.flatnonzero((values > 1e-9) & (values < below) & (images != images[row]))
        result.append(allowed[np.lexsort((allowed, -values[allowed]))][:top].tolist())
    return result


@pytest.mark.parametrize("threads", [1, 3])
def test_the_lists_are_those_of_all_pairs_compared(threads: int) -> None:
    """Small integers as vectors, so that sums are exact and ties, of which there are many, are true ties."""
    rng = np.random.default_rng(0)
    vectors = sparse.random_array((2600, 60), density=0.08, rng=rng, format="csr", data_sampler=lambda size: rng.integers(1, 4, size))
    vectors = sparse.csr_array(vectors, dtype=np.float32)
    images = (np.arange(2600) // 3).astype(np.int32)
    found = lists_of(list(similar(vectors, images, 7, 20.0, threads)))
    assert found == brute_force((vectors @ vectors.T).toarray(), images, 7, 20.0)


def test_mined_captions_are_the_most_similar_below_the_limit(tmp_path: Path) -> None:
    """Similarities from scikit-learn's own pipeline; ranks may differ where two of them agree to the last digits of single precision."""
    captions = composed(1500)
    pairs = write(tmp_path / "p.parquet", captions)
    mined = mine(tmp_path / "p.parquet", tmp_path / "n.parquet")
    hard = read_hard_negatives(tmp_path / "n.parquet", pairs)
    reference = cosine_similarity(TfidfVectorizer(token_pattern=r"(?u)\w+").fit_transform(captions))
    expected = brute_force(reference, pairs.image_numbers, 30, 0.5)
    for row, rows in enumerate(expected):
        own = hard.rows[hard.offsets[row] : hard.offsets[row + 1]]
        assert len(own) == len(rows)
        np.testing.assert_allclose(reference[row, own], reference[row, rows], atol=1e-6)
        assert not (pairs.image_numbers[own] == pairs.image_numbers[row]).any()
        assert (reference[row, own] < 0.5 + 1e-6).all()
    assert mined.negatives == len(hard.rows)
    assert mined.without == sum(not rows for rows in expected)


def test_top_and_limit_are_settings_and_are_recorded(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.parquet", composed(300))
    mine(tmp_path / "p.parquet", tmp_path / "n.parquet", top=3, below=0.9)
    hard = read_hard_negatives(tmp_path / "n.parquet", pairs)
    assert np.diff(hard.offsets).max() == 3
    expected = {"pairs_digest": pairs.digest, "split": "train", "captions": 300, "top": 3, "below": 0.9}
    assert hard.facts == expected


def test_captions_that_share_no_word_get_no_hard_negatives(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.parquet", ["red dog here", "red dog there", "red cat sits", "blue cow"], each=1)
    mined = mine(tmp_path / "p.parquet", tmp_path / "n.parquet")
    assert mined.without == 1
    assert np.diff(read_hard_negatives(tmp_path / "n.parquet", pairs).offsets)[3] == 0


def test_titles_that_read_the_same_are_no_negatives_of_one_another(tmp_path: Path) -> None:
    """Up to a similarity of 1: rounding puts twins just below it, and a word too frequent to be compared hides a difference."""
    captions = [*composed(200), *(f"{text.upper()} !" for text in composed(200)), "w1 w2", "w2 w1"]
    pairs = write(tmp_path / "p.parquet", captions, each=1)
    mine(tmp_path / "p.parquet", tmp_path / "n.parquet", below=1.0)
    hard = read_hard_negatives(tmp_path / "n.parquet", pairs)
    plain = ["".join(text.lower().replace("!", "").split()) for text in captions]
    lists = [hard.rows[a:b].tolist() for a, b in itertools.pairwise(hard.offsets)]
    assert sum(map(len, lists)) > 1000
    assert not any(plain[row] == plain[other] for row, rows in enumerate(lists) for other in rows)
    vectors, _ = tfidf(pairs)
    twins = lists_of(list(similar(vectors, pairs.image_numbers, 30, 1.0)))
    assert any(plain[row] == plain[other] for row, rows in enumerate(twins) for other in rows)  # what the hashes keep out


def test_words_in_very_many_captions_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = write(tmp_path / "p.parquet", [f"the dog{i % 50} number{i % 7}" for i in range(400)])
    assert tfidf(pairs)[1] == 0  # 400 captions are too few to leave anything out
    monkeypatch.setattr(hard_negatives, "FREQUENT", 100)
    vectors, frequent = tfidf(pairs)
    assert (frequent, vectors.shape) == (1, (400, 57))
    np.testing.assert_allclose(vectors.multiply(vectors).sum(axis=1), 1, rtol=1e-6)


def test_memory_does_not_grow_with_the_pairs_of_captions(tmp_path: Path) -> None:
    """8,000 captions have 64 million pairs, 256 MB of similarities; the rectangles stay under a quarter of that."""
    pairs = write(tmp_path / "p.parquet", composed(8000))
    vectors, _ = tfidf(pairs)
    tracemalloc.start()
    found = hard_negatives.similar(vectors, pairs.image_numbers, 30, 0.5)
    taken = [next(found) for _ in range(2)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(len(counts) for counts, _ in taken) == 2048
    assert peak < 64e6


def test_chinese_captions_are_compared_by_words(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="Chinese captions need jieba, extra `chinese`")
    pairs = write(tmp_path / "p.parquet", ["在水边观看风景的人。", "站在湖边的孩子 with a dog", "湖畔边的人。"], each=1)
    split = words_of(pairs)
    assert split("在水边观看风景的人。") == ["在", "水边", "观看", "风景", "的", "人"]
    assert split("站在 湖边 with A Dog") == ["站", "在", "湖边", "with", "a", "dog"]
    assert TfidfVectorizer(analyzer=split).fit(pairs.table.column("caption").to_pylist()).vocabulary_.keys() >= {"水边", "湖边", "dog"}


def test_captions_without_chinese_never_load_the_segmenter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError

    monkeypatch.setattr(hard_negatives, "chinese_segmenter", refuse)
    assert words_of(write(tmp_path / "p.parquet", ["Ein Bär", "Два пса"]))("Ein BÄR, 2 пса!") == ["ein", "bär", "2", "пса"]


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    write(tmp_path / "one.parquet", ["a b", "c d"])
    with pytest.raises(UsageError, match="at least two images"):
        mine(tmp_path / "one.parquet", tmp_path / "n.parquet")
    write(tmp_path / "marks.parquet", ["!", "?"], each=1)
    with pytest.raises(UsageError, match="have no words"):
        mine(tmp_path / "marks.parquet", tmp_path / "n.parquet")
    with pytest.raises(UsageError, match="no rows of split 'val'; it has train 2"):
        mine(tmp_path / "marks.parquet", tmp_path / "n.parquet", split="val")
    with pytest.raises(UsageError, match="below <= 1"):
        mine(tmp_path / "marks.parquet", tmp_path / "n.parquet", below=1.5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marks.parquet", "one.parquet"]


@pytest.mark.skipif(not FLICKR8K.exists(), reason="the Flickr8k captions (shared/data) are not beside the repository")
def test_real_captions_have_hard_negatives_about_the_same_things(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (FLICKR8K / "val.jsonl").open(encoding="utf-8")]
    captions = [text for line in lines[:300] for text in line["en"]]
    pairs = write(tmp_path / "p.parquet", captions, each=5)
    mined = mine(tmp_path / "p.parquet", tmp_path / "n.parquet")
    hard = read_hard_negatives(tmp_path / "n.parquet", pairs)
    assert mined.negatives > 0.98 * 30 * len(captions)
    split = words_of(pairs)
    shared = [len(set(split(captions[row])) & set(split(captions[hard.rows[hard.offsets[row]]]))) for row in range(0, 1500, 15)]
    assert np.mean(shared) > 2
