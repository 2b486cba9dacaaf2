"""Whole words of Chinese captions: masks never cut one, English is masked as ever, and jieba is asked for out loud."""

import hashlib
import itertools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megainter.config.reading import load_config
from megainter.data.stream.masking import BERT, OFFICIAL, PAPER, mask_text
from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.data.text.chinese import WORDPIECE, chinese_segmenter, segmentation, word_begins
from megainter.data.text.token_table import TokenTable, build_token_table, table_key, whole_words
from megainter.data.text.vocabulary import Vocabulary, VocabularyFacts, load_vocabulary, train_vocabulary
from megainter.errors import UsageError
from tests.places import SHARED

SHARED = SHARED / "data"
ENGLISH = ["A black cat sits left of two red apples.", "the dog is below the black cats"] * 10
MIXED = ["新款T恤 纯棉 iPhone12手机壳", "两只黑狗在路上打架。", "a cat and a dog", "穿着连衣裙的小女孩。"]


def pairs_of(captions: list[str], folder: Path) -> Pairs:
    path = folder / "pairs.parquet"
    write_pairs(path, [Pair(f"p{i}", f"i{i}", f"{i}.jpg", caption) for i, caption in enumerate(captions)])
    return read_pairs(path)


def small_vocabulary(folder: Path, captions: list[str], size: int = 200) -> Vocabulary:
    return load_vocabulary(train_vocabulary(captions, size, folder / "vocab.txt"))


def words_of(table: TokenTable, row: int, vocabulary: Vocabulary) -> list[str]:
    """A caption's tokens, those of one word joined."""
    names = {i: entry for entry, i in vocabulary.ids.items()}
    words: list[str] = []
    continues = table.continues(row)
    assert continues is not None
    for token, goes_on in zip(table[row], continues, strict=True):
        text = names[int(token)].removeprefix("##")
        words[-1:] = [words[-1] + text] if goes_on else [*words[-1:], text]
    return words


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pairs, Vocabulary]:
    captions, vocabulary = SHARED / "flickr8k" / "train.jsonl", SHARED / "vocab" / "bert-base-chinese-vocab.txt"
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    if not captions.is_file() or not vocabulary.is_file():
        pytest.skip("the shared captions and vocabularies are not on this machine")
    with open(captions, encoding="utf-8") as lines:
        texts = [text for line in itertools.islice(lines, 400) for text in json.loads(line)["zh"]]
    return pairs_of(texts, tmp_path_factory.mktemp("zh")), load_vocabulary(vocabulary)


def test_masked_segments_never_cut_a_chinese_word(flickr8k: tuple[Pairs, Vocabulary], tmp_path: Path) -> None:
    """2,000 captions as people wrote them. Where every character is a token, its word is told by counting characters."""
    pairs, vocabulary = flickr8k
    texts = pairs.table.column("caption").to_pylist()
    table = build_token_table(pairs, vocabulary, 36, tmp_path / "t.arrow", False, segmentation("auto", pairs.table.column("caption")))
    cut, rng, checked, several = chinese_segmenter(), np.random.default_rng(0), 0, 0
    for row, text in enumerate(texts):
        ids, continues = table[row], table.continues(row)
        if len(ids) != len(text) or not all(len(name) == 1 for name in text):
            continue
        word = np.repeat(np.arange(len(cut(text))), [len(part) for part in cut(text)])
        assert (continues == np.concatenate([[False], np.diff(word) == 0])).all()
        for _ in range(5):
            positions = mask_text(ids, rng, PAPER, vocabulary.facts, continues)[1]
            for masked in np.unique(word[positions]):
                assert np.isin(np.flatnonzero(word == masked), positions).all()
            several += len(positions) > 0
        checked += 1
    assert checked > 1500
    assert several > 0.3 * 5 * checked


def test_anchors_are_words_and_not_characters(flickr8k: tuple[Pairs, Vocabulary]) -> None:
    """A word of three characters is drawn as often as one of one character, and stays whole."""
    vocabulary = flickr8k[1]
    ids = vocabulary.encode(["自行车 上 的 消防员 站"], 36)[0]
    continues = np.array([0, 1, 1, 0, 0, 0, 1, 1, 0], dtype=bool)
    rng, draws = np.random.default_rng(0), 20_000
    hits = np.zeros(len(ids))
    for _ in range(draws):
        hits[mask_text(ids, rng, PAPER, vocabulary.facts, continues)[1]] += 1
    assert hits[0] == hits[1] == hits[2]
    assert hits[5] == hits[6] == hits[7]
    third = 1 - 0.9 * (1 - 0.1 / 3) * (1 - 0.2 / 3)  # an anchor, or reached from two words before, or from the one before
    assert abs(hits[0] / draws - 0.1) < 5 * np.sqrt(0.09 / draws)
    assert abs(hits[5] / draws - third) < 5 * np.sqrt(third * (1 - third) / draws)


