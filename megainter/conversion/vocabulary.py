"""The vocabulary that goes with a model: vocab.txt, and the casing in tokenizer_config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megainter.data.text.vocabulary import load_vocabulary
from megainter.errors import UsageError
from megainter.files import followed, read_json, write_atomically, write_json

NO_VOCABULARY = "no vocabulary was given, so the result has none, and evaluate needs one: --vocabulary FILE puts it there"


@dataclass(frozen=True)
class VocabularyFiles:
    """One entry per line number, and whether text is lower-cased before it is looked up."""

    entries: tuple[str, ...]
    lowercase: bool


def find_vocabulary(place: Path, cased: bool | None) -> tuple[VocabularyFiles | None, list[str]]:
    """The vocabulary of a ``vocab.txt`` or of a folder with one (or with a WordPiece tokenizer.json), and what was assumed.

    ``cased`` overrides what the folder says. None where a folder has no vocabulary. ``UsageError`` where it is no BERT vocabulary.
    """
    folder = place if place.is_dir() else place.parent
    entries = _entries(place)
    if entries is None:
        return None, [f"{place} has no vocab.txt: the result has none either; give --vocabulary FILE"]
    stated = _stated_lowercase(folder)
    lowercase = not cased if cased is not None else stated if stated is not None else not any(map(_has_capitals, entries))
    notes = [] if cased is not None or stated is not None else [f"casing is not stated: {'un' if lowercase else ''}cased by its entries"]
    return VocabularyFiles(entries, lowercase), notes


def _entries(place: Path) -> tuple[str, ...] | None:
    file = place / "vocab.txt" if place.is_dir() else place
    if file.is_file():
        return tuple(load_vocabulary(followed(file)).ids)
    if not place.is_dir():
        raise UsageError(f"vocabulary {place} does not exist")
    if not (place / "tokenizer.json").is_file():
        return None
    model = _part(read_json(followed(place / "tokenizer.json")), "model")
    ids = model.get("vocab")
    if model.get("type") != "WordPiece" or not isinstance(ids, dict) or sorted(ids.values()) != list(range(len(ids))):
        raise UsageError(f"{place / 'tokenizer.json'} is not a WordPiece vocabulary; give --vocabulary vocab.txt")
    return tuple(sorted(ids, key=ids.__getitem__))


def _stated_lowercase(folder: Path) -> bool | None:
    if (folder / "tokenizer_config.json").is_file():
        stated = _part(read_json(followed(folder / "tokenizer_config.json"))).get("do_lower_case")
        if isinstance(stated, bool):
            return stated
    if (folder / "tokenizer.json").is_file():
        stated = _part(read_json(followed(folder / "tokenizer.json")), "normalizer").get("lowercase")
        if isinstance(stated, bool):
            return stated
    return None


def _part(value: Any, *keys: str) -> dict[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _has_capitals(entry: str) -> bool:
    return not entry.startswith("[") and entry != entry.lower()


def write_vocabulary(folder: Path, vocabulary: VocabularyFiles, max_length: int) -> None:
    """vocab.txt and tokenizer_config.json, as transformers' BertTokenizer and our evaluation read them."""
    write_atomically(folder / "vocab.txt", "\n".join(vocabulary.entries) + "\n")
    settings = {"do_lower_case": vocabulary.lowercase, "tokenizer_class": "BertTokenizer", "model_max_length": max_length}
    write_json(folder / "tokenizer_config.json", settings)


def require_room(vocabulary: VocabularyFiles | None, vocab_size: int) -> None:
    """``UsageError`` where the vocabulary has more entries than the word embeddings have rows."""
    if vocabulary is not None and len(vocabulary.entries) > vocab_size:
        raise UsageError(
            f"the vocabulary has {len(vocabulary.entries):,} entries, the model's word embeddings {vocab_size:,}; give the model's own"
        )
