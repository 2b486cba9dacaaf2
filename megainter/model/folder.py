"""A model's Hugging Face folder: its configuration and vocabulary, and a digest of what it computes."""

import hashlib
import logging
from pathlib import Path

from megainter.data.text.vocabulary import Vocabulary, load_vocabulary
from megainter.errors import UsageError
from megainter.files import read_json, require_checksums, require_own_files, sha256_of
from megainter.kinds import instead, kind_of, model_of
from megainter.model.configuration import InterBertConfig
from megainter.weights import Located, check_name, is_repository, locate

log = logging.getLogger("megainter")


def locate_model(name: str | Path, option: str = "") -> Located:
    """The model that a path or a name stands for (``weights.locate``, which raises); the log says the digest of one that came by name."""
    found = locate(name, option=option)
    if found.told:
        log.info("%s", found.told)
    return found


def named(name: str | Path, revision: str | None = None) -> str | Path:
    """``name`` as ``locate`` takes it: what transformers takes for a repository (OWNER/NAME, and no folder here) with ``hf:`` before it."""
    text = str(name)
    repository = is_repository(text)
    text = f"hf:{text}" if repository else text
    return f"{text}@{revision}" if revision is not None and text.startswith("hf:") and "@" not in text else text if repository else name


def read_config(folder: Path) -> InterBertConfig:
    """The configuration of a Hugging Face folder of ours; ``UsageError`` for anything else, a run folder or a checkpoint among it.

    ``DamagedError`` where the folder has checksums and one of its files is not as it was written.
    """
    check_name(folder)
    if remedy := model_of(folder):
        raise UsageError(f"{folder} is {kind_of(folder)}; {remedy}")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is no Hugging Face folder (it has no config.json); `megainter convert zero` writes one{instead(folder)}"
        )
    require_own_files(folder)
    settings = read_json(folder / "config.json")
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != InterBertConfig.model_type:
        raise UsageError(f"{folder} holds a model of type {kind!r}, not {InterBertConfig.model_type!r}; `megainter convert` writes one")
    require_checksums(folder)
    return InterBertConfig.from_pretrained(folder)


def read_vocabulary(folder: Path, config: InterBertConfig) -> Vocabulary:
    """The vocabulary of a model's folder; ``UsageError`` where there is none, its casing is not said, or the model embeds fewer entries."""
    lowercase = read_json(folder / "tokenizer_config.json").get("do_lower_case")
    if not isinstance(lowercase, bool):
        raise UsageError(
            f"{folder}/tokenizer_config.json has no do_lower_case; write true or false, as the vocabulary was used in training"
        )
    vocabulary = load_vocabulary(folder, lowercase)
    if vocabulary.size > config.vocab_size:
        raise UsageError(f"{folder}: vocab.txt has {vocabulary.size:,} entries, and the model embeds {config.vocab_size:,}")
    return vocabulary


def model_digest(folder: Path) -> str:
    """SHA-256 over the configuration and the weights of a Hugging Face folder."""
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("".join(f"{file.name} {sha256_of(file)} " for file in files).encode()).hexdigest()
