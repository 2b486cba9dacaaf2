"""Texts and images' regions as the model's inputs, packed or padded, by what a model's folder says: for scoring from Python."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import PackedInputs, region_rows
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.files import read_json, renew_checksums, write_atomically, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import locate_model, named, read_config, read_vocabulary
from megainter.model.remote_code import processor_map, write_remote_code

SETTINGS, SPLIT = "processor_config.json", "split_special_tokens"
USUAL_LENGTH = 36  # tokens and regions, where nothing says what the model was trained with


@dataclass(frozen=True)
class InterBertProcessor:
    """What turns texts and records into inputs.

    Texts are cut to ``max_text_tokens`` tokens, [CLS] and [SEP] included; of a record the first ``max_regions`` regions are taken, after
    the global region. ``region_feature_size`` is what the model takes. "[MASK]" and the other special tokens in a text are these tokens,
    as in transformers; with ``split_special_tokens`` they are ordinary text, as in every table of captions and every search.
    """

    vocabulary: Vocabulary
    region_feature_size: int
    max_text_tokens: int = USUAL_LENGTH
    max_regions: int = USUAL_LENGTH
    split_special_tokens: bool = False

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        max_text_tokens: int | None = None,
        max_regions: int | None = None,
        split_special_tokens: bool | None = None,
    ) -> "InterBertProcessor":
        """The processor of a model's folder: its vocab.txt, its casing (tokenizer_config.json), and lengths.

        ``folder`` may also be a repository of the Hub (``hf:OWNER/NAME``, ``weights.locate``). Lengths: those given, else what
        ``save_pretrained`` wrote, else what the model was trained with (config.json), else 36; The same order holds
        for ``split_special_tokens``, which is false in the end.
        ``UsageError`` where the folder lacks one of these files, or they do not fit each other.
        """
        folder = locate_model(named(folder)).path
        config = read_config(folder)
        saved = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
        tokens = _length("max_text_tokens", 3, config.max_position_embeddings, max_text_tokens, saved, config)
        regions = _length("max_regions", 1, None, max_regions, saved, config)
        split = saved.get(SPLIT, False) if split_special_tokens is None else split_special_tokens
        if not isinstance(split, bool):
            raise UsageError(f"{SPLIT} is {split!r:.80}; give true or false")
        return cls(read_vocabulary(folder, config), config.region_feature_size, tokens, regions, split)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.txt, tokenizer_config.json and processor_config.json into a model's folder; ``from_pretrained`` reads them there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stated = folder / "tokenizer_config.json"
        tokenizer = (read_json(stated) if stated.is_file() else {}) | {
            "do_lower_case": self.vocabulary.lowercase,
            "tokenizer_class": "BertTokenizer",
        }
        write_atomically(folder / "vocab.txt", "\n".join(self.vocabulary.ids) + "\n")
        write_json(stated, tokenizer)
        lengths = {"max_text_tokens": self.max_text_tokens, "max_regions": self.max_regions}
        write_processor_settings(folder, self.region_feature_size, lengths | {SPLIT: self.split_special_tokens})
        write_remote_code(folder)
        renew_checksums(folder)

    def pack(self, texts: Sequence[str] | None, records: Sequence[RegionRecord | RegionViews] | None) -> PackedInputs:
        """Texts and records row by row as the model's packed inputs; either may be None. ``UsageError`` where they do not fit."""
        if texts is None and records is None:
            raise UsageError("give texts, records, or both")
        if texts is not None and records is not None and len(texts) != len(records):
            raise UsageError(f"{len(texts)} texts and {len(records)} records do not go together row by row")
        count = len(texts) if texts is not None else len(records)  # type: ignore[arg-type]
        ids, text_lengths = self._tokens(texts) if texts else (torch.zeros(0, dtype=torch.int64), _none(count))
        if records:
            features, locations, region_lengths = self._regions(records)
        else:
            features, locations, region_lengths = torch.zeros(0, self.region_feature_size), torch.zeros(0, 5), _none(count)
        return PackedInputs(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            text_lengths=text_lengths,
            region_features=features,
            region_locations=locations,
            region_lengths=region_lengths,
        )

    def __call__(self, texts: Sequence[str] | None = None, records: Sequence[RegionRecord] | None = None) -> BatchFeature:
        """Texts and records row by row as padded tensors, by the names of the models' ``forward``: ``model(**processor(texts, records))``.

        ``input_ids``, ``attention_mask``, ``token_type_ids`` int64 [B, T]; ``region_features`` [B, R, F] as stored, ``region_locations``
        float32 [B, R, 5], ``region_mask`` int64 [B, R], row 0 the global region. What is not given is left out.
        """
        packed = self.pack(texts, records)
        padded: dict[str, torch.Tensor] = {}
        if texts is not None:
            mask = mask_of(packed.text_lengths)
            padded |= {
                "input_ids": padded_rows(packed.input_ids, packed.text_lengths, self.vocabulary.facts.pad_id),
                "attention_mask": mask,
            }
            padded["token_type_ids"] = torch.zeros_like(mask)
        if records is not None:
            lengths = packed.region_lengths
            padded |= {"region_features": padded_rows(packed.region_features, lengths), "region_mask": mask_of(lengths)}
            padded["region_locations"] = padded_rows(packed.region_locations, lengths)
        return BatchFeature(padded)

    def _tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.vocabulary.encode(list(texts), self.max_text_tokens - 2, keep_specials=not self.split_special_tokens)
        parts = [self.vocabulary.with_specials(ids) for ids in found]
        return torch.from_numpy(np.concatenate(parts)), torch.tensor([len(part) for part in parts])

    def _regions(self, records: Sequence[RegionRecord | RegionViews]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for width in {record.features.shape[1] for record in records} - {self.region_feature_size}:
            raise UsageError(f"a record has {width}-d features, and the model takes {self.region_feature_size}-d ones: another detector's")
        return region_rows(records, self.max_regions)


def write_processor_settings(folder: Path, region_feature_size: int, settings: dict[str, Any]) -> None:
    """Write processor_config.json, which AutoProcessor reads too: ``settings`` are those of the processor."""
    write_json(folder / SETTINGS, processor_map() | {"region_feature_size": region_feature_size} | settings)


def _length(name: str, least: int, most: int | None, given: int | None, saved: dict[str, Any], config: InterBertConfig) -> int:
    """The first of: given, saved with the processor, stated by the model, usual; ``UsageError`` where it is out of bounds."""
    value = next(value for value in (given, saved.get(name), getattr(config, name), USUAL_LENGTH) if value is not None)
    if not isinstance(value, int) or value < least or (most is not None and value > most):
        raise UsageError(f"{name} is {value!r}; this model takes {least} to {most or 'any number'}")
    return value


def _none(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int64)


def padded_rows(rows: torch.Tensor, lengths: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    """Packed rows [N, ...] -> [B, longest, ...]."""
    if not len(lengths):
        return rows.new_zeros(0, 0, *rows.shape[1:])
    return pad_sequence(list(rows.split(lengths.tolist())), batch_first=True, padding_value=value)


def mask_of(lengths: torch.Tensor) -> torch.Tensor:
    longest = int(lengths.max()) if len(lengths) else 0
    return (torch.arange(longest) < lengths[:, None]).long()
