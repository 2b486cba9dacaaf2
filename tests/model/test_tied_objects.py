"""Words tied to the regions they name: the same through both doors, nothing where it is off, the sum of both embeddings where it is on."""

from dataclasses import replace

import pytest
import torch

from megainter import InterBertForMultipleChoice, InterBertModel
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.model.interbert import add_named_regions
from megainter.model.packing import PackedLayout
from tests.model.tiny import packed_batch, padded, tiny_config, tiny_model

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
# Texts of 5, 9, 1 and 7 tokens, images of 3, 1, 6 and 4 regions: column of the region that a token names, by sample.
NAMED = {(0, 2): 1, (0, 3): 1, (1, 0): 0, (2, 0): 5, (3, 4): 2, (3, 6): 3}


def tied_batch() -> PackedInputs:
    inputs = packed_batch()
    rows = torch.full((len(inputs.input_ids),), -1)
    text_starts, region_starts = (lengths.cumsum(0) - lengths for lengths in (inputs.text_lengths, inputs.region_lengths))
    for (sample, token), region in NAMED.items():
        rows[text_starts[sample] + token] = region_starts[sample] + region
    return replace(inputs, text_regions=rows)


def columns(width: int) -> torch.Tensor:
    table = torch.full((4, width), -1)
    for (sample, token), region in NAMED.items():
        table[sample, token] = region
    return table


def test_off_changes_no_bit() -> None:
    model = tiny_model()
    with_names, without = model.interbert.encode(tied_batch()), model.interbert.encode(packed_batch())
    assert all(torch.equal(a, b) for a, b in zip(with_names[:4], without[:4], strict=True))


def test_on_and_naming_nothing_changes_no_bit() -> None:
    model = tiny_model()
    without = model.interbert.encode(packed_batch())
    model.config.tie_objects = True
    for named in (None, torch.full((22,), -1)):
        encoded = model.interbert.encode(replace(packed_batch(), text_regions=named))
        assert all(torch.equal(a, b) for a, b in zip(encoded[:4], without[:4], strict=True))


def test_a_named_region_is_added_to_the_word() -> None:
    """Against the encoder run on sums made by a plain loop."""
    model, inputs = tiny_model(tie_objects=True), tied_batch()
    core = model.interbert
    layout = PackedLayout.of(inputs, 12)
    text = core.text_embeddings(inputs.input_ids, layout.text.position, inputs.token_type_ids).clone()
    regions = core.region_embeddings(inputs.region_features, inputs.region_locations)
    for token, row in enumerate(inputs.text_regions.tolist()):
        if row >= 0:
            text[token] = text[token] + regions[row]
    expected, _ = core.encoder(text, regions, layout)
    torch.testing.assert_close(core.encode(inputs).text_states, expected, **CLOSE)
    assert (core.encode(packed_batch()).text_states - expected).abs().max() > 0.01, "the named regions make no difference"


def test_gradients_reach_the_region_through_its_word() -> None:
    model, inputs = tiny_model(tie_objects=True), tied_batch()
    features = inputs.region_features.clone().requires_grad_()
    regions = model.interbert.region_embeddings(features, inputs.region_locations)
    words = torch.zeros(len(inputs.input_ids), 24)
    add_named_regions(words, regions, inputs.text_regions).square().sum().backward()
    touched = {int(row) for row in features.grad.abs().sum(1).nonzero()[:, 0]}
    assert touched == set(inputs.text_regions[inputs.text_regions >= 0].tolist())


@pytest.mark.parametrize("extra", [0, 3])
def test_padded_and_packed_agree(extra: int) -> None:
    model, inputs = tiny_model(tie_objects=True), tied_batch()
    batch = padded(inputs, extra=extra)
    out = model.interbert(**batch, text_regions=columns(batch["input_ids"].shape[1]))
    encoded = model.interbert.encode(inputs)
    torch.testing.assert_close(out.text_states[batch["attention_mask"].bool()], encoded.text_states, **CLOSE)
    torch.testing.assert_close(out.pooled_region, encoded.pooled_region, **CLOSE)


def test_choices_take_names_too() -> None:
    torch.manual_seed(1)
    model, inputs = InterBertForMultipleChoice(tiny_config(initializer_range=0.15, tie_objects=True)).eval(), tied_batch()
    batch = {name: tensor.view(2, 2, *tensor.shape[1:]) for name, tensor in padded(inputs).items()}
    named = columns(9).view(2, 2, 9)
    torch.testing.assert_close(model(**batch, text_regions=named).logits.flatten(), model.score_packed(inputs), **CLOSE)
    assert (model(**batch).logits - model(**batch, text_regions=named).logits).abs().max() > 1e-4


@pytest.mark.parametrize(("place", "region"), [((0, 0), 3), ((0, 0), 9), ((3, 6), 6)], ids=["padding", "too far", "last sample"])
def test_a_name_for_no_region_is_an_error(place: tuple[int, int], region: int) -> None:
    batch = padded(packed_batch())
    named = columns(9)
    named[place] = region
    with pytest.raises(UsageError, match="text_regions names a region"):
        tiny_model(tie_objects=True).interbert(**batch, text_regions=named)


def test_shapes_must_fit() -> None:
    with pytest.raises(UsageError, match="text_regions has 3 entries"):
        tiny_model(tie_objects=True).interbert.encode(replace(packed_batch(), text_regions=torch.zeros(3, dtype=torch.int64)))
    with pytest.raises(UsageError, match=r"text_regions has shape \[4, 3\]"):
        tiny_model(tie_objects=True).interbert(**padded(packed_batch()), text_regions=torch.zeros(4, 3, dtype=torch.int64))


def test_the_switch_is_kept_with_the_model(tmp_path) -> None:
    tiny_model(tie_objects=True).save_pretrained(tmp_path)
    assert InterBertModel.from_pretrained(tmp_path).config.tie_objects is True
    with pytest.raises(UsageError, match="tie_objects is 1"):
        tiny_config(tie_objects=1)
