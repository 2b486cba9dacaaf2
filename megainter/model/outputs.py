"""What the InterBERT models give: packed tuples of the core, and padded outputs of the Hugging Face classes.

Shape letters: S samples, Nt text tokens, Nr regions, H hidden, P pooled, V vocabulary, C region target size, M masked tokens, K masked
regions (of a multiple choice: choices), B, T, R a padded batch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers.utils import ModelOutput

from megainter.kernels import QueryRows, SequenceLayout


class Encoded(NamedTuple):
    """What the core makes of a packed batch: ``text_states`` [Nt, H], ``region_states`` [Nr, H], and per sample ``pooled_text`` and
    ``pooled_region`` [S, P] (0 rows for a modality that is absent). ``sides``: what vectors of text and of regions are made of where both
    are there, [S, P or H] each, for models that compare them."""

    text_states: torch.Tensor
    region_states: torch.Tensor
    pooled_text: torch.Tensor
    pooled_region: torch.Tensor
    sides: tuple[torch.Tensor, torch.Tensor] | None = None


class PackedScores(NamedTuple):
    """Logits where they were asked for: ``msm_logits`` [M, V], ``mrm_logits`` [K, C], and ``itm_logits`` [S, 2] (class 0 = matched)."""

    msm_logits: torch.Tensor
    mrm_logits: torch.Tensor
    itm_logits: torch.Tensor


class Asked(NamedTuple):
    """The rows of a stream whose last states are wanted: what its last layer computes (None: all rows, where hardly any could be left
    out), and where the sequences' first rows [S] and the rows asked for [M] then are."""

    queries: QueryRows | None
    starts: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def of(cls, starts: torch.Tensor, rows: torch.Tensor, layout: SequenceLayout, whole: bool = False) -> "Asked":
        """``starts`` int64 [S] and ``rows`` int64 [M] of a stream's packed rows, in any order; ``whole``: all rows are wanted besides."""
        wanted, order = torch.cat([starts, rows]).sort()
        if whole or len(wanted) >= len(layout.sequence):
            return cls(None, starts, rows)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        return cls(QueryRows.of(wanted, layout), places[: len(starts)], places[len(starts) :])


class PackedLosses(NamedTuple):
    """``msm_sum`` and ``msm_right``: summed cross entropy over the M masked tokens and how many are predicted right (float32 scalars);
    ``mrm_logits`` [K, C]; ``itm_logits`` [S, 2] (class 0 = matched)."""

    msm_sum: torch.Tensor
    msm_right: torch.Tensor
    mrm_logits: torch.Tensor
    itm_logits: torch.Tensor


@dataclass
class InterBertModelOutput(ModelOutput):
    """Padded states: ``text_states`` [B, T, H], ``region_states`` [B, R, H], ``pooled_text``, ``pooled_region`` [B, P]."""

    text_states: torch.Tensor | None = None
    region_states: torch.Tensor | None = None
    pooled_text: torch.Tensor | None = None
    pooled_region: torch.Tensor | None = None
    interaction_attentions: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None
    region_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class InterBertForPreTrainingOutput(ModelOutput):
    """``loss`` is the sum of those of the three losses whose labels were given; logits are zeros at padding."""

    loss: torch.Tensor | None = None
    msm_loss: torch.Tensor | None = None
    mrm_loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    text_logits: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    interaction_attentions: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None
    region_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class InterBertForRetrievalOutput(ModelOutput):
    """``logits`` [B, 2] of the matching head; ``scores`` [B], the probability that caption and image match."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    interaction_attentions: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None
    region_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class InterBertClassificationOutput(ModelOutput):
    """``logits`` [B, K] over choices, or [B, num_labels]."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    interaction_attentions: tuple[torch.Tensor, ...] | None = None
    text_attentions: tuple[torch.Tensor, ...] | None = None
    region_attentions: tuple[torch.Tensor, ...] | None = None
