"""WordPiece vocabularies, read, trained and used through the ``tokenizers`` library."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megainter.data.text.layout import marked
from megainter.errors import UsageError
from megainter.files import write_atomically

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TRAINING_WORDS = 20_000_000  # word counts are scaled down to about this many, which leaves the merges as they are
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VocabularyFacts:
    """What masking and batching must know of a vocabulary. ``is_continuation`` bool [size]: entries that begin with "##"."""

    size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    is_continuation: NDArray[np.bool_]


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

    def encode(self, captions: list[str], max_tokens: int, keep_specials: bool = False) -> list[NDArray[np.int32]]:
        """Token ids of each caption, int32, without [CLS] and [SEP], cut after ``max_tokens``.

        A caption that spells "[MASK]" is ordinary text, as data must be; with ``keep_specials`` it has that token there, as transformers'
        tokenizers do.
        """
        tokenizer = self._with_specials_kept if keep_specials else self.tokenizer
        return [np.array(ids[:max_tokens], dtype=np.int32) for ids in encode_texts(tokenizer, captions)]

    def spelled_out(self, text: str) -> list[str]:
        """The words of a text that fall into pieces of one or two letters, as words do that the vocabulary was not made of."""
        normal = self.tokenizer.normalizer.normalize_str(text)
        words = dict.fromkeys(word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(normal))
        pieces = dict(zip(words, encode_texts(self.tokenizer, list(words)), strict=True))
        return [word for word, ids in pieces.items() if len(word) >= 4 and len(ids) * 2 > len(word) and self.facts.unk_id not in ids]

    @cached_property
    def _with_specials_kept(self) -> Tokenizer:
        kept = Tokenizer.from_str(self.tokenizer.to_str())
        kept.add_special_tokens([AddedToken(special, normalized=False) for special in SPECIALS])
        return kept

    def with_specials(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """[CLS] ids [SEP], int64 [n + 2]."""
        return marked(ids.astype(np.int64), None, self.facts.cls_id, self.facts.sep_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of token ids, for people: "##" pieces joined."""
        return str(self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))


def load_vocabulary(path: Path, lowercase: bool = True) -> Vocabulary:
    """Read a ``vocab.txt`` (one entry per line, id = line number), or the one inside folder ``path``.

    Text is cleaned, Chinese characters are set apart and accents dropped with lower-casing, as BERT does.
    ``UsageError`` where the file, a special token or uniqueness is missing.
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
    facts = VocabularyFacts(
        size=len(entries),
        pad_id=pad,
        unk_id=unk,
        cls_id=cls,
        sep_id=sep,
        mask_id=mask,
        is_continuation=np.array([entry.startswith("##") for entry in entries]),
    )
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


def encode_texts(tokenizer: Tokenizer, captions: list[str]) -> list[list[int]]:
    # Set, so that the library's threads do not print a warning at every later fork; forked loader workers never encode.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(captions, add_special_tokens=False)]
