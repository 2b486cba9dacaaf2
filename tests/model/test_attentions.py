"""Attention as data: equal to loops over samples, heads and rows, whatever form computes the states."""

import math

import pytest
import torch
from torch import nn

from megainter import InterBertForMultipleChoice, InterBertForRetrieval, InterBertForSequenceClassification, InterBertModel
from megainter.model.encoder import SelfAttention, TransformerLayer
from tests.model.tiny import REGION_LENGTHS, TEXT_LENGTHS, packed_batch, padded, tiny_config, tiny_model

NAMES = ("interaction_attentions", "text_attentions", "region_attentions")


def looped(attention: SelfAttention, states_LH: torch.Tensor) -> torch.Tensor:
    """[h, L, L], one number after the other."""
    q, k = states_LH @ attention.query.weight.T + attention.query.bias, states_LH @ attention.key.weight.T + attention.key.bias
    length, size = states_LH.shape
    width = size // attention.heads
    shares = torch.zeros(attention.heads, length, length)
    for head in range(attention.heads):
        own = slice(head * width, (head + 1) * width)
        for i in range(length):
            scores = [float(q[i, own] @ k[j, own]) / math.sqrt(width) for j in range(length)]
            powers = [math.exp(score - max(scores)) for score in scores]
            shares[head, i] = torch.tensor([power / sum(powers) for power in powers])
    return shares


def run_alone(layers: nn.ModuleList, states_LH: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The looped shares of each layer for one sequence, and the states after all of them: post-norm BERT blocks from their weights."""
    found = []
    for layer in layers:
        assert isinstance(layer, TransformerLayer)
        shares = looped(layer.attention, states_LH)
        found.append(shares)
        values = layer.attention.value(states_LH).unflatten(-1, (layer.attention.heads, -1))
        gathered = torch.einsum("hij,jhd->ihd", shares, values).flatten(1)
        attended = layer.attention_norm(layer.attention.output(gathered), states_LH)
        states_LH = layer.output_norm(layer.output(layer.intermediate(attended)), attended)
    return found, states_LH


@torch.no_grad()
def test_attention_is_what_loops_over_samples_heads_and_rows_find() -> None:
    model = tiny_model()
    encoder, inputs = model.interbert.encoder, packed_batch()
    batch = padded(inputs, extra=2, fill=3.0)
    out = model(**batch, output_attentions=True)
    width_t, width_r = batch["input_ids"].shape[1], batch["region_features"].shape[1]
    assert [len(out[name]) for name in NAMES] == [2, 1, 2]
    assert out.interaction_attentions[0].shape == (4, 4, width_r + width_t, width_r + width_t)
    assert out.region_attentions[1].shape == (4, 3, width_r, width_r)

    texts, images = inputs.input_ids.split(list(TEXT_LENGTHS)), inputs.region_features.split(list(REGION_LENGTHS))
    types, places = inputs.token_type_ids.split(list(TEXT_LENGTHS)), inputs.region_locations.split(list(REGION_LENGTHS))
    for sample, (t, r) in enumerate(zip(TEXT_LENGTHS, REGION_LENGTHS, strict=True)):
        words = model.interbert.text_embeddings(texts[sample], torch.arange(t), types[sample])
        regions = model.interbert.region_embeddings(images[sample], places[sample])
        joint, states = run_alone(encoder.interaction, torch.cat([regions, words]))
        expected = joint, run_alone(encoder.text, states[r:])[0], run_alone(encoder.region, states[:r])[0]
        columns = [*range(r), *range(width_r, width_r + t)], list(range(t)), list(range(r))
        for name, layers, own in zip(NAMES, expected, columns, strict=True):
            for layer, shares in zip(out[name], layers, strict=True):
                torch.testing.assert_close(layer[sample][:, own][:, :, own], shares, rtol=1e-4, atol=1e-6)
                assert layer[sample].sum() == pytest.approx(len(shares) * len(own), rel=1e-4)  # nothing at padding


@torch.no_grad()
def test_asking_for_attention_changes_no_other_number_and_leaves_nothing_behind() -> None:
    model, batch = tiny_model(), padded(packed_batch(), extra=1)
    before = model(**batch)
    with_attention = model(**batch, output_attentions=True)
    assert before.interaction_attentions is None
    for name in ("text_logits", "region_logits", "itm_logits"):
        assert torch.equal(before[name], with_attention[name])
    assert not any(module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_padding_in_front_moves_the_columns_alone() -> None:
    model, batch = tiny_model(), padded(packed_batch())
    shifted = {name: torch.nn.functional.pad(tensor, (0, 0) * (tensor.dim() - 2) + (2, 0)) for name, tensor in batch.items()}
    plain, moved = model(**batch, output_attentions=True), model(**shifted, output_attentions=True)
    for name in NAMES[1:]:
        for a, b in zip(plain[name], moved[name], strict=True):
            torch.testing.assert_close(b[:, :, 2:, 2:], a)
    width = batch["region_features"].shape[1]
    columns = [*range(2, 2 + width), *range(width + 4, width + 4 + batch["input_ids"].shape[1])]
    for a, b in zip(plain.interaction_attentions, moved.interaction_attentions, strict=True):
        torch.testing.assert_close(b[:, :, columns][:, :, :, columns], a)


@torch.no_grad()
def test_one_side_alone_has_attention_too() -> None:
    model, batch = tiny_model(), padded(packed_batch())
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    out = model(**text, output_attentions=True)
    longest = batch["input_ids"].shape[1]
    assert out.interaction_attentions[0].shape == (4, 4, longest, longest)
    assert out.region_attentions[0].shape == (4, 3, 0, 0)
    torch.testing.assert_close(out.text_attentions[0].sum(-1), batch["attention_mask"][:, None].expand(-1, 4, -1).float())


@torch.no_grad()
def test_every_model_gives_the_attention_of_its_encoder() -> None:
    """The heads ask for a few rows of the last layers; where those look is told of all rows."""
    batch, base = padded(packed_batch()), tiny_model()
    expected = base(**batch, output_attentions=True)
    for kind in (InterBertModel, InterBertForRetrieval, InterBertForSequenceClassification):
        model = kind(tiny_config()).eval()
        getattr(model, "interbert", model).load_state_dict(base.interbert.state_dict())
        out = model(**batch, output_attentions=True)
        for name in NAMES:
            for a, b in zip(out[name], expected[name], strict=True):
                torch.testing.assert_close(a, b)
    chooser = InterBertForMultipleChoice(tiny_config()).eval()
    chooser.interbert.load_state_dict(base.interbert.state_dict())
    out = chooser(**{name: tensor.unflatten(0, (2, 2)) for name, tensor in batch.items()}, output_attentions=True)
    torch.testing.assert_close(out.text_attentions[0], expected.text_attentions[0])


def test_attention_under_autocast_is_computed_in_float32() -> None:
    model, batch = tiny_model(), padded(packed_batch())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**batch, output_attentions=True)
    assert out.interaction_attentions[0].dtype == torch.float32
    sums = out.text_attentions[0].sum(-1)[batch["attention_mask"].bool()[:, None].expand(-1, 4, -1)]
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=0)
