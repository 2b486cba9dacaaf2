"""Losses against definitions written out, gradients, precision, checkpointing of activations."""

import math

import pytest
import torch

from megainter.kernels import cross_entropy_sum, soft_label_kl_sum
from megainter.training.loop import _recompute_activations
from tests.model.tiny import REGION_LENGTHS, TEXT_LENGTHS, every_row, packed_batch, padded, tiny_model


def labelled(seed: int = 0, classes: int = 7) -> dict[str, torch.Tensor]:
    """A padded batch with labels; sample 2 is mismatched, and has masked regions that must not count."""
    generator = torch.Generator().manual_seed(seed)
    batch = padded(packed_batch(seed))
    text, regions = batch["attention_mask"].bool(), batch["region_mask"].bool()[:, 1:]
    chosen = text & (torch.rand(text.shape, generator=generator) < 0.4)
    masked = (torch.rand(regions.shape, generator=generator) < 0.7).long()
    return batch | {
        "msm_labels": torch.randint(0, 50, text.shape, generator=generator).masked_fill(~chosen, -100),
        "mrm_labels": masked,  # set at padding too: it must not count there either
        "mrm_targets": torch.rand(*regions.shape, classes, generator=generator).softmax(-1),
        "itm_labels": torch.tensor([0, 0, 1, 0]),
    }


def test_losses_by_definition() -> None:
    model, batch = tiny_model(), labelled()
    with torch.no_grad():
        out = model(**batch)
    msm, mrm = [], []
    for b, (length, regions) in enumerate(zip(TEXT_LENGTHS, REGION_LENGTHS, strict=True)):
        for t in range(length):
            if (label := int(batch["msm_labels"][b, t])) != -100:
                msm.append(-float(out.text_logits[b, t].double().log_softmax(-1)[label]))
        for r in range(regions - 1):
            if batch["mrm_labels"][b, r] == 1 and batch["itm_labels"][b] == 0:
                target, log_probs = batch["mrm_targets"][b, r].double(), out.region_logits[b, r + 1].double().log_softmax(-1)
                mrm.append(float((target * (target.log() - log_probs)).sum()))
    itm = [-float(row.double().log_softmax(-1)[label]) for row, label in zip(out.itm_logits, batch["itm_labels"], strict=True)]
    assert len(msm) > 3
    assert len(mrm) > 2
    assert float(out.msm_loss) == pytest.approx(sum(msm) / len(msm), rel=1e-5)
    assert float(out.mrm_loss) == pytest.approx(sum(mrm) / len(mrm), rel=1e-5)
    assert float(out.itm_loss) == pytest.approx(sum(itm) / 4, rel=1e-5)


def test_feature_objective_is_the_squared_distance_per_region() -> None:
    model, batch = tiny_model(region_objective="feature"), labelled(classes=10)
    with torch.no_grad():
        out = model(**batch)
    assert out.region_logits.shape[-1] == 10
    counted = (batch["mrm_labels"] == 1) & (batch["itm_labels"] == 0)[:, None] & batch["region_mask"].bool()[:, 1:]
    distances = (out.region_logits[:, 1:] - batch["mrm_targets"]).square().sum(-1)[counted]
    assert float(out.mrm_loss) == pytest.approx(float(distances.mean()), rel=1e-5)


def test_losses_are_given_for_the_labels_given() -> None:
    model, batch = tiny_model(), labelled()
    out = model(**padded(packed_batch()))
    assert out.loss is out.msm_loss is out.mrm_loss is out.itm_loss is None
    del batch["msm_labels"], batch["itm_labels"]
    out = model(**batch)
    assert out.msm_loss is out.itm_loss is None
    assert torch.equal(out.loss, out.mrm_loss)


def test_logits_can_be_left_out() -> None:
    model, batch = tiny_model(), labelled()
    full, short = model(**batch), model(**batch, output_logits=False)
    assert short.text_logits is short.region_logits is None
    torch.testing.assert_close(short.loss, full.loss)


