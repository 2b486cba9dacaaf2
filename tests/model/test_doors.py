"""One core behind two doors: packed and padded agree, and no sample depends on what it is batched with."""

import pytest
import torch

from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.model.packing import PackedLayout
from tests.model.tiny import every_row, packed_batch, padded, samples_of, tiny_model

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


VECTORS = {"itc_size": 5, "itm_similarity": True}
STANDARDIZED = {"region_mean": [0.5] * 10, "region_deviation": [0.25] * 5 + [2.0] * 5, "region_feature_dropout_prob": 0.5}
OF_FEATURES = VECTORS | {"itc_pooling": "mean", "itc_regions": "first_feature"}
SIMILARITY = [{}, VECTORS, VECTORS | {"itc_pooling": "mean"}, OF_FEATURES | {"itc_regions": "mean_feature"}, STANDARDIZED]
SIMILARITY += [{"itc_size": 5, "itm_vectors": True}, OF_FEATURES | {"itm_vectors": True}]


@pytest.mark.parametrize("changes", SIMILARITY)
def test_packed_and_padded_agree(changes: dict) -> None:
    model, inputs = tiny_model(**changes), packed_batch()
    scores = model.score_packed(inputs, *every_row(inputs))
    batch = padded(inputs, extra=2)
    out = model(**batch)
    torch.testing.assert_close(out.text_logits[batch["attention_mask"].bool()], scores.msm_logits, **CLOSE)
    torch.testing.assert_close(out.region_logits[batch["region_mask"].bool()], scores.mrm_logits, **CLOSE)
    torch.testing.assert_close(out.itm_logits, scores.itm_logits, **CLOSE)


@pytest.mark.parametrize("changes", SIMILARITY)
def test_only_what_is_asked_equals_the_rows_of_all(changes: dict) -> None:
    model, inputs = tiny_model(**changes), packed_batch()
    everything = model.score_packed(inputs, *every_row(inputs))
    msm, mrm = torch.tensor([1, 6, 20]), torch.tensor([12, 2])
    some = model.score_packed(inputs, msm, mrm)
    torch.testing.assert_close(some.msm_logits, everything.msm_logits[msm], **CLOSE)
    torch.testing.assert_close(some.mrm_logits, everything.mrm_logits[mrm], **CLOSE)
    none = model.score_packed(inputs, msm[:0], mrm[:0])
    assert none.msm_logits.shape == (0, 50)
    assert none.mrm_logits.shape == (0, 7)
    for asked in (some, none):
        torch.testing.assert_close(asked.itm_logits, everything.itm_logits, **CLOSE)


@pytest.mark.parametrize("order", [[0], [1], [2], [3], [3, 1, 0, 2], [2, 2]], ids=str)
def test_a_sample_does_not_depend_on_its_batch(order: list[int]) -> None:
    model, inputs = tiny_model(), packed_batch()
    whole = model.interbert.encode(inputs)
    part = model.interbert.encode(samples_of(inputs, order))
    text, regions = whole.text_states.split(inputs.text_lengths.tolist()), whole.region_states.split(inputs.region_lengths.tolist())
    torch.testing.assert_close(part.text_states, torch.cat([text[i] for i in order]), **CLOSE)
    torch.testing.assert_close(part.region_states, torch.cat([regions[i] for i in order]), **CLOSE)
    torch.testing.assert_close(part.pooled_text, whole.pooled_text[order], **CLOSE)
    torch.testing.assert_close(part.pooled_region, whole.pooled_region[order], **CLOSE)


def test_what_lies_in_padding_does_not_matter() -> None:
    model, inputs = tiny_model(), packed_batch()
    clean, dirty = model(**padded(inputs, extra=3)), model(**padded(inputs, extra=3, fill=9.0))
    assert torch.equal(clean.text_logits, dirty.text_logits)
    assert torch.equal(clean.region_logits, dirty.region_logits)
    assert torch.equal(clean.itm_logits, dirty.itm_logits)


def test_padding_on_the_left_is_padding_too() -> None:
    model, inputs = tiny_model(), packed_batch()
    batch = padded(inputs)
    flipped = dict(batch)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        flipped[name] = torch.stack(
            [torch.cat([row[n:], row[:n]]) for row, n in zip(batch[name], inputs.text_lengths.tolist(), strict=True)]
        )
    a, b = model(**batch), model(**flipped)
    assert torch.equal(a.text_logits[batch["attention_mask"].bool()], b.text_logits[flipped["attention_mask"].bool()])


