"""WordPiece text and the table of encoded captions."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.data.text.token_table import build_token_table, open_token_table, table_key
from megainter.data.text.vocabulary import SPECIALS, load_vocabulary, train_vocabulary
from megainter.errors import DamagedError, UsageError
from tests.places import ROOT, SHARED

SHARED = SHARED / "data" / "vocab"
CAPTIONS = [
    "A black cat sits left of two red apples.",
    "two red apples and a banana",
    "Three cats, one dog; no banana!",
    "a café with a black dog above",
    "the dog is below the black cats",
] * 20


def pairs_of(captions: list[str], folder: Path) -> Pairs:
    path = folder / "pairs.parquet"
    write_pairs(path, [Pair(f"p{i}", f"i{i // 2}", f"{i // 2}.jpg", caption) for i, caption in enumerate(captions)])
    return read_pairs(path)


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    return train_vocabulary(CAPTIONS, 120, tmp_path / "vocab.txt")


def test_trained_vocabulary_is_well_formed(vocab: Path) -> None:
    entries = vocab.read_text().split("\n")[:-1]
    assert tuple(entries[:5]) == SPECIALS
    assert len(entries) == len(set(entries)) <= 120
    loaded = load_vocabulary(vocab)
    assert loaded.size == len(entries)
    assert (loaded.is_continuation == [e.startswith("##") for e in entries]).all()
    assert (loaded.facts.pad_id, loaded.facts.unk_id, loaded.facts.cls_id, loaded.facts.sep_id, loaded.facts.mask_id) == (0, 1, 2, 3, 4)
    assert {"cat", "black", "dog", "a"} <= set(entries)
    assert loaded.decode(loaded.encode(["The BLACK cats"], 10)[0]) == "the black cats"
    assert loaded.decode(loaded.encode(["Café"], 10)[0]) == "cafe"


def test_training_is_deterministic_over_processes_and_orders(tmp_path: Path, vocab: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from megainter.data.text.vocabulary import train_vocabulary\n"
        "from tests.data.text.test_vocabulary import CAPTIONS; train_vocabulary(CAPTIONS[::-1], 120, Path(sys.argv[1]))"
    )
    other = tmp_path / "other.txt"
    subprocess.run([sys.executable, "-c", script, str(other)], check=True, cwd=ROOT)
    assert other.read_bytes() == vocab.read_bytes()


def test_chinese_characters_stand_alone(tmp_path: Path) -> None:
    path = train_vocabulary(["一只黑猫坐在桌子上", "两只黑狗", "黑猫和cats"] * 5, 60, tmp_path / "vocab.txt")
    vocabulary = load_vocabulary(path)
    names = {i: entry for entry, i in vocabulary.ids.items()}
    assert [names[int(i)] for i in vocabulary.encode(["黑猫cats"], 9)[0]][:2] == ["黑", "猫"]
    assert not any(entry.startswith("##") and not entry[2:].isascii() for entry in vocabulary.ids)


@pytest.mark.parametrize("name", ["bert-base-uncased-vocab.txt", "bert-base-chinese-vocab.txt"])
def test_agrees_with_transformers(name: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip("the shared BERT vocabularies are not on this machine")
    transformers = pytest.importorskip("transformers")
    vocabulary = load_vocabulary(SHARED / name)
    reference = transformers.BertTokenizerFast(str(SHARED / name), do_lower_case=True)
    texts = [*CAPTIONS[:5], "Naïve façade — 3.5km of ½-hidden “streets”\u2028", "一只黑猫 and 两只狗", "ÅÄÖ supercalifragilistic"]
    texts.append("x" * 120)  # longer than any word may be: [UNK]
    for text, ids in zip(texts, vocabulary.encode(texts, 1000), strict=True):
        assert ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]
    assert vocabulary.with_specials(ids).tolist() == reference(texts[-1])["input_ids"]


def test_a_caption_cannot_spell_a_special_token(vocab: Path) -> None:
    vocabulary = load_vocabulary(vocab)
    ids = vocabulary.encode(["a cat [SEP] [MASK] [CLS] [PAD]"], 50)[0]
    assert not set(ids.tolist()) & {0, 2, 3, 4}


def test_words_that_are_read_letter_by_letter(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIALS, "cat", "z", "wal", *(f"##{c}" for c in "ebraustn"), "##ru"]) + "\n")
    vocabulary = load_vocabulary(tmp_path / "vocab.txt")
    assert vocabulary.spelled_out("Cats, zebra walrus cat Zebra \u732b z") == ["zebra"]  # wal ##ru ##s; what is unknown is not read at all
    assert vocabulary.spelled_out("") == []


def test_bad_vocabularies(tmp_path: Path, vocab: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_vocabulary(tmp_path / "none.txt")
    entries = vocab.read_text().split("\n")
    (tmp_path / "short.txt").write_text("\n".join(e for e in entries if e not in ("[MASK]", "[SEP]")))
    with pytest.raises(UsageError, match=r"lacks \[SEP\], \[MASK\]"):
        load_vocabulary(tmp_path / "short.txt")
    (tmp_path / "twice.txt").write_text("\n".join([*entries[:-1], "cat"]))
    with pytest.raises(UsageError, match="'cat' twice"):
        load_vocabulary(tmp_path / "twice.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="UTF-8"):
        load_vocabulary(tmp_path / "bytes.txt")
    with pytest.raises(UsageError, match="too small"):
        train_vocabulary(CAPTIONS, 20, tmp_path / "v.txt")
    with pytest.raises(UsageError, match="captions are empty"):
        train_vocabulary(["", " "], 100, tmp_path / "v.txt")


def test_digest_tells_vocabularies_and_casing_apart(vocab: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text(vocab.read_text() + "zebra\n")
    digests = {load_vocabulary(vocab).digest, load_vocabulary(vocab, lowercase=False).digest, load_vocabulary(tmp_path / "more.txt").digest}
    assert len(digests) == 3
    assert load_vocabulary(vocab.parent).digest in digests


def test_table_equals_direct_encoding(tmp_path: Path, vocab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megainter.data.text.token_table._BATCH", 7)  # many record batches, the last one partial
    vocabulary, pairs = load_vocabulary(vocab), pairs_of(CAPTIONS, tmp_path)
    table = build_token_table(pairs, vocabulary, 8, tmp_path / "tokens.arrow", progress=False)
    whole = vocabulary.encode(CAPTIONS, 1000)
    assert len(table) == len(CAPTIONS)
    assert table.lengths.dtype == np.int32
    for row, ids in enumerate(whole):
        assert table[row].dtype == np.int32
        assert table[row].tolist() == ids[:6].tolist()
        assert table.lengths[row] == min(len(ids), 6)
    assert table.truncated == sum(len(ids) > 6 for ids in whole) > 0
    again = pickle.loads(pickle.dumps(table))
    assert again[50].tolist() == table[50].tolist()
    assert len(pickle.dumps(table)) < 1000
    assert list(tmp_path.glob(".*partial")) == []


def test_table_is_reused_only_for_the_same_key(tmp_path: Path, vocab: Path) -> None:
    vocabulary, path = load_vocabulary(vocab), tmp_path / "tokens.arrow"
    pairs = pairs_of(CAPTIONS, tmp_path)
    build_token_table(pairs, vocabulary, 16, path, progress=False)
    written = path.stat().st_mtime_ns
    build_token_table(pairs, vocabulary, 16, path, progress=False)
    assert path.stat().st_mtime_ns == written
    with pytest.raises(UsageError, match="was built for other captions"):
        open_token_table(path, table_key(pairs, vocabulary, 12))
    other = pairs_of([*CAPTIONS[:-1], "a dog"], tmp_path)
    table = build_token_table(other, vocabulary, 16, path, progress=False)
    assert path.stat().st_mtime_ns != written
    assert vocabulary.decode(table[len(table) - 1]) == "a dog"


def test_damaged_table_is_reported_and_rebuilt(tmp_path: Path, vocab: Path) -> None:
    vocabulary, pairs, path = load_vocabulary(vocab), pairs_of(CAPTIONS, tmp_path), tmp_path / "tokens.arrow"
    table = build_token_table(pairs, vocabulary, 16, path, progress=False)
    content, row = path.read_bytes(), table[3].tolist()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DamagedError, match="damaged"):
        open_token_table(path, table.key)
    assert build_token_table(pairs, vocabulary, 16, path, progress=False)[3].tolist() == row
    with pytest.raises(UsageError, match="does not exist"):
        open_token_table(tmp_path / "none.arrow", table.key)


def test_a_vocabulary_that_does_not_fit_is_told(tmp_path: Path, vocab: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        table = build_token_table(pairs_of(["黑猫", "白狗"], tmp_path), load_vocabulary(vocab), 16, tmp_path / "t.arrow", progress=False)
    assert table.unknown_share == 1.0
    assert len(caplog.messages) == 1
    assert "100% of the caption tokens are [UNK]" in caplog.messages[0]


def test_too_short_a_text_is_refused(tmp_path: Path, vocab: Path) -> None:
    with pytest.raises(UsageError, match="max_text_tokens is 2"):
        build_token_table(pairs_of(CAPTIONS, tmp_path), load_vocabulary(vocab), 2, tmp_path / "t.arrow", progress=False)


def test_table_is_a_plain_arrow_file(tmp_path: Path, vocab: Path) -> None:
    build_token_table(pairs_of(CAPTIONS, tmp_path), load_vocabulary(vocab), 16, tmp_path / "t.arrow", progress=False)
    read = pa.ipc.open_file(str(tmp_path / "t.arrow")).read_all()
    assert read.schema.field("ids").type == pa.list_(pa.int32())
    assert read.num_rows == len(CAPTIONS)
