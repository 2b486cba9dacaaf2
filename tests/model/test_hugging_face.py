"""The models as Hugging Face knows them: saved and loaded bit-equal, through the Auto classes, and equal to BERT without regions."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
)

from megainter import (
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForRetrieval,
    InterBertForSequenceClassification,
    InterBertModel,
)
from tests.model.tiny import packed_batch, padded, samples_of, tiny_config, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return path


def test_saved_and_loaded_is_bit_equal(folder: Path) -> None:
    original = tiny_model()
    for loaded in (InterBertForPreTraining.from_pretrained(folder), AutoModelForPreTraining.from_pretrained(folder)):
        assert type(loaded) is InterBertForPreTraining
        assert all(torch.equal(a, b) for a, b in zip(original.state_dict().values(), loaded.state_dict().values(), strict=True))
        assert loaded.msm_head.decoder.weight is loaded.interbert.text_embeddings.word.weight
    assert AutoConfig.from_pretrained(folder).to_dict().items() >= {"model_type": "interbert", "hidden_size": 24}.items()


def test_the_file_holds_the_tied_weight_once(folder: Path) -> None:
    names = set(load_file(folder / "model.safetensors"))
    assert names == {name for name, _ in tiny_model().named_parameters()}


@pytest.mark.parametrize(
    ("auto", "expected"),
    [
        (AutoModel, InterBertModel),
        (InterBertForRetrieval, InterBertForRetrieval),
        (AutoModelForMultipleChoice, InterBertForMultipleChoice),
        (AutoModelForSequenceClassification, InterBertForSequenceClassification),
    ],
)
def test_every_model_starts_from_a_pretraining_folder(folder: Path, auto: type, expected: type) -> None:
    loaded, report = auto.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is expected
    assert all("head" in name or "classifier" in name for name in report["missing_keys"])
    assert not report["mismatched_keys"]
    trunk = loaded if expected is InterBertModel else loaded.interbert
    original = tiny_model().interbert.state_dict()
    assert all(torch.equal(original[name], tensor) for name, tensor in trunk.state_dict().items())


def test_base_model_output_is_padded_states(folder: Path) -> None:
    model, inputs = AutoModel.from_pretrained(folder).eval(), packed_batch()
    batch, packed = padded(inputs, extra=1), model.encode(inputs)
    out = model(**batch)
    torch.testing.assert_close(out.text_states[batch["attention_mask"].bool()], packed.text_states)
    torch.testing.assert_close(out.region_states[batch["region_mask"].bool()], packed.region_states)
    assert out.text_states.shape == (4, 10, 24)
    assert out.pooled_text.shape == out.pooled_region.shape == (4, 16)


def test_text_alone_is_bert(folder: Path) -> None:
    model, config = tiny_model(), tiny_config()
    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=config.max_position_embeddings,
        ),
        add_pooling_layer=False,
    ).eval()
    from megainter.conversion.official_names import official_name

    ours = {official_name(f"interbert.{n}", config).removeprefix("bert."): p for n, p in model.interbert.named_parameters()}
    bert.load_state_dict({name: ours[name] for name in bert.state_dict() if name in ours}, strict=False)
    assert {name for name, _ in bert.named_parameters()} <= set(ours)
    batch = {k: v for k, v in padded(packed_batch()).items() if not k.startswith("region")}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model.interbert(**batch).text_states[real], bert(**batch).last_hidden_state[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ["mul", "sum"])
def test_one_modality_alone_uses_its_own_pooled_vector(fusion: str) -> None:
    model, batch = tiny_model(fusion=fusion), padded(packed_batch())
    text_only = {k: v for k, v in batch.items() if not k.startswith("region")}
    regions_only = {k: v for k, v in batch.items() if k.startswith("region")}
    for kept, name in ((text_only, "pooled_text"), (regions_only, "pooled_region")):
        pooled = model.interbert(**kept)[name]
        torch.testing.assert_close(model(**kept).itm_logits, model.itm_head(pooled))
    both = model.interbert(**batch)
    fused = both.pooled_text * both.pooled_region if fusion == "mul" else both.pooled_text + both.pooled_region
    torch.testing.assert_close(model(**batch).itm_logits, model.itm_head(fused))


def test_retrieval_scores_are_the_matching_probability(folder: Path) -> None:
    model, inputs = InterBertForRetrieval.from_pretrained(folder).eval(), packed_batch()
    itm = tiny_model()(**padded(inputs)).itm_logits
    labels = torch.tensor([0, 1, 1, 0])
    out = model(**padded(inputs), labels=labels)
    torch.testing.assert_close(out.logits, itm)
    torch.testing.assert_close(out.scores, itm.softmax(-1)[:, 0])
    torch.testing.assert_close(model.score_packed(inputs).sigmoid(), out.scores)
    torch.testing.assert_close(out.loss, -itm.log_softmax(-1)[range(4), labels].mean())


def test_multiple_choice_shares_the_image_between_choices() -> None:
    torch.manual_seed(0)
    model, inputs = InterBertForMultipleChoice(tiny_config(initializer_range=0.15)).eval(), packed_batch()
    batch = padded(inputs)
    text = {k: torch.stack([v, v.flip(0)], 1) for k, v in batch.items() if not k.startswith("region")}
    regions = {k: v for k, v in batch.items() if k.startswith("region")}
    labels = torch.tensor([0, 1, 0, 1])
    shared = model(**text, **regions, labels=labels)
    apart = model(**text, **{k: torch.stack([v, v], 1) for k, v in regions.items()})
    assert shared.logits.shape == (4, 2)
    torch.testing.assert_close(shared.logits, apart.logits)
    # a choice is scored as if it were alone with its image
    torch.testing.assert_close(shared.logits[:, 0], model.score_packed(inputs), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shared.logits[2, 0], model.score_packed(samples_of(inputs, [2]))[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shared.loss, -shared.logits.log_softmax(-1)[range(4), labels].mean())


@pytest.mark.parametrize(("labels", "num_labels"), [(torch.tensor([2, 0, 1, 1]), 3), (torch.tensor([0.5, 1.0, -1.0, 2.0]), 1)])
def test_classification_and_regression(labels: torch.Tensor, num_labels: int) -> None:
    torch.manual_seed(0)
    model, batch = InterBertForSequenceClassification(tiny_config(num_labels=num_labels)).eval(), padded(packed_batch())
    out = model(**batch, labels=labels)
    assert out.logits.shape == (4, num_labels)
    expected = (
        -out.logits.log_softmax(-1)[range(4), labels.long()].mean() if num_labels > 1 else (out.logits[:, 0] - labels).square().mean()
    )
    torch.testing.assert_close(out.loss, expected)
    text_only = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert text_only.logits.shape == (4, num_labels)
