"""Captions as token ids, once for a run: a table that all ranks map."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megainter.data.tables.pairs import Pairs
from megainter.data.text.chinese import WORDPIECE, chinese_segmenter, word_begins
from megainter.data.text.vocabulary import Vocabulary, encode_texts, log
from megainter.errors import DamagedError, UsageError
from megainter.files import aside, sha256_of, write_atomically
from megainter.progress import Progress

_BATCH = 16_384  # captions per record batch: about 1 MB, encoded and written at once
_UNKNOWN_LIMIT = 0.20  # above this share of [UNK] the vocabulary is probably of another language


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
    cut = None if words == WORDPIECE else chinese_segmenter()
    with aside(path) as partial:
        _write_table(pairs, vocabulary, max_text_tokens - 2, key, partial, progress, cut)
    write_atomically(_digest_file(path), sha256_of(path) + "\n")
    table = open_token_table(path, key)
    if table.unknown_share > _UNKNOWN_LIMIT:
        share = f"{table.unknown_share:.0%}"
        log.warning("%s of the caption tokens are [UNK]: the vocabulary does not fit the captions (another language, or casing?)", share)
    return table


def _reusable(path: Path, key: str) -> TokenTable | None:
    """The finished table at ``path`` where it is as it was written and of this key; anything else there is replaced."""
    told = _digest_file(path)
    if not path.exists() or not told.is_file() or told.read_bytes() != f"{sha256_of(path)}\n".encode():
        return None
    try:
        return open_token_table(path, key)
    except (UsageError, DamagedError):
        return None


def _digest_file(path: Path) -> Path:
    """Where the SHA-256 of a table stands, by which it is known again."""
    return path.with_name(f"{path.name}.sha256")


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
    encoded = encode_texts(vocabulary.tokenizer, texts)
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
