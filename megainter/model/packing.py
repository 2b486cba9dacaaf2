"""Packed batches: the real tokens of all samples end to end, nothing else.

Shape letters: S samples, Nt text tokens of all samples, Nr regions of all samples (global regions included), N = Nt + Nr,
B, T, R the sizes of a padded batch, F the width of a region feature.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.kernels import SequenceLayout
from megainter.model.padding import PaddedInputs
from megainter.transfers import sent_together


@dataclass(frozen=True)
class PackedLayout:
    """Where everything lies, derived from the lengths once per batch.

    ``text``, ``region`` and ``joint`` are the three streams' layouts. A joint sequence is a sample's regions and then its text
    (official order). ``joint_order`` [N] takes rows of cat(regions, text) to joint order; ``text_rows`` [Nt] and ``region_rows``
    [Nr] are the way back. ``text_starts`` and ``region_starts`` [S] are the rows of [CLS] and of the global region; empty when
    the modality is absent. A stream's layout has the samples that have rows in it: all or none, or in a batch of sides alone those of
    its kind.
    """

    text: SequenceLayout
    region: SequenceLayout
    joint: SequenceLayout
    joint_order: torch.Tensor
    text_rows: torch.Tensor
    region_rows: torch.Tensor
    text_starts: torch.Tensor
    region_starts: torch.Tensor

    @classmethod
    def of(cls, inputs: PackedInputs, max_text_length: int, alone: bool = False) -> "PackedLayout":
        """Layout of ``inputs`` on their device, from the lengths on the CPU: index arithmetic there costs a GPU's host less than launches.

        ``alone``: every sample is a text alone or an image's regions alone, in any mixture; otherwise a batch may not mix.
        UsageError when lengths and tensors disagree or a text is too long.
        """
        lengths_t, lengths_r = inputs.text_lengths.cpu(), inputs.region_lengths.cpu()
        _check_lengths(inputs, lengths_t, lengths_r, max_text_length, alone)
        host = torch.device("cpu")
        has_text, has_regions = lengths_t > 0, lengths_r > 0
        streams = (lengths_t[has_text], lengths_r[has_regions], lengths_t + lengths_r)
        text, region, joint = (SequenceLayout.of(lengths, host) for lengths in streams)
        starts_t, starts_r, joint_starts = (layout.cu_seqlens[:-1].long() for layout in (text, region, joint))
        region_rows = joint_starts[has_regions][region.sequence] + region.position
        text_rows = (joint_starts + lengths_r)[has_text][text.sequence] + text.position
        order = torch.empty(len(text_rows) + len(region_rows), dtype=torch.int64)
        order[torch.cat([region_rows, text_rows])] = torch.arange(len(order))
        rows = (order, text_rows, region_rows, starts_t, starts_r)
        return cls(*layouts_on(inputs.input_ids.device, (text, region, joint), rows))

    def join(self, region_NH: torch.Tensor, text_NH: torch.Tensor) -> torch.Tensor:
        """Every sample's regions and then its text, [N, H]."""
        return torch.cat([region_NH, text_NH]).index_select(0, self.joint_order)

    def part(self, joint_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The way back: regions [Nr, H] and text [Nt, H]."""
        return joint_NH.index_select(0, self.region_rows), joint_NH.index_select(0, self.text_rows)


def layouts_on(device: torch.device, layouts: Sequence[SequenceLayout], rows: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """Layouts and index tensors that were made on the CPU, on ``device``: the host does not wait, and there is one copy for each dtype."""
    parts = [tensor for layout in layouts for tensor in (layout.cu_seqlens, layout.sequence, layout.position)]
    moved = sent_together([*parts, *rows], device)
    there = (
        replace(layout, cu_seqlens=moved[3 * i], sequence=moved[3 * i + 1], position=moved[3 * i + 2]) for i, layout in enumerate(layouts)
    )
    return (*there, *moved[len(parts) :])


def _check_lengths(inputs: PackedInputs, text: torch.Tensor, region: torch.Tensor, max_text_length: int, alone: bool) -> None:
    if len(text) != len(region) or int(text.sum()) != len(inputs.input_ids) or int(region.sum()) != len(inputs.region_features):
        raise UsageError(
            f"packed batch: lengths say {int(text.sum())} tokens of {len(text)} texts and "
            f"{int(region.sum())} regions of {len(region)} images, "
            f"but there are {len(inputs.input_ids)} tokens and {len(inputs.region_features)} regions"
        )
    if inputs.text_regions is not None and inputs.text_regions.shape != inputs.input_ids.shape:
        raise UsageError(f"packed batch: text_regions has {len(inputs.text_regions)} entries, and there are {len(inputs.input_ids)} tokens")
    if alone and bool(((text > 0) == (region > 0)).any()):
        raise UsageError("packed batch: a sample of a batch of sides alone has both text and regions, or neither; give it one of them")
    for name, lengths in (("text", text), ("regions", region)):
        if not alone and len(lengths) and int(lengths.min()) == 0 and int(lengths.max()) > 0:
            sample = int(lengths.argmin())
            raise UsageError(f"packed batch: sample {sample} has no {name} while others have; batch single-modal samples by themselves")
    if len(text) and int(text.max()) > max_text_length:
        raise UsageError(f"a text has {int(text.max())} tokens, and the model has max_position_embeddings = {max_text_length}; truncate it")


@dataclass(frozen=True)
class PaddedPlaces:
    """Where packed rows belong in the padded batch they came from: flat positions in [B * T] and [B * R]."""

    batch: int
    text_length: int
    region_length: int
    text_rows: torch.Tensor
    region_rows: torch.Tensor

    def text(self, packed: torch.Tensor) -> torch.Tensor:
        """[Nt, X] -> [B, T, X], zeros at padding."""
        return _unpack(packed, self.text_rows, self.batch, self.text_length)

    def region(self, packed: torch.Tensor) -> torch.Tensor:
        """[Nr, X] -> [B, R, X], zeros at padding."""
        return _unpack(packed, self.region_rows, self.batch, self.region_length)


def _unpack(packed: torch.Tensor, rows: torch.Tensor, batch: int, length: int) -> torch.Tensor:
    flat = packed.new_zeros(batch * length, packed.shape[1]).index_copy(0, rows, packed)
    return flat.view(batch, length, packed.shape[1])


def pack_padded(
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    region_features: torch.Tensor | None,
    region_locations: torch.Tensor | None,
    region_mask: torch.Tensor | None,
    feature_size: int,
    text_regions: torch.Tensor | None = None,
) -> tuple[PackedInputs, PaddedPlaces]:
    """A padded batch ([B, T] text, [B, R, F] regions; masks nonzero = real, omitted = all real; token types default to 0) as a packed one.

    Either modality may be left out. Positions count real tokens, so padding may lie anywhere (the official code counts columns,
    which is the same for padding at the end). Looking at masks makes a GPU wait once; training uses packed batches. ``text_regions`` int64
    [B, T]: the column of the region that a token names, or -1.
    """
    given = PaddedInputs.of(input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, feature_size)
    text, region = given.text_real, given.region_real
    text_rows, region_rows = (mask.flatten().nonzero()[:, 0] for mask in (text, region))
    packed = PackedInputs(
        input_ids=given.input_ids.flatten()[text_rows],
        token_type_ids=given.token_type_ids.flatten()[text_rows],
        text_lengths=text.sum(1).cpu(),
        region_features=given.region_features.flatten(0, 1)[region_rows],
        region_locations=given.region_locations.flatten(0, 1)[region_rows],
        region_lengths=region.sum(1).cpu(),
        text_regions=_packed_targets(text_regions, text, region) if text_regions is not None else None,
    )
    return packed, PaddedPlaces(len(text), text.shape[1], region.shape[1], text_rows, region_rows)


def _packed_targets(columns_BT: torch.Tensor, text_BT: torch.Tensor, region_BR: torch.Tensor) -> torch.Tensor:
    """Columns of regions [B, T] -> packed rows of regions [Nt]; UsageError for a real token whose region is padding or out of range."""
    if columns_BT.shape != text_BT.shape:
        raise UsageError(f"text_regions has shape {list(columns_BT.shape)}, and {list(text_BT.shape)} was expected beside the other inputs")
    batch, width = region_BR.shape
    columns_N = columns_BT[text_BT]
    named = columns_N >= 0
    flat = (torch.arange(batch, device=columns_BT.device)[:, None] * width + columns_BT)[text_BT][named]
    if bool((columns_N >= width).any()) or not bool(region_BR.flatten()[flat].all()):
        raise UsageError(f"text_regions names a region that is padding or beyond the {width} of an image; give its row, or -1")
    rows = torch.full_like(columns_N, -1)
    rows[named] = (region_BR.flatten().cumsum(0) - 1)[flat]
    return rows
