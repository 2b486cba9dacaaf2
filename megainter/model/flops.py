"""How many floating-point operations a forward pass needs: for model FLOP utilisation and for planning.

Multiply and add count as two; only matrix products count (as is usual), padding does not: this is the work the model needs, not
what a kernel happens to spend. A training step needs three times the forward pass.
"""

from dataclasses import dataclass, replace

import torch

from megainter.model.configuration import InterBertConfig


@dataclass(frozen=True)
class BatchCounts:
    """What the cost of a packed batch depends on. Additive: the counts of a global batch are the sum of its micro-batches'.

    ``*_squares`` are sums over samples of the squared length of the text, of the regions, and of both together.
    """

    samples: int
    text_tokens: int
    regions: int
    text_squares: int
    region_squares: int
    joint_squares: int
    masked_tokens: int
    masked_regions: int

    @classmethod
    def of(cls, text_lengths: torch.Tensor, region_lengths: torch.Tensor, masked_tokens: int, masked_regions: int) -> "BatchCounts":
        """Counts for CPU int64 lengths [S]; ``masked_*`` are the rows at which MSM and MRM logits are computed."""
        sizes = [text_lengths.sum(), region_lengths.sum()]
        squares = [lengths.square().sum() for lengths in (text_lengths, region_lengths, text_lengths + region_lengths)]
        return cls(len(text_lengths), *map(int, sizes + squares), masked_tokens, masked_regions)  # type: ignore[call-arg]

    def __add__(self, other: "BatchCounts") -> "BatchCounts":
        return BatchCounts(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def forward_flops(config: InterBertConfig, counts: BatchCounts) -> int:
    """Floating-point operations of one forward pass of the pretraining model over a batch with these counts."""
    hidden, pooled, samples = config.hidden_size, config.pooler_size, counts.samples
    whole = config.itm_similarity and config.itc_pooling == "mean"
    asked_text = counts.text_tokens if whole else samples + counts.masked_tokens
    asked_regions = counts.regions if whole and not config.itc_of_features else samples + counts.masked_regions
    layers = _layers(config, counts, asked_text, asked_regions)
    similarity = 2 * samples * sum(_vector_widths(config)) * config.itc_size if config.itm_similarity else 0
    poolers = 2 * samples * (2 * hidden * pooled + 2 * pooled)  # both poolers, and the matching head
    msm = 2 * counts.masked_tokens * hidden * (hidden + config.vocab_size)
    mrm = 2 * counts.masked_regions * hidden * (hidden + config.region_target_size)
    return layers + poolers + msm + mrm + similarity + (_alone(config, *_apart(counts)) if config.itm_vectors else 0)


def _apart(counts: BatchCounts) -> tuple[BatchCounts, BatchCounts]:
    """The texts of pairs alone, and their images alone."""
    nothing = {"masked_tokens": 0, "masked_regions": 0}
    texts = replace(counts, regions=0, region_squares=0, joint_squares=counts.text_squares, **nothing)
    return texts, replace(counts, text_tokens=0, text_squares=0, joint_squares=counts.region_squares, **nothing)


def alone_flops(config: InterBertConfig, text_lengths: torch.Tensor, region_lengths: torch.Tensor) -> int:
    """Operations of one pass of texts alone and images alone, CPU int64 lengths [T] and [I], to their vectors of contrast."""
    no_text, no_regions = torch.zeros_like(region_lengths), torch.zeros_like(text_lengths)
    return _alone(config, BatchCounts.of(text_lengths, no_regions, 0, 0), BatchCounts.of(no_text, region_lengths, 0, 0))


def _alone(config: InterBertConfig, texts: BatchCounts, images: BatchCounts) -> int:
    passing = (texts, images) if not config.itc_of_features else (texts,)  # the layers

    first = config.itc_pooling == "first"
    asked = [(counts.samples, counts.samples) if first else (counts.text_tokens, counts.regions) for counts in passing]
    layers = sum(_layers(config, counts, *rows) for counts, rows in zip(passing, asked, strict=True))
    poolers = 2 * sum(counts.samples for counts in passing) * config.hidden_size * config.pooler_size if first else 0
    of_text, of_regions = _vector_widths(config)
    return layers + poolers + 2 * (texts.samples * of_text + images.samples * of_regions) * config.itc_size


def _vector_widths(config: InterBertConfig) -> tuple[int, int]:
    """How wide is what the vectors of a text and of an image are made of."""
    states = config.pooler_size if config.itc_pooling == "first" else config.hidden_size
    return states, config.region_feature_size if config.itc_of_features else states


def _layers(config: InterBertConfig, counts: BatchCounts, asked_text: int, asked_regions: int) -> int:
    """Embeddings of the regions and all layers, of which each stream's last computes the asked rows alone."""
    text, regions = counts.text_tokens, counts.regions
    return (
        2 * regions * config.hidden_size * (config.region_feature_size + 5)
        + config.num_interaction_layers * _layer(config, text + regions, text + regions, counts.joint_squares)
        + _stream(config, config.num_text_layers, text, asked_text, counts.text_squares)
        + _stream(config, config.num_region_layers, regions, asked_regions, counts.region_squares)
    )


def _stream(config: InterBertConfig, layers: int, rows: int, asked: int, squares: int) -> int:
    """Layers over ``rows``, of which the last computes the ``asked`` rows alone: those of masked places, and each sample's first."""
    if not layers:
        return 0
    return (layers - 1) * _layer(config, rows, rows, squares) + _layer(config, rows, min(asked, rows), squares)


def _layer(config: InterBertConfig, rows: int, asked: int, squares: int) -> int:
    """Keys and values of all rows; query, output and two feed-forward matrices of those asked for; scores and their product with the
    values per pair of rows, of which ``squares`` are the number where all rows ask."""
    hidden = config.hidden_size
    matrices = 2 * hidden * (2 * hidden * rows + (2 * hidden + 2 * config.intermediate_size) * asked)
    return matrices + (4 * squares * hidden * asked // rows if rows else 0)
