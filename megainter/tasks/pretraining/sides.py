"""What image-text contrast compares: each sample's own caption and its image's regions, without masks and each alone.

Shape letters: S samples of a micro-batch, Nt tokens of their own captions, Nr regions (global ones included), Z of these that masking
changed, F width of a feature.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megainter.data.integers import Int64s
from megainter.data.packed import PackedInputs, packed_rows
from megainter.data.stream.masking import Bools
from megainter.tasks.contrast import Answers
from megainter.tasks.pretraining.sampling import Draws, OwnCaptions, counted


@dataclass(frozen=True)
class Sides:
    """Both sides of a micro-batch's samples, for themselves.

    ``places`` int64 [S] in the global step, and ``keys`` int64 [S, 3]: the image's number, a hash of the text, the pair's row; both stay
    on the CPU, as ``text_lengths`` int64 [S]. ``input_ids`` int64 [Nt]. Regions are those of the batch, but for the rows that masking
    changed: ``hidden_rows`` int64 [Z] were ``hidden_features`` float16 [Z, F]; of them ``kept_rows`` int64 are seen (None: all), and
    ``region_lengths`` int64 [S] on the CPU are how many of each image. ``draws`` are the samples as the stream drew them.
    """

    places: Tensor
    keys: Tensor
    text_lengths: Tensor
    input_ids: Tensor
    hidden_rows: Tensor
    hidden_features: Tensor
    region_lengths: Tensor
    draws: Draws
    kept_rows: Tensor | None = None
    answers: Answers | None = None

    @classmethod
    def of(cls, own: OwnCaptions, places: Int64s, draws: Draws, hidden: "Hidden", counts: Int64s, kept: Bools) -> "Sides":
        """The sides of samples ``draws``, whose own captions and hidden regions are these. ``counts`` int64 [S] are their regions without
        the global ones, of which ``kept`` bool are seen."""
        seen = np.ones(len(kept) + len(counts), np.bool_)
        seen[packed_rows(counts)] = kept
        return cls(
            places=torch.from_numpy(places),
            keys=torch.from_numpy(np.concatenate([own.keys, draws.rows[:, None]], axis=1)),
            text_lengths=torch.from_numpy(own.lengths),
            input_ids=torch.from_numpy(own.ids),
            hidden_rows=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *hidden.rows])),
            hidden_features=torch.cat([torch.zeros(0, hidden.width, dtype=torch.float16), *hidden.features]),
            region_lengths=torch.from_numpy(counted(kept, counts) + 1),
            draws=draws,
            kept_rows=None if kept.all() else torch.from_numpy(np.flatnonzero(seen)),
        )

    def inputs(self, shown: PackedInputs) -> PackedInputs:
        """S texts alone and then S images alone, in one batch, where ``shown`` are the inputs of the micro-batch, as masked."""
        # In place, in a copy: under autocast on a CPU index_copy refuses half precision.
        features = shown.region_features.clone().index_copy_(0, self.hidden_rows, self.hidden_features.to(shown.region_features.dtype))
        locations, nothing = shown.region_locations, torch.zeros_like(self.text_lengths)
        if self.kept_rows is not None:
            features, locations = features.index_select(0, self.kept_rows), locations.index_select(0, self.kept_rows)
        return PackedInputs(
            input_ids=self.input_ids,
            token_type_ids=torch.zeros_like(self.input_ids),
            text_lengths=torch.cat([self.text_lengths, nothing]),
            region_features=features,
            region_locations=locations,
            region_lengths=torch.cat([nothing, self.region_lengths]),
        )

    def to(self, device: torch.device | str) -> "Sides":
        """The same on ``device``, copied without waiting where its memory is pinned."""
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in self._tensors().items()}
        return replace(self, answers=self.answers.to(device) if self.answers is not None else None, **moved)

    def pin_memory(self) -> "Sides":
        """The same in page-locked memory."""
        pinned: dict[str, Any] = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        return replace(self, **pinned)

    def _tensors(self) -> dict[str, Tensor]:
        """What the model's device needs, by name."""
        named = {name: getattr(self, name) for name in ("input_ids", "hidden_rows", "hidden_features", "kept_rows")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass
class Hidden:
    """Collects what masking takes from the regions of a micro-batch: packed rows and what they were, image by image."""

    width: int  # of a feature
    rows: list[Int64s] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    def keep(self, first: int, blanked: Int64s, part: Tensor) -> None:
        """Regions ``blanked`` of an image with regions ``part`` float16 [n, F], whose global region is row ``first``: these, and the mean
        of all, which they are part of."""
        mean = torch.sum(part, 0, keepdim=True, dtype=torch.float32) / len(part)
        self.rows.append(np.concatenate([[first], first + 1 + blanked]))
        self.features += [mean.half(), part[torch.from_numpy(blanked)]]
