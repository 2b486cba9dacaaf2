"""Padded batches as the plain model (`model.plain`) computes them: side by side, with masks, in shapes that depend on no value.

Shape letters: B samples, T text columns, R region columns, H hidden, F the width of a region feature.
"""

from dataclasses import dataclass

import torch

from megainter.errors import UsageError
from megainter.kernels import PaddedLayout


@dataclass(frozen=True)
class PaddedStreams:
    """Which columns are real in the text [B, T], the regions [B, R], and both side by side, regions first (official order)."""

    text: PaddedLayout
    region: PaddedLayout
    joint: PaddedLayout

    @classmethod
    def of(cls, text_BT: torch.Tensor, region_BR: torch.Tensor) -> "PaddedStreams":
        """Of two bool masks."""
        return cls(PaddedLayout(text_BT), PaddedLayout(region_BR), PaddedLayout(torch.cat([region_BR, text_BT], dim=1)))

    def join(self, region_BRH: torch.Tensor, text_BTH: torch.Tensor) -> torch.Tensor:
        """Every sample's regions and then its text, [B, R + T, H]."""
        return torch.cat([region_BRH, text_BTH], dim=1)

    def part(self, joint_BLH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The way back: regions [B, R, H] and text [B, T, H]."""
        regions = self.region.real.shape[1]
        return joint_BLH[:, :regions], joint_BLH[:, regions:]


@dataclass(frozen=True)
class PaddedInputs:
    """A padded batch with nothing left out: an absent side has no columns. What stands in padding is zeros, so that it cannot spread."""

    input_ids: torch.Tensor
    token_type_ids: torch.Tensor
    text_real: torch.Tensor
    region_features: torch.Tensor
    region_locations: torch.Tensor
    region_real: torch.Tensor

    @classmethod
    def of(
        cls,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
        region_features: torch.Tensor | None,
        region_locations: torch.Tensor | None,
        region_mask: torch.Tensor | None,
        feature_size: int,
    ) -> "PaddedInputs":
        """From what a padded door takes: text [B, T], regions [B, R, F] with locations [B, R, 5]; masks nonzero = real, omitted = all
        real; token types default to 0; either side may be left out. ``UsageError`` where sides or shapes do not go together."""
        if input_ids is None and region_features is None:
            raise UsageError("the model got neither input_ids nor region_features; give at least one of them")
        if (region_features is None) != (region_locations is None):
            raise UsageError("region_features and region_locations belong together; one of them is missing")
        given = input_ids if input_ids is not None else region_features
        batch, device = given.shape[0], given.device  # type: ignore[union-attr]

        # the absent side, and what may be omitted of the other
        ids = torch.zeros(batch, 0, dtype=torch.int64, device=device) if input_ids is None else input_ids
        features = torch.zeros(batch, 0, feature_size, device=device) if region_features is None else region_features
        locations = torch.zeros(batch, 0, 5, device=device) if region_locations is None else region_locations
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        text = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.to(device) != 0
        region = torch.ones_like(features[..., 0], dtype=torch.bool) if region_mask is None else region_mask.to(device) != 0
        _require_shapes(ids, text, types, features, locations, region, feature_size)

        # padding may hold anything, a NaN among it
        ids, types = (torch.where(text, part, 0) for part in (ids, types))
        features, locations = (torch.where(region[..., None], part, 0.0) for part in (features, locations))
        return cls(ids, types, text, features, locations, region)

    @property
    def has_text(self) -> bool:
        return self.input_ids.shape[1] > 0

    @property
    def has_regions(self) -> bool:
        return self.region_features.shape[1] > 0


def _require_shapes(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    region_features: torch.Tensor,
    region_locations: torch.Tensor,
    region_mask: torch.Tensor | None,
    feature_size: int,
) -> None:
    """``UsageError`` where a tensor of a padded batch has another shape than those beside it ask for."""
    batch, text = input_ids.shape
    regions = region_features.shape[1]
    wanted = {
        "attention_mask": (attention_mask, (batch, text)),
        "token_type_ids": (token_type_ids, (batch, text)),
        "region_features": (region_features, (batch, regions, feature_size)),
        "region_locations": (region_locations, (batch, regions, 5)),
        "region_mask": (region_mask, (batch, regions)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise UsageError(f"{name} has shape {list(tensor.shape)}, and {list(shape)} was expected beside the other inputs")


def require_both_sides(inputs: PaddedInputs, max_text_length: int) -> None:
    """``UsageError`` for a text that is longer than the model has positions, and for a batch in which one sample lacks what others have.

    Looks at values; what is exported or compiled has no such check.
    """
    for name, real in (("text", inputs.text_real), ("regions", inputs.region_real)):
        lengths = real.sum(1)
        if lengths.numel() and int(lengths.min()) == 0 and real.shape[1] and int(lengths.max()) > 0:
            sample = int(lengths.argmin())
            raise UsageError(f"sample {sample} has no {name} while others have; batch single-modal samples by themselves")
        if name == "text" and lengths.numel() and int(lengths.max()) > max_text_length:
            raise UsageError(
                f"a text has {int(lengths.max())} tokens, and the model has max_position_embeddings = {max_text_length}; truncate it"
            )


def positions_of(real_BL: torch.Tensor) -> torch.Tensor:
    """int64 [B, L]: the place of every real column among its sample's real ones; padding may lie anywhere."""
    return (real_BL.cumsum(1) - 1).clamp(min=0)


def first_rows(states_BLH: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """The state of every sample's first real column, [B, H]; no rows where there are no columns."""
    if not states_BLH.shape[1]:
        return states_BLH[:0, 0:0].reshape(0, states_BLH.shape[2])
    first_B = real_BL.to(torch.int32).argmax(1)
    return states_BLH.gather(1, first_B[:, None, None].expand(-1, 1, states_BLH.shape[2]))[:, 0]


def mean_rows(states_BLH: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """The mean over every sample's real columns, [B, H]."""
    weights_BL1 = real_BL[..., None].to(states_BLH.dtype)
    return (states_BLH * weights_BL1).sum(1) / weights_BL1.sum(1)
