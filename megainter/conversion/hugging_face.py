"""From one folder of ours to another: another dtype, another vocabulary, heads of downstream models."""

import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megainter.conversion.card import NO_CARD, Card
from megainter.conversion.folder import DTYPES, Output, finish, refuse_existing, source_of
from megainter.conversion.foreign_files import LazyTensor
from megainter.conversion.mapping import HEADS, Origin, Plan, expected_shapes, make_plan, untied_decoder
from megainter.conversion.ours import TIED, WORD, open_ours
from megainter.conversion.vocabulary import VocabularyFiles, find_vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig

# Head by its name on the command line: the model that reads it, and the prefix of its tensors. Retrieval takes pretraining's matching head.
MODELS = {
    "retrieval": ("InterBertForRetrieval", "itm_head"),
    "choice": ("InterBertForMultipleChoice", "choice_head"),
    "classification": ("InterBertForSequenceClassification", "classifier"),
}
PRETRAINING = "InterBertForPreTraining"
NUM_LABELS = 2  # of a new classification head, where nothing else is asked for
BIAS = "msm_head.decoder.bias"


def convert_hugging_face(
    source: Path,
    destination: Path,
    *,
    dtype: str = "fp32",
    resize_vocabulary: int | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    head: str | None = None,
    num_labels: int | None = None,
    config_file: Path | None = None,
    seed: int = 0,
    allow_partial: bool = False,
    verify: bool = False,
    card: Card = NO_CARD,
) -> Plan:
    """Write the folder ``destination`` from ``source``: a folder of ours, or weights of our names as zero_to_fp32.py writes them.

    ``config_file`` is the model's JSON where none lies beside the weights; without one, sizes are read from the tensors.

    A new ``vocabulary`` (vocab.txt) keeps the rows of entries that the old one has too; ``resize_vocabulary`` keeps the first rows. New
    rows are drawn by ``seed``. ``head`` ("retrieval", "choice", "classification") adds what is not there. Raises ``UsageError``,
    ``DamagedError``.
    """
    refuse_existing(destination)
    origin = source_of(source)
    source = origin.path
    if num_labels is not None and head != "classification":
        raise UsageError(f"--num-labels {num_labels} is for a new classification head; give --head classification, or leave it out")
    config, tensors, assumed = open_ours(source, config_file)
    untied = untied_decoder(tensors, TIED, WORD, source, allow_partial)
    folder = source if source.is_dir() else source.parent
    files, _ = find_vocabulary(folder, None)
    rows, files, notes = _vocabulary_rows(config, files, resize_vocabulary, vocabulary, cased)
    if rows is not None:
        config.vocab_size = len(rows)
        tensors |= {name: resized(name, tensors[name], rows, config, seed) for name in (WORD, BIAS) if name in tensors}
    present = [name for name in HEADS if f"{name}.weight" in tensors]
    architecture, wanted = MODELS[head] if head is not None else ((config.architectures or [PRETRAINING])[0], "")
    if wanted == "classifier" and wanted not in present:
        config.num_labels = num_labels or NUM_LABELS
    elif num_labels is not None and num_labels != config.num_labels:
        raise UsageError(f"{source} has a classification head of {config.num_labels} classes already; leave --num-labels out")
    found = {name: Origin(name, tensor) for name, tensor in tensors.items() if name != TIED}
    names = [name for name in tensors if name != TIED or untied]
    notes = [*assumed, *notes, *untied]
    heads = [name for name in HEADS if name in present or name == wanted]
    changed = rows is not None or any(tensor.dtype != DTYPES[dtype] for tensor in tensors.values())
    whole = _whole_model(config, found)
    plan = make_plan(
        config, found, names, heads=heads, fresh=rf"{wanted}\." if wanted else r"(?!)", left_over=TIED, notes=notes, architecture=whole
    )
    finish(
        plan,
        source,
        Output(
            destination=destination,
            vocabulary=files,
            allow_partial=allow_partial,
            seed=seed,
            dtype=dtype,
            architecture=architecture,
            verify=verify,
            origin=origin,
            card=replace(card, earlier=source if source.is_dir() else None, changed=changed),
        ),
    )
    return plan


def _whole_model(config: InterBertConfig, found: Mapping[str, Origin]) -> str:
    """The model whose tensors the source is to have: pretraining's, or its own where it has these alone, as fine-tuning leaves them."""
    own = (config.architectures or [PRETRAINING])[0]
    has = {name: expected_shapes(config, architecture=name).keys() <= found.keys() for name in {PRETRAINING, own}}
    return own if has[own] and not has[PRETRAINING] else PRETRAINING


def _vocabulary_rows(
    config: InterBertConfig, old: VocabularyFiles | None, size: int | None, place: Path | None, cased: bool | None
) -> tuple[list[int | None] | None, VocabularyFiles | None, list[str]]:
    """The old row of every new entry (None: new), None where nothing changes; the vocabulary's files; what to say."""
    if place is not None:
        return _rows_by_entry(config, old, size, place, cased)
    if size is None:
        return None, old, []
    if old is not None and size < len(old.entries):
        raise UsageError(f"{size} rows are fewer than the vocabulary's {len(old.entries):,} entries; give a shorter one by --vocabulary")
    rows: list[int | None] = [row if row < config.vocab_size else None for row in range(size)]
    return rows, old, [f"vocabulary: {min(size, config.vocab_size):,} rows kept, {max(0, size - config.vocab_size):,} new"]


def _rows_by_entry(
    config: InterBertConfig, old: VocabularyFiles | None, size: int | None, place: Path, cased: bool | None
) -> tuple[list[int | None], VocabularyFiles, list[str]]:
    if old is None:
        raise UsageError("the source has no vocab.txt, so its rows cannot be told apart; put it there, or give --resize-vocabulary alone")
    new, assumed = find_vocabulary(place, cased)
    if new is None:
        raise UsageError(f"{place} holds no vocabulary; give a vocab.txt")
    if size is not None and size < len(new.entries):
        raise UsageError(f"--resize-vocabulary {size} is fewer than the {len(new.entries):,} entries of {place}; leave it out")
    places = {entry: row for row, entry in enumerate(old.entries) if row < config.vocab_size}
    rows = [places.get(entry) for entry in new.entries] + [None] * ((size or 0) - len(new.entries))
    kept = sum(row is not None for row in rows)
    return rows, new, [*assumed, f"vocabulary: {kept:,} rows kept by their entry, {len(rows) - kept:,} new"]


def resized(name: str, tensor: LazyTensor, rows: list[int | None], config: InterBertConfig, seed: int) -> LazyTensor:
    """``tensor`` with its rows taken from ``rows``; a None is a new row: N(0, initializer_range) of an embedding, 0 of a bias."""

    def read() -> Tensor:
        old = tensor.read()
        shape = (len(rows), *old.shape[1:])
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed % 2**32))
        new = torch.zeros(shape) if len(shape) == 1 else torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
        kept = [(place, row) for place, row in enumerate(rows) if row is not None]
        new[[place for place, _ in kept]] = old[[row for _, row in kept]].float()
        return new

    return LazyTensor((len(rows), *tensor.shape[1:]), torch.float32, read)
