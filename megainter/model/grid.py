"""Captions of one chunk against images of another, all or some pairs: the matching score, without computing anything twice or in vain.

The same numbers as `InterBertForRetrieval.score_packed` over these pairs, for inference alone, and cheaper in three ways. A row's
embedding, and its query, key and value in the first interaction layer, do not depend on what it is paired with: they are computed
once per caption and once per image. The pooled vectors see only [CLS] and the global region: the last text layer and the last region
layer compute these rows alone, unless means of all rows are compared as well. The heads of masking do not exist here.

Shape letters: C captions, I images, S pairs (of a grid I * C, all captions of the first image first), Nt and Nr rows of the captions and of
the images, N rows of all pairs, H hidden.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from megainter.data.packed import images_alone, texts_alone
from megainter.kernels import QueryRows, SequenceLayout, varlen_attention
from megainter.model.encoder import SelfAttention, TransformerLayer, run_stream
from megainter.model.heads import matching_logits, means, rows_compared
from megainter.model.interbert import MATCHED, InterBertForRetrieval
from megainter.model.packing import layouts_on
from megainter.model.vectors import contrastive_vectors


@dataclass(frozen=True)
class EmbeddedRows:
    """Embedded rows [N, H] of several captions or images, end to end, and how many rows each has (CPU int64). For models that
    compare them: ``seen_IF``, the features of images that make their vectors, and ``vectors_XD``, of captions or images, each alone."""

    rows_NH: torch.Tensor
    lengths: torch.Tensor
    seen_IF: torch.Tensor | None = None
    vectors_XD: torch.Tensor | None = None


@dataclass(frozen=True)
class GridLayout:
    """Where the rows of all pairs lie. ``source`` int64 [N] takes rows of cat(images, captions) to the pairs' joint sequences (regions,
    then text); ``text_rows`` and ``region_rows`` pick the two streams out of the joint rows."""

    joint: SequenceLayout
    text: SequenceLayout
    region: SequenceLayout
    source: torch.Tensor
    text_rows: torch.Tensor
    region_rows: torch.Tensor

    @classmethod
    def of(
        cls, captions: torch.Tensor, images: torch.Tensor, caption_S: torch.Tensor, image_S: torch.Tensor, device: torch.device
    ) -> "GridLayout":
        """Layout for row counts ``captions`` [C] and ``images`` [I] and the pairs' numbers of both [S] (all CPU int64).

        Index arithmetic on the CPU, results on ``device``.
        """
        text_S, region_S = captions[caption_S], images[image_S]
        joint = SequenceLayout.of(text_S + region_S, torch.device("cpu"))
        image_N, caption_N = image_S[joint.sequence], caption_S[joint.sequence]
        in_text_N = joint.position - images[image_N]
        caption_starts = captions.cumsum(0) - captions + images.sum()
        source_N = (images.cumsum(0) - images)[image_N] + joint.position
        source_N = torch.where(in_text_N < 0, source_N, caption_starts[caption_N] + in_text_N)
        text_rows, region_rows = (in_text_N >= 0).nonzero()[:, 0], (in_text_N < 0).nonzero()[:, 0]
        text, region = (SequenceLayout.of(lengths, torch.device("cpu")) for lengths in (text_S, region_S))
        return cls(*layouts_on(device, (joint, text, region), (source_N, text_rows, region_rows)))


def embed_captions(model: InterBertForRetrieval, input_ids: torch.Tensor, lengths: torch.Tensor) -> EmbeddedRows:
    """``input_ids`` int64 [Nt] on the model's device, each caption's [CLS] first; token types 0; ``lengths`` CPU int64 [C]."""
    positions = SequenceLayout.of(lengths, input_ids.device).position
    rows_NH, vectors_CD = model.interbert.text_embeddings(input_ids, positions, torch.zeros_like(input_ids)), None
    if model.itm_vectors is not None:
        vectors_CD = contrastive_vectors(model, texts_alone(input_ids, lengths, model.config.region_feature_size).to(input_ids.device))[0]
    return EmbeddedRows(rows_NH, lengths, vectors_XD=vectors_CD)


def embed_images(model: InterBertForRetrieval, features: torch.Tensor, locations: torch.Tensor, lengths: torch.Tensor) -> EmbeddedRows:
    """``features`` [Nr, F] of any floating dtype and ``locations`` [Nr, 5], the global region first in each image; ``lengths`` CPU [I]."""
    embeddings, seen, vectors_ID = model.interbert.region_embeddings, None, None
    if model.itm_similarity is not None and model.config.itc_of_features:
        rows = rows_compared(lengths.cumsum(0) - lengths, lengths, model.config)
        seen = embeddings.seen(features.index_select(0, rows.to(features.device)))
    if model.itm_vectors is not None:
        vectors_ID = contrastive_vectors(model, images_alone(features, locations, lengths).to(features.device))[1]
    return EmbeddedRows(embeddings(features, locations), lengths, seen, vectors_ID)


def score_grid(model: InterBertForRetrieval, captions: EmbeddedRows, images: EmbeddedRows) -> torch.Tensor:
    """Log-odds that caption and image match, float32 [I, C]. ``model`` must be in evaluation mode (there is no dropout here)."""
    caption_numbers, image_numbers = torch.arange(len(captions.lengths)), torch.arange(len(images.lengths))
    caption_S, image_S = caption_numbers.repeat(len(image_numbers)), image_numbers.repeat_interleave(len(caption_numbers))
    return score_pairs(model, captions, images, caption_S, image_S).view(len(image_numbers), len(caption_numbers))


@torch.inference_mode()
def score_pairs(
    model: InterBertForRetrieval, captions: EmbeddedRows, images: EmbeddedRows, caption_S: torch.Tensor, image_S: torch.Tensor
) -> torch.Tensor:
    """Log-odds float32 [S] of the pairs that ``caption_S`` and ``image_S`` number (CPU int64 [S]), in any order; as `score_grid`."""
    layout = GridLayout.of(captions.lengths, images.lengths, caption_S, image_S, captions.rows_NH.device)
    encoder = model.interbert.encoder
    joint_NH = _interact(encoder.interaction, torch.cat([images.rows_NH, captions.rows_NH]), layout)
    text_NH, region_NH = joint_NH.index_select(0, layout.text_rows), joint_NH.index_select(0, layout.region_rows)
    whole = model.itm_similarity is not None and model.config.itc_pooling == "mean"
    first_text, mean_text = _last_states(encoder.text, text_NH, layout.text, whole)
    first_region, mean_region = _last_states(encoder.region, region_NH, layout.region, whole and images.seen_IF is None)
    pooled = model.interbert.text_pooler(first_text), model.interbert.region_pooler(first_region)
    compared_text = pooled[0] if mean_text is None else mean_text
    compared_region = pooled[1] if mean_region is None else mean_region
    if images.seen_IF is not None:
        compared_region = images.seen_IF.index_select(0, image_S.to(images.seen_IF.device))
    alone = None
    if captions.vectors_XD is not None and images.vectors_XD is not None:
        device = captions.vectors_XD.device
        alone = captions.vectors_XD.index_select(0, caption_S.to(device)), images.vectors_XD.index_select(0, image_S.to(device))
    logits_S2 = matching_logits(model, *pooled, (compared_text, compared_region), alone).float()
    return logits_S2[:, MATCHED] - logits_S2[:, 1 - MATCHED]


def _interact(layers: nn.ModuleList, unique_NH: torch.Tensor, layout: GridLayout) -> torch.Tensor:
    """Interaction layers over all pairs, [N, H]; the first one's projections are made before rows are repeated for every pair."""
    joint_NH = unique_NH.index_select(0, layout.source)
    for number, layer in enumerate(_transformer_layers(layers)):
        if number == 0:
            q_NH, k_NH, v_NH = (projected.index_select(0, layout.source) for projected in _qkv(layer.attention, unique_NH))
            joint_NH = _after_attention(layer, _attend(layer.attention, q_NH, k_NH, v_NH, layout.joint), joint_NH)
        else:
            joint_NH = layer(joint_NH, layout.joint)
    return joint_NH


