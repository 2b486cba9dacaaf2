"""Counted FLOPs against PyTorch's own counter on a batch without padding."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megainter.model.flops import BatchCounts, alone_flops, forward_flops
from tests.model.tiny import packed_batch, tiny_model


@pytest.mark.parametrize("objective", ["class", "feature"])
def test_equals_the_counter(objective: str) -> None:
    model, inputs = tiny_model(region_objective=objective), packed_batch(text=(6, 6, 6), regions=(4, 4, 4))
    msm, mrm = torch.tensor([1, 3, 8, 9, 13, 17]), torch.tensor([1, 5, 9])  # as many of each sample: no padding of the rows asked for
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.score_packed(inputs, msm, mrm)
    counts = BatchCounts.of(inputs.text_lengths, inputs.region_lengths, len(msm), len(mrm))
    assert forward_flops(model.config, counts) == counter.get_total_flops()


@pytest.mark.parametrize("of_regions", ["states", "mean_feature", "first_feature"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_sides_alone_equal_the_counter(pooling: str, of_regions: str) -> None:
    """A batch of texts alone and one of images alone: in one batch the CPU's attention would pad the shorter side."""
    model = tiny_model(itc_size=5, itc_pooling=pooling, itc_regions=of_regions)
    text, regions = torch.full((3,), 6), torch.full((2,), 4)
    none = torch.zeros(0, dtype=torch.int64)
    batches = packed_batch(text=(6, 6, 6), regions=(0, 0, 0)), packed_batch(text=(0, 0), regions=(4, 4))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for batch in batches:
            model.vectors_packed(batch)
    assert alone_flops(model.config, text, regions) == counter.get_total_flops()
    assert alone_flops(model.config, text, none) + alone_flops(model.config, none, regions) == counter.get_total_flops()


def test_counts_add_up() -> None:
    config = tiny_model().config
    text, regions = torch.tensor([3, 9, 4, 5]), torch.tensor([2, 7, 1, 3])
    whole = BatchCounts.of(text, regions, 7, 3)
    parts = BatchCounts.of(text[:1], regions[:1], 5, 0) + BatchCounts.of(text[1:], regions[1:], 2, 3)
    assert parts == whole
    assert forward_flops(config, parts) == forward_flops(config, whole)
