"""What a run takes from the model that it starts from: its sizes, its vocabulary and its casing."""

import dataclasses
import logging
from pathlib import Path

from megainter.config.reading import brought_by
from megainter.config.settings import DataConfig, ModelSettings, RunConfig
from megainter.data.text.vocabulary import Vocabulary, load_vocabulary
from megainter.errors import UsageError
from megainter.model.folder import locate_model, read_config, read_vocabulary
from megainter.tasks.starting import record_start

log = logging.getLogger("megainter")


def with_start(config: RunConfig) -> RunConfig:
    """``config`` with what ``model.start_from`` brings in place of what nobody stated, and its path in place of a name; itself without one.

    ``UsageError`` where a size in [model], the vocabulary or the casing is stated otherwise, and as ``weights.locate``.
    """
    if config.model.start_from is None:
        return config
    found = locate_model(config.model.start_from, "model.start_from")
    start = read_config(found.path)
    names = brought_by(start.to_dict())
    sizes = [field for field in dataclasses.fields(ModelSettings) if field.name in names]
    unlike = [
        f"{field.name} ({getattr(start, field.name)}, not {getattr(config.model, field.name)})"
        for field in sizes
        if getattr(config.model, field.name) not in (field.default, getattr(start, field.name))
    ]
    if unlike:
        raise UsageError(
            f"model.start_from {found.name} differs from [model] in {', '.join(unlike)}; leave them out: a start brings its own"
        )

    if config.model.standardize_regions and not start.standardize_regions and start.detector is not None:
        raise UsageError(
            f"model.standardize_regions is true, and model.start_from {found.name} was trained on features of {start.detector:.80} as they "
            "are: give --model.standardize_regions false"
        )

    if config.data.max_text_tokens > start.max_position_embeddings:
        has = f"model.start_from {found.name} has {start.max_position_embeddings} positions"
        raise UsageError(f"data.max_text_tokens is {config.data.max_text_tokens}, and {has}; give at most as many")

    brought = {field.name: getattr(start, field.name) for field in sizes}
    data = _with_vocabulary(config.data, found.path, read_vocabulary(found.path, start) if (found.path / "vocab.txt").is_file() else None)
    record_start(found, config.output)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, start_from=found.path, **brought))


def _with_vocabulary(data: DataConfig, folder: Path, own: Vocabulary | None) -> DataConfig:
    """``data`` with the vocabulary and casing of the start in ``folder``; ``UsageError`` where others are stated, or it has none."""
    if own is None:
        if data.vocabulary is None:
            raise UsageError(f"model.start_from {folder} has no vocab.txt: give the one that it was trained with as data.vocabulary")
        return data
    if not data.lowercase and own.lowercase:
        raise UsageError(f"data.lowercase is false, and model.start_from {folder} was trained on lowercased text; leave it out")
    if data.vocabulary is not None and data.vocabulary.is_file():
        if list(load_vocabulary(data.vocabulary, own.lowercase).ids) != list(own.ids):
            made = f"`megainter convert hf {folder} MODEL --vocabulary {data.vocabulary}` makes a start for it"
            raise UsageError(f"data.vocabulary {data.vocabulary} is not that of model.start_from {folder}; leave it out, or {made}")
        return dataclasses.replace(data, lowercase=own.lowercase)
    log.info("vocabulary of %d entries%s: model.start_from's", own.size, ", lowercased" if own.lowercase else "")
    return dataclasses.replace(data, vocabulary=data.vocabulary or folder / "vocab.txt", lowercase=own.lowercase)