def _last_states(
    layers: nn.ModuleList, x_NH: torch.Tensor, layout: SequenceLayout, whole: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sequences' first rows after all ``layers``, [S, H], and if ``whole`` the means; else the last layer computes no other row."""
    starts = _starts(layout)
    if not whole:
        return run_stream(layers, x_NH, layout, QueryRows.of(starts, layout)), None
    x_NH = run_stream(layers, x_NH, layout)
    return x_NH.index_select(0, starts), means(x_NH, layout.cu_seqlens)


def _starts(layout: SequenceLayout) -> torch.Tensor:
    """The first row of every sequence, int64 [S]."""
    return layout.cu_seqlens[:-1].long()


def _transformer_layers(layers: nn.ModuleList) -> Iterable[TransformerLayer]:
    """The same layers, under their own type: ``nn.ModuleList`` does not carry it."""
    for layer in layers:
        assert isinstance(layer, TransformerLayer)
        yield layer


def _qkv(attention: SelfAttention, x_NH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return attention.query(x_NH), attention.key(x_NH), attention.value(x_NH)


def _attend(attention: SelfAttention, q_NH: torch.Tensor, k_NH: torch.Tensor, v_NH: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    q, k, v = (x.unflatten(-1, (attention.heads, -1)) for x in (q_NH, k_NH, v_NH))
    return attention.output(varlen_attention(q, k, v, layout, 0.0, False).flatten(1))


def _after_attention(layer: TransformerLayer, attended_NH: torch.Tensor, residual_NH: torch.Tensor) -> torch.Tensor:
    """The rest of a layer: residual and norm, feed-forward, residual and norm."""
    x_NH = layer.attention_norm(attended_NH, residual_NH)
    return layer.output_norm(layer.output(layer.intermediate(x_NH)), x_NH)
