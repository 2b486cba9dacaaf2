"""The classification head: text alone, one image and two, and its three losses, against the same sums written out."""

import pytest
import torch
import torch.nn.functional as F

from megainter import InterBertForSequenceClassification
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.model.architecture import classification_losses
from tests.model.tiny import packed_batch, padded, samples_of, tiny_config


def model(**changes: object) -> InterBertForSequenceClassification:
    torch.manual_seed(0)
    return InterBertForSequenceClassification(tiny_config(initializer_range=0.3, **changes)).eval()


def text_twice(inputs: PackedInputs) -> PackedInputs:
    """Four samples as two examples of two images: samples 1 and 3 take the texts of 0 and 2."""
    ids, types = (list(t.split(inputs.text_lengths.tolist())) for t in (inputs.input_ids, inputs.token_type_ids))
    ids[1], ids[3], types[1], types[3] = ids[0], ids[2], types[0], types[2]
    lengths = inputs.text_lengths[[0, 0, 2, 2]]
    return PackedInputs(torch.cat(ids), torch.cat(types), lengths, inputs.region_features, inputs.region_locations, inputs.region_lengths)


@torch.no_grad()
def test_two_images_in_both_doors() -> None:
    ours, inputs = model(num_labels=3, num_images=2), text_twice(packed_batch())
    logits = ours.score_packed(inputs)
    assert logits.shape == (2, 3)
    batch, texts = padded(inputs), ("input_ids", "token_type_ids", "attention_mask")
    both = {name: t[::2] if name in texts else t.unflatten(0, (2, 2)) for name, t in batch.items()}
    torch.testing.assert_close(ours(**both).logits, logits, atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match=r"\[B, 2, R, F\]"):
        ours(**batch)


@torch.no_grad()
def test_two_images_are_told_apart_and_meet_in_one_layer() -> None:
    """Logits change when an example's images change places, and not by what another example shows."""
    ours, inputs = model(num_labels=2, num_images=2), text_twice(packed_batch())
    logits = ours.score_packed(inputs)
    assert not torch.allclose(ours.score_packed(samples_of(inputs, [1, 0, 2, 3]))[0], logits[0], atol=1e-3)
    torch.testing.assert_close(ours.score_packed(samples_of(inputs, [2, 3, 0, 1])), logits.flip(0), atol=1e-5, rtol=0)
    encoded = ours.interbert.encode(inputs)
    pooled = (encoded.pooled_text * encoded.pooled_region).view(2, 2, -1)
    head = ours.classifier
    hidden = F.gelu(torch.cat([pooled[:, 0], pooled[:, 1]], dim=1) @ head.hidden.weight.T + head.hidden.bias)
    torch.testing.assert_close(hidden @ head.output.weight.T + head.output.bias, logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_alone_does_not_hear_of_regions() -> None:
    """Nothing in the region stream has a say in the logits of a text."""
    ours, inputs = model(num_labels=2), packed_batch(regions=(0, 0, 0, 0))
    logits = ours.score_packed(inputs)
    for name, parameter in ours.named_parameters():
        if "region" in name:
            parameter.normal_()
    assert torch.equal(ours.score_packed(inputs), logits)


def test_losses_are_the_sums_written_out() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, soft = torch.randn(4, 3, generator=generator), torch.rand(4, 3, generator=generator)
    classes = torch.tensor([2, 0, 1, 1])
    config = tiny_config(num_labels=3)
    expected = [-float(row.softmax(0)[label].log()) for row, label in zip(logits, classes, strict=True)]
    assert classification_losses(logits, classes, config).tolist() == pytest.approx(expected, abs=1e-6)
    config.problem_type = "multi_label_classification"
    chance = logits.sigmoid()
    expected = (-(soft * chance.log() + (1 - soft) * (1 - chance).log())).sum(1).tolist()
    assert classification_losses(logits, soft, config).tolist() == pytest.approx(expected, abs=1e-5)
    config = tiny_config(num_labels=1)
    assert classification_losses(logits[:, :1], soft[:, 0], config).tolist() == pytest.approx(((logits[:, 0] - soft[:, 0]) ** 2).tolist())


def test_the_padded_door_gives_the_mean_loss() -> None:
    ours, batch = model(num_labels=3), padded(packed_batch())
    labels = torch.tensor([0, 2, 1, 0])
    out = ours(**batch, labels=labels)
    assert out.loss.item() == pytest.approx(F.cross_entropy(out.logits, labels).item(), abs=1e-6)
