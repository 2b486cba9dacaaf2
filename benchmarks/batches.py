"""Batches of realistic lengths for the benchmarks, packed and padded with the same content."""

import numpy as np
import torch

from benchmarks.peers import PaddedBatch
from megainter.data.packed import PackedInputs
from megainter.data.stream.order import share_out
from megainter.tasks.pretraining.batches import PretrainBatch

TEXT, REGIONS, FEATURES, CLASSES, VOCABULARY = 36, 37, 2048, 1601, 30522
# WordPiece lengths, [CLS] and [SEP] included, of the 30,000 English training captions of Flickr8k: captions of length 4, 5, ..., 36.
CAPTIONS_BY_LENGTH = (
    7, 22, 119, 323, 787, 1691, 2256, 2608, 3017, 3052, 3099, 2839, 2435, 2018, 1549, 1160, 837, 652, 469, 310, 232, 175, 99, 72, 55, 38,
    28, 12, 11, 10, 2, 7, 9,
)  # fmt: skip


# Bottom-up attention's published features with 10 to 100 regions an image take 23, 7.3 and 15 GB where those with 36 take 25, 9 and 17 GB
# (its README: COCO train and val, test 2014, test 2015): 33, 29 and 32 regions on average. The spread is not published: a gamma
# distribution of shape 2 above the least of 10 is taken (a third of the images then has more than 36).
FEWEST_REGIONS, MEAN_REGIONS, MOST_REGIONS = 10, 33, 100


def lengths(samples: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Text and region lengths int64 [S]: captions as in Flickr8k; 10 to 100 detected regions, the first 36 kept, and the global one."""
    share = np.array(CAPTIONS_BY_LENGTH) / sum(CAPTIONS_BY_LENGTH)
    text = rng.choice(np.arange(4, 4 + len(share)), samples, p=share)
    detected = FEWEST_REGIONS + rng.gamma(2.0, (MEAN_REGIONS - FEWEST_REGIONS) / 2, samples).round().astype(np.int64)
    regions = np.minimum(detected.clip(max=MOST_REGIONS), REGIONS - 1) + 1
    return torch.from_numpy(text), torch.from_numpy(regions)


def make_batch(samples: int, seed: int, rank: int = 0, ranks: int = 1) -> PretrainBatch:
    """A packed batch with a third of the text and a quarter of the regions masked (as the official recipe does), half the pairs matched.

    With ``ranks`` one rank's share of the global batch, dealt by length as the trainer deals.
    """
    rng = np.random.default_rng(seed)
    text, regions = lengths(samples, rng)
    if ranks > 1:
        own = share_out((text + regions).numpy(), ranks, 1)[rank][0]
        text, regions, samples = text[own], regions[own], len(own)
    rows, tokens = int(regions.sum()), int(text.sum())
    first = torch.zeros(rows, dtype=torch.bool)
    first[regions.cumsum(0) - regions] = True
    itm = torch.from_numpy(rng.integers(0, 2, samples))
    edge = torch.zeros(tokens, dtype=torch.bool)
    edge[torch.cat([text.cumsum(0) - 1, text.cumsum(0) - text])] = True  # [CLS] and [SEP] stay
    masked_text = (torch.from_numpy(rng.random(tokens)) < 1 / 3) & ~edge
    masked_regions = (torch.from_numpy(rng.random(rows)) < 1 / 4) & ~first
    features = torch.from_numpy(rng.random((rows, FEATURES), dtype=np.float32))
    features[masked_regions] = 0
    corners = torch.from_numpy(rng.random((rows, 4), dtype=np.float32))
    scored = (masked_regions & (itm.repeat_interleave(regions) == 0)).nonzero()[:, 0]
    targets = torch.from_numpy(rng.random((len(scored), CLASSES), dtype=np.float32)).mul(8).softmax(-1)
    ids = torch.from_numpy(rng.integers(1000, VOCABULARY, tokens))
    inputs = PackedInputs(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        text_lengths=text,
        region_features=features,
        region_locations=torch.cat([corners, corners[:, :1] * corners[:, 1:2]], 1),
        region_lengths=regions,
    )
    positions = masked_text.nonzero()[:, 0]
    return PretrainBatch(
        inputs=inputs, msm_positions=positions, msm_labels=ids[positions], mrm_positions=scored, mrm_targets=targets, itm_labels=itm
    )


def pad_batch(batch: PretrainBatch) -> PaddedBatch:
    """The same batch on 36 text and 37 region positions."""
    inputs = batch.inputs
    text, regions = _places(inputs.text_lengths, TEXT), _places(inputs.region_lengths, REGIONS)
    labels = torch.full((len(inputs.input_ids),), -100)
    labels[batch.msm_positions] = batch.msm_labels
    asked, targets = torch.zeros(len(inputs.region_features)), torch.zeros(len(inputs.region_features), CLASSES)
    asked[batch.mrm_positions] = 1
    targets[batch.mrm_positions] = batch.mrm_targets
    return PaddedBatch(
        input_ids=_spread(inputs.input_ids, text),
        text_mask=text.float(),
        features=_spread(inputs.region_features, regions),
        locations=_spread(inputs.region_locations, regions),
        region_mask=regions.float(),
        msm_labels=_spread(labels, text, -100),
        mrm_labels=_spread(asked, regions)[:, 1:],
        mrm_targets=_spread(targets, regions)[:, 1:],
        itm_labels=batch.itm_labels,
    )


def _places(counts: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(width) < counts[:, None]


def _spread(values: torch.Tensor, places: torch.Tensor, filler: int = 0) -> torch.Tensor:
    padded = torch.full((*places.shape, *values.shape[1:]), filler, dtype=values.dtype)
    padded[places] = values
    return padded