def test_nothing_masked_gives_zero_and_not_nan() -> None:
    model, batch = tiny_model(), labelled()
    batch["msm_labels"].fill_(-100)
    batch["mrm_labels"].zero_()
    out = model(**batch)
    assert out.msm_loss.item() == out.mrm_loss.item() == 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("text", "regions"), [((4, 6), (3, 1)), ((4, 6), (0, 0)), ((0, 0), (3, 1))], ids=["both", "text alone", "regions alone"]
)
def test_every_parameter_has_a_gradient_whatever_is_masked(text: tuple[int, int], regions: tuple[int, int]) -> None:
    model, inputs = tiny_model().train(), packed_batch(text=text, regions=regions)
    scores = model.score_packed(inputs, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    loss = cross_entropy_sum(scores.msm_logits, torch.zeros(0, dtype=torch.int64))
    loss = loss + soft_label_kl_sum(scores.mrm_logits, torch.zeros(0, 7)) + scores.itm_logits.square().sum()
    loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_step_is_repeatable_and_dropout_is_on_in_training() -> None:
    model, inputs = tiny_model().train(), packed_batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.score_packed(inputs, *every_row(inputs)).msm_logits)
    assert torch.equal(runs[0], runs[1])
    assert not torch.allclose(runs[0], runs[2])


def gradients(model: torch.nn.Module, seed: int = 5) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    model(**labelled()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_recomputing_activations_changes_nothing() -> None:
    model = tiny_model().train()
    kept = gradients(model)
    _recompute_activations(model)  # by the name that the installed transformers has for it
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False)]
    assert len(layers) >= 5
    recomputed = gradients(model)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_pure_bfloat16_and_autocast_stay_close_to_float32() -> None:
    exact = tiny_model()(**labelled())
    pure = tiny_model().bfloat16()(**labelled())
    with torch.autocast("cpu", torch.bfloat16):
        mixed_model = tiny_model()
        mixed = mixed_model(**labelled())
    assert pure.text_logits.dtype == torch.bfloat16
    for out in (pure, mixed):
        torch.testing.assert_close(out.text_logits.float(), exact.text_logits, atol=0.15, rtol=0.1)
        assert out.loss.dtype == torch.float32
        assert out.loss.item() == pytest.approx(exact.loss.item(), rel=0.02)
    mixed.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixed_model.parameters())


def test_float16_features_are_cast_inside() -> None:
    model, batch = tiny_model(), padded(packed_batch())
    batch["region_features"] = batch["region_features"].half()
    rounded = batch | {"region_features": batch["region_features"].float()}
    assert torch.equal(model(**batch).itm_logits, model(**rounded).itm_logits)


def test_initialisation_follows_the_official_code() -> None:
    from megainter import InterBertForPreTraining
    from tests.model.tiny import tiny_config

    model = InterBertForPreTraining(tiny_config(hidden_size=120, vocab_size=2000, initializer_range=0.02))
    word = model.interbert.text_embeddings.word.weight
    assert float(word.std()) == pytest.approx(0.02, rel=0.02)
    assert float(word[0].std()) == pytest.approx(0.02, rel=0.3)  # the padding row too
    for name, p in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (p == 1).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            assert abs(float(p.mean())) < 6 * 0.02 / math.sqrt(p.numel())


def test_the_decoder_is_tied_and_resizes_with_the_vocabulary() -> None:
    model = tiny_model()
    model.resize_token_embeddings(61, mean_resizing=False)
    assert model.msm_head.decoder.weight is model.interbert.text_embeddings.word.weight
    assert model.msm_head.decoder.bias.shape == (61,)
    assert model(**padded(packed_batch())).text_logits.shape[-1] == 61


def test_losses_judged_in_the_head_are_those_of_its_logits() -> None:
    model, inputs = tiny_model(), packed_batch()
    msm, labels, mrm = torch.tensor([1, 6, 20, 11]), torch.tensor([4, 49, 7, 7]), torch.tensor([12, 2])
    gradients = []
    for judged in (False, True):
        model.zero_grad(set_to_none=True)
        if judged:
            loss, right, regions, matches = model.judge_packed(inputs, msm, labels, mrm)
        else:
            logits, regions, matches = model.score_packed(inputs, msm, mrm)
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            right = (logits.argmax(1) == labels).sum().float()
        (loss + regions.cos().sum() + matches.sin().sum()).backward()
        gradients.append((loss.detach(), right, regions.detach(), matches.detach(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_a_resized_vocabulary_still_judges_its_losses() -> None:
    model, inputs = tiny_model(), packed_batch()
    model.resize_token_embeddings(53)
    nothing = torch.zeros(0, dtype=torch.int64)
    loss, _, _, _ = model.judge_packed(inputs, torch.tensor([1, 3]), torch.tensor([50, 52]), nothing)
    assert float(loss) > 0