def test_words_of_mixed_captions(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    vocabulary = small_vocabulary(tmp_path, MIXED * 3)
    table = build_token_table(pairs_of(MIXED, tmp_path), vocabulary, 36, tmp_path / "t.arrow", False, "jieba 0")
    assert words_of(table, 0, vocabulary) == ["新款", "t恤", "纯棉", "iphone12", "手机", "壳"]
    assert words_of(table, 1, vocabulary) == ["两只", "黑狗", "在", "路上", "打架", "。"]
    assert words_of(table, 2, vocabulary) == ["a", "cat", "and", "a", "dog"]
    again = pickle.loads(pickle.dumps(table))
    assert (again.continues(0) == table.continues(0)).all()
    short = build_token_table(pairs_of(MIXED, tmp_path), vocabulary, 5, tmp_path / "u.arrow", False, "jieba 0")
    assert (short.continues(1) == [0, 1, 0]).all()


def test_characters_that_cleaning_drops_do_not_tie_words_together(tmp_path: Path) -> None:
    """jieba's word begins with a character that has no token; the token before belongs to another word."""
    vocabulary = small_vocabulary(tmp_path, MIXED * 3)
    found = whole_words(["黑狗\u200b路上", "  ", ""], vocabulary, lambda text: ["黑狗", "\u200b路上"] if "黑" in text else [text])
    assert found[0].tolist() == [False, True, False, True]
    assert [len(part) for part in found[1:]] == [0, 0]


def test_words_without_chinese_stay_as_they_are() -> None:
    assert word_begins("abc 3.5km", lambda text: [text]).tolist() == list(range(9))
    assert word_begins("ab 黑狗", lambda text: ["ab", " ", "黑狗"]).tolist() == [0, 1, 2, 3, 3]


def test_english_is_masked_as_it_was(tmp_path: Path) -> None:
    """The same table and key without jieba; the same masks with it; and masks that are those of the first release, by their digest."""
    pairs, vocabulary = pairs_of(ENGLISH, tmp_path), small_vocabulary(tmp_path, ENGLISH, 40)
    plain = build_token_table(pairs, vocabulary, 16, tmp_path / "plain.arrow", False)
    assert plain.continues(0) is None
    assert set(json.loads(plain.key)) == {"pairs", "vocabulary", "max_text_tokens", "batch"}
    assert pa.ipc.open_file(str(tmp_path / "plain.arrow")).schema.names == ["ids"]
    words = whole_words(ENGLISH, vocabulary, lambda text: pytest.fail("English needs no jieba"))
    for row, continues in enumerate(words):
        assert (continues[: len(plain[row])] == vocabulary.is_continuation[plain[row]]).all()
    facts = VocabularyFacts(1000, 0, 1, 2, 3, 4, np.arange(1000) >= 500)
    total = hashlib.sha256()
    for recipe in (PAPER, OFFICIAL, BERT):
        for n in range(60):
            masked, positions = mask_text((np.arange(n) * 377 % 995 + 5).astype(np.int32), np.random.default_rng(n), recipe, facts)
            total.update(masked.tobytes() + positions.tobytes())
    assert total.hexdigest() == "8c3d944d836056409576bcbe4a978ed15585a88ea698adcc84b27c837fb3214e"


def test_tables_of_other_words_are_not_taken_for_one_another(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    pairs, vocabulary = pairs_of(MIXED, tmp_path), small_vocabulary(tmp_path, MIXED * 3)
    assert len({table_key(pairs, vocabulary, 16, words) for words in (WORDPIECE, "jieba 0.42.1", "jieba 0.43")}) == 3
    path = tmp_path / "t.arrow"
    assert build_token_table(pairs, vocabulary, 16, path, False).continues(0) is None
    assert build_token_table(pairs, vocabulary, 16, path, False, "jieba 0.42.1").continues(0) is not None


def captions(chinese: int, others: int) -> pa.ChunkedArray:
    return pa.chunked_array([["一只黑猫"] * chinese, ["a black cat"] * others], pa.string())


def test_auto_takes_jieba_for_chinese_alone() -> None:
    jieba = pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    assert segmentation("auto", captions(0, 10)) == segmentation("auto", captions(1, 200)) == WORDPIECE
    assert segmentation("auto", captions(3, 200)) == segmentation("jieba", captions(0, 3)) == f"jieba {jieba.__version__}"
    assert segmentation("wordpiece", captions(5, 0)) == segmentation("auto", pa.chunked_array([], pa.string())) == WORDPIECE


def test_chinese_without_jieba_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UsageError, match=r"megainter\[chinese\].*word_segmentation wordpiece"):
        segmentation("auto", captions(5, 0))
    assert segmentation("auto", captions(0, 5)) == segmentation("wordpiece", captions(5, 0)) == WORDPIECE


def test_a_segmentation_that_nothing_uses_is_refused(tmp_path: Path) -> None:
    toml = tmp_path / "run.toml"
    toml.write_text('output = "run"\n[data]\npairs = "p"\nstore = "s"\n[training]\nsteps = 1\n')
    with pytest.raises(UsageError, match="word_segmentation is for"):
        load_config(toml, ["--data.word_segmentation", "jieba"])
    settings = load_config(toml, ["--data.word_segmentation", "wordpiece", "--data.masking", "paper"])
    assert settings.data.word_segmentation == "wordpiece"
