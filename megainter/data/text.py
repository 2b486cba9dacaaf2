"""WordPiece text: vocabularies through the ``tokenizers`` library, and a memory-mapped table of every caption's tokens."""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megainter.data.chinese import WORDPIECE, chinese_segmenter, word_begins
from megainter.data.manifest import Pairs
from megainter.data.masking import VocabularyFacts
from megainter.errors import DamagedError, UsageError
from megainter.files import fsync_folder, write_atomically
from megainter.progress import Progress

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_BATCH = 16_384  # captions per record batch: about 1 MB, encoded and written at once
_UNKNOWN_LIMIT = 0.20  # above this share of [UNK] the vocabulary is probably of another language
_TRAINING_WORDS = 20_000_000  # word counts are scaled down to about this many, which leaves the merges as they are
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Vocabulary:
    """A WordPiece vocabulary. ``ids``: entry -> id; ``facts`` is what masking and batches need; ``digest`` covers entries and casing."""

    tokenizer: Tokenizer
    ids: dict[str, int]
    facts: VocabularyFacts
    lowercase: bool
    digest: str

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.facts.size

    @property
    def is_continuation(self) -> NDArray[np.bool_]:
        """bool [size]: entries that begin with "##"."""
        return self.facts.is_continuation

    def encode(self, captions: list[str], max_tokens: int) -> list[NDArray[np.int32]]:
        """Token ids of each caption, int32, without [CLS] and [SEP], cut after ``max_tokens``."""
        return [np.array(ids[:max_tokens], dtype=np.int32) for ids in _encoded(self.tokenizer, captions)]

    def with_specials(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """[CLS] ids [SEP], int64 [n + 2]."""
        return np.concatenate(([self.facts.cls_id], ids, [self.facts.sep_id])).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of token ids, for people: "##" pieces joined."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_vocabulary(path: Path, lowercase: bool = True) -> Vocabulary:
    """Read a ``vocab.txt`` (one entry per line, id = line number), or the one inside folder ``path``.

    Text is cleaned, Chinese characters are set apart and accents dropped with lower-casing, as BERT does. A caption that spells "[MASK]" is
    ordinary text here: it never becomes a special token. ``UsageError`` where the file, a special token or uniqueness is missing.
    """
    path = path / "vocab.txt" if path.is_dir() else path
    entries = _read_entries(path)
    ids = {entry: i for i, entry in enumerate(entries)}
    missing = [special for special in SPECIALS if special not in ids]
    if missing:
        raise UsageError(f"{path} lacks {', '.join(missing)}: give a BERT vocabulary (vocab.txt), or let one be trained on the captions")
    if len(ids) != len(entries):
        twice = next(entry for entry, count in Counter(entries).items() if count > 1)
        raise UsageError(f"{path} lists {twice!r} twice: entries must be unique, because the line number is the id")
    content = "\n".join([*entries, f"lowercase={lowercase}"])
    pad, unk, cls, sep, mask = (ids[special] for special in SPECIALS)
    facts = VocabularyFacts(len(entries), pad, unk, cls, sep, mask, np.array([entry.startswith("##") for entry in entries]))
    return Vocabulary(_wordpiece(ids, lowercase), ids, facts, lowercase, hashlib.sha256(content.encode()).hexdigest())


def _read_entries(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"vocabulary {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"vocabulary {path} is not UTF-8 text: {error}") from None
    return text.removesuffix("\n").split("\n")  # not splitlines: entries may be other Unicode line separators


def _wordpiece(ids: dict[str, int], lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True, handle_chinese_chars=True, lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def train_vocabulary(captions: Iterable[str], size: int, output: Path, lowercase: bool = True) -> Path:
    """Train a WordPiece vocabulary of at most ``size`` entries and write it as ``output`` (vocab.txt), special tokens first.

    The result depends on the captions alone (and not on their order). At most ``size / 2`` characters are kept, the most frequent ones;
    a small text may give fewer than ``size`` entries, because merges seen only once are left out. Returns ``output``.
    """
    words = _word_counts(captions, lowercase)
    characters = Counter[str]()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    ranked = sorted(characters, key=lambda c: (-characters[c], c))
    kept = sorted(ranked[: size // 2])
    words = {word: count for word, count in words.items() if set(word) <= set(kept)}
    if not words:
        raise UsageError("there are no words to train a vocabulary on: the captions are empty")
    inner = sorted({character for word in words for character in word[1:]})
    alphabet = [*SPECIALS, *(f"##{c}" for c in inner)]
    if len(alphabet) + len(kept) > size:
        raise UsageError(f"vocabulary size {size} is too small: special tokens and characters alone need {len(alphabet) + len(kept)}")
    entries = _merged(words, size, alphabet, kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, "\n".join(entries) + "\n")
    return output


def _word_counts(captions: Iterable[str], lowercase: bool) -> dict[str, int]:
    """How often each word occurs, in alphabetical order, scaled down where there are more than the trainer needs."""
    tokenizer = _wordpiece({special: i for i, special in enumerate(SPECIALS)}, lowercase)
    counts = Counter[str]()
    for caption in captions:
        normal = tokenizer.normalizer.normalize_str(caption)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    scale = max(1, counts.total() // _TRAINING_WORDS)
    return {word: -(-counts[word] // scale) for word in sorted(counts)}


def _merged(words: dict[str, int], size: int, alphabet: list[str], characters: list[str]) -> list[str]:
    """The trained entries in id order.

    The library numbers "##" characters in the order of a randomised hash map, and breaks ties between merges by these numbers. Naming them
    among the special tokens fixes the numbers, and with them the result.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, min_frequency=2, special_tokens=alphabet, initial_alphabet=characters, show_progress=False
    )
    tokenizer.train_from_iterator(_repeated(words), trainer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return sorted(vocabulary, key=lambda entry: vocabulary[entry])


def _repeated(words: dict[str, int], at_once: int = 1000) -> Iterator[str]:
    for word, count in words.items():
        yield from [" ".join([word] * at_once)] * (count // at_once)
        if count % at_once:
            yield " ".join([word] * (count % at_once))


def _encoded(tokenizer: Tokenizer, captions: list[str]) -> list[list[int]]:
    # Set, so that the library's threads do not print a warning at every later fork; forked loader workers never encode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(captions, add_special_tokens=False)]


class TokenTable:
    """Every caption's tokens in a memory-mapped Arrow IPC file: list<int32>, cut to the text length, without [CLS] and [SEP].

    ``table[row]`` is an int32 array (a view into the file). A second column, list<uint8>, is there where words are not the vocabulary's
    own: 1 for a token that goes on with the word before it (``continues``). Pickling sends the path alone, so that workers map the file
    themselves. ``truncated`` counts captions that were cut, ``unknown_share`` is the share of [UNK] among all tokens. Of the file only
    where its record batches begin is kept in memory.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._map = pa.memory_map(str(path))
        reader = pa.ipc.open_file(self._map)
        if (reader.schema.metadata or {}).get(b"key", b"").decode() != key:
            raise UsageError(f"{path} was built for other captions, another vocabulary or text length: delete it, or build it again")
        self._map.seek(0)
        whole = self._map.read_buffer(self._map.size())
        self._bytes = np.frombuffer(whole, np.uint8)
        self._numbers = self._bytes[: len(self._bytes) // 4 * 4].view(np.int32)
        begins, counts, facts = [], [], Counter[bytes]()
        for i in range(reader.num_record_batches):
            batch, metadata = reader.get_batch_with_custom_metadata(i)
            begins.append([buffer.address - whole.address for buffer in _list_buffers(batch)])
            counts.append(batch.num_rows)
            facts.update({name: int(metadata[name]) for name in (b"truncated", b"unknown")})
        columns = np.array(begins, np.int64).reshape(len(counts), 2 * len(reader.schema)).T
        self._offsets_at, self._ids_at = columns[0] // 4, columns[1] // 4
        self._continues_at = columns[3] if len(columns) > 2 else None
        self.lengths = CaptionLengths(self._numbers, self._offsets_at, sum(counts))
        tokens = int(self._numbers[self._offsets_at + np.array(counts, np.int64)].sum(dtype=np.int64))
        self.truncated, self.unknown_share = facts[b"truncated"], facts[b"unknown"] / max(tokens, 1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> NDArray[np.int32]:
        batch, first, end = self._span(row)
        at = self._ids_at[batch]
        return self._numbers[at + first : at + end]

    def continues(self, row: int) -> NDArray[np.bool_] | None:
        """bool [n]: which tokens of a caption go on with the word before them; None where the vocabulary alone tells."""
        if self._continues_at is None:
            return None
        batch, first, end = self._span(row)
        at = self._continues_at[batch]
        return self._bytes[at + first : at + end].view(np.bool_)

    def _span(self, row: int) -> tuple[int, int, int]:
        """The record batch of a row, and where its tokens begin and end there."""
        if not 0 <= row < len(self.lengths):
            raise IndexError(row)
        batch, i = divmod(int(row), _BATCH)
        at = self._offsets_at[batch] + i
        return batch, int(self._numbers[at]), int(self._numbers[at + 1])

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenTable, (self.path, self.key)


class CaptionLengths:
    """Tokens of each caption, read from the offsets in a token table's file when asked for: int32, the shape of the rows asked for.

    ``numbers``: the file as int32; ``offsets_at`` int64 [record batches]: where in it the offsets of each begin.
    """

    dtype = np.dtype(np.int32)

    def __init__(self, numbers: NDArray[np.int32], offsets_at: NDArray[np.int64], rows: int) -> None:
        self._numbers, self._offsets_at, self._rows = numbers, offsets_at, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, rows: Any) -> NDArray[np.int32]:
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self._rows:
            raise IndexError(f"rows of a token table are 0 to {self._rows - 1}")
        at = self._offsets_at[rows // _BATCH] + rows % _BATCH
        return self._numbers[at + 1] - self._numbers[at]


def _list_buffers(batch: pa.RecordBatch) -> Iterator[pa.Buffer]:
    """Offsets and values of each column of lists."""
    for column in batch.columns:
        _, offsets, _, values = column.buffers()
        yield from (offsets, values)


def table_key(pairs: Pairs, vocabulary: Vocabulary, max_text_tokens: int, words: str = WORDPIECE) -> str:
    """What a token table depends on, as text: captions, vocabulary, text length (with [CLS] and [SEP]) and what tells words apart."""
    facts = {"pairs": pairs.digest, "vocabulary": vocabulary.digest, "max_text_tokens": max_text_tokens, "batch": _BATCH}
    return json.dumps(facts | ({} if words == WORDPIECE else {"words": words}), sort_keys=True)


def open_token_table(path: Path, key: str) -> TokenTable:
    """Map a finished table; ``UsageError`` where it was built for another key, ``DamagedError`` where it is not a whole Arrow file."""
    try:
        return TokenTable(path, key)
    except FileNotFoundError:
        raise UsageError(f"token table {path} does not exist: build it first") from None
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise DamagedError(f"token table {path} is damaged ({error}): delete it, it is built again") from None


def build_token_table(
    pairs: Pairs, vocabulary: Vocabulary, max_text_tokens: int, path: Path, progress: bool = True, words: str = WORDPIECE
) -> TokenTable:
    """Encode all captions of ``pairs`` once, cut to ``max_text_tokens - 2`` tokens, into ``path``; a table of the same key is reused.

    ``words`` is what tells words apart (``chinese.segmentation``): the vocabulary alone, or jieba where there is Chinese.
    Written aside and renamed, so that a kill leaves no half table. Warns in one line when more than a fifth of the tokens are [UNK].
    """
    if max_text_tokens < 3:
        raise UsageError(f"max_text_tokens is {max_text_tokens}: it must leave room for [CLS], one token and [SEP], at least 3")
    key = table_key(pairs, vocabulary, max_text_tokens, words)
    reused = _reusable(path, key)
    if reused is not None:
        return reused
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    cut = None if words == WORDPIECE else chinese_segmenter()
    try:
        _write_table(pairs, vocabulary, max_text_tokens - 2, key, aside, progress, cut)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    fsync_folder(path.parent)
    table = open_token_table(path, key)
    if table.unknown_share > _UNKNOWN_LIMIT:
        share = f"{table.unknown_share:.0%}"
        _LOG.warning("%s of the caption tokens are [UNK]: the vocabulary does not fit the captions (another language, or casing?)", share)
    return table


def _reusable(path: Path, key: str) -> TokenTable | None:
    """The finished table at ``path`` where it is whole and of this key; anything else there is replaced."""
    if not path.exists():
        return None
    try:
        return open_token_table(path, key)
    except (UsageError, DamagedError):
        return None


def _write_table(
    pairs: Pairs, vocabulary: Vocabulary, max_tokens: int, key: str, path: Path, progress: bool, cut: Callable[[str], list[str]] | None
) -> None:
    columns = [pa.field("ids", pa.list_(pa.int32()))] + ([pa.field("continues", pa.list_(pa.uint8()))] if cut is not None else [])
    schema = pa.schema(columns, metadata={"key": key})
    captions = pairs.table.column("caption")
    with (
        open(path, "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
        Progress("encoding captions", len(captions), "captions", enabled=progress) as bar,
    ):
        for start in range(0, len(captions), _BATCH):
            texts = captions.slice(start, _BATCH).to_pylist()
            batch, facts = _record_batch(texts, vocabulary, max_tokens, schema, cut)
            writer.write_batch(batch, custom_metadata=facts)
            bar.update(len(texts))
        writer.close()
        file.flush()
        os.fsync(file.fileno())


def _record_batch(
    texts: list[str], vocabulary: Vocabulary, max_tokens: int, schema: pa.Schema, cut: Callable[[str], list[str]] | None
) -> tuple[pa.RecordBatch, dict[str, str]]:
    encoded = _encoded(vocabulary.tokenizer, texts)
    kept = [ids[:max_tokens] for ids in encoded]
    offsets = pa.array(np.concatenate(([0], np.cumsum([len(ids) for ids in kept]))).astype(np.int32))
    values = np.fromiter(chain.from_iterable(kept), dtype=np.int32, count=offsets[-1].as_py())
    truncated = sum(len(ids) > max_tokens for ids in encoded)
    unknown = int((values == vocabulary.facts.unk_id).sum())
    columns = [pa.ListArray.from_arrays(offsets, pa.array(values))]
    if cut is not None:
        continues = [part[:max_tokens] for part in whole_words(texts, vocabulary, cut)]
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(continues).view(np.uint8))))
    return pa.record_batch(columns, schema=schema), {"truncated": str(truncated), "unknown": str(unknown)}


def whole_words(texts: list[str], vocabulary: Vocabulary, cut: Callable[[str], list[str]]) -> list[NDArray[np.bool_]]:
    """For each text which of its tokens go on with the word before them, bool [tokens], by "##" and by the words that ``cut`` finds.

    The second holds in words with Chinese, other letters within them included; all else stays as the vocabulary has it.
    """
    found = []
    for text, encoding in zip(texts, vocabulary.tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        continues = vocabulary.is_continuation[np.array(encoding.ids, dtype=np.int64)]
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)  # characters of the text as it was given
        begins = word_begins(text, cut)[places[1:, 0]]
        continues[1:] |= begins < places[:-1, 1]
        found.append(continues)
    return found