def test_regions_alone_are_a_set() -> None:
    """Through both doors; a region has no position, so that its state goes where it goes."""
    model, inputs = tiny_model(), packed_batch(text=(0,), regions=(6,))
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    alone = {name: tensor for name, tensor in padded(inputs, extra=2).items() if name.startswith("region")}
    moved = alone | {name: alone[name][:, torch.cat([order, torch.tensor([6, 7])])] for name in ("region_features", "region_locations")}
    states = model.interbert.encode(inputs).region_states
    torch.testing.assert_close(model.interbert(**alone).region_states[0, :6], states, **CLOSE)
    torch.testing.assert_close(model.interbert(**moved).region_states[0, :6], states[order], **CLOSE)


def test_omitted_masks_and_token_types() -> None:
    model, inputs = tiny_model(), packed_batch(text=(4, 4), regions=(3, 3))
    batch = padded(inputs) | {"token_type_ids": torch.zeros(2, 4, dtype=torch.int64)}
    kept = ("input_ids", "region_features", "region_locations")
    torch.testing.assert_close(model(**{k: batch[k] for k in kept}).itm_logits, model(**batch).itm_logits)


def test_to_moves_everything_but_the_lengths() -> None:
    moved = packed_batch().to("meta")
    assert {moved.input_ids.device.type, moved.region_features.device.type, moved.region_locations.device.type} == {"meta"}
    assert {moved.text_lengths.device.type, moved.region_lengths.device.type} == {"cpu"}


def test_layout_puts_regions_before_text_within_each_sample() -> None:
    inputs = packed_batch(text=(2, 1), regions=(1, 2))
    layout = PackedLayout.of(inputs, 12)
    # cat(regions, text) is r0 | r1 r1' | t0 t0' | t1
    assert layout.joint_order.tolist() == [0, 3, 4, 1, 2, 5]
    assert layout.region_rows.tolist() == [0, 3, 4]
    assert layout.text_rows.tolist() == [1, 2, 5]
    assert layout.text_starts.tolist() == [0, 2]
    assert layout.region_starts.tolist() == [0, 1]


def broken(**changes: torch.Tensor) -> PackedInputs:
    return PackedInputs(**{**vars(packed_batch()), **changes})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (broken(text_lengths=torch.tensor([5, 9, 1, 8])), "lengths say 23 tokens"),
        (broken(region_lengths=torch.tensor([3, 1, 10])), "3 images"),
        (packed_batch(text=(3, 4), regions=(2, 0)), "sample 1 has no regions"),
        (packed_batch(text=(13,), regions=(2,)), "max_position_embeddings = 12"),
    ],
    ids=["token count", "sample count", "mixed modalities", "long text"],
)
def test_packed_batches_that_contradict_themselves(inputs: PackedInputs, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny_model().interbert.encode(inputs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"input_ids": None, "region_features": None}, "neither"),
        ({"region_locations": None}, "belong together"),
        ({"region_features": torch.zeros(4, 6, 11)}, "region_features"),
        ({"attention_mask": torch.ones(4, 3)}, "attention_mask"),
        ({"mrm_labels": torch.ones(4, 5)}, "mrm_targets"),
    ],
    ids=["nothing", "half the regions", "feature size", "mask shape", "half the labels"],
)
def test_padded_batches_that_contradict_themselves(changes: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny_model()(**{**padded(packed_batch()), **changes})


@pytest.mark.parametrize("layers", [(2, 2), (1, 0), (0, 2)], ids=str)
@pytest.mark.parametrize(("text", "regions"), [([5, 0, 3, 9], [2, 1, 7]), ([], []), (list(range(17)), [10])], ids=["some", "none", "all"])
def test_rows_asked_for_are_those_of_the_whole_encoding(layers: tuple[int, int], text: list[int], regions: list[int]) -> None:
    model = tiny_model(num_text_layers=layers[0], num_region_layers=layers[1]).eval()
    inputs, wanted = packed_batch(text=(6, 4, 7), regions=(4, 3, 5)), (torch.tensor(text).long(), torch.tensor(regions).long())
    whole, some = model.interbert.encode(inputs), model.interbert.encode_rows(inputs, *wanted)
    expected = whole.text_states[wanted[0]], whole.region_states[wanted[1]], whole.pooled_text, whole.pooled_region
    gradients = []
    for states in (expected, some[:4]):
        model.zero_grad(set_to_none=True)
        sum((part * torch.arange(1.0, 1 + part.numel()).view_as(part).cos()).sum() for part in states).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for part, other in zip(some[:4], expected, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
