"""Vectors of texts alone and images alone: what a mixed batch gives is what each gives by itself; from Python, from a folder, converted."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from megainter import InterBertForPreTraining, InterBertForRetrieval, InterBertProcessor
from megainter.config.settings import OptimizerConfig
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.conversion.official import convert_official, to_official
from megainter.data.feature_store import FeatureStore
from megainter.data.packed import PackedInputs
from megainter.data.tables.pairs import read_pairs
from megainter.errors import UsageError
from megainter.training.optimizer import parameter_groups
from tests.model.tiny import packed_batch, samples_of, tiny_config, tiny_model
from tests.synthetic import write_data
from tests.tasks.retrieval.test_evaluation import write_model

TEXT, REGIONS = (5, 9, 1, 7), (3, 1, 6, 4)


def mixed() -> tuple[PackedInputs, PackedInputs, PackedInputs]:
    """Texts alone, images alone, and both in one batch in turns: text, image, text, and so on."""
    texts, images = packed_batch(1, TEXT, (0,) * 4), packed_batch(2, (0,) * 4, REGIONS)
    lengths_t, lengths_r = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    lengths_t[::2], lengths_r[1::2] = torch.tensor(TEXT), torch.tensor(REGIONS)
    both = PackedInputs(
        texts.input_ids, texts.token_type_ids, lengths_t, images.region_features, images.region_locations, lengths_r
    )  # fmt: skip
    return texts, images, both


def test_a_mixed_batch_gives_what_each_side_gives_by_itself() -> None:
    model = tiny_model(itc_size=5)
    texts, images, both = mixed()
    pooled_texts, pooled_images = model.interbert.pool_alone(both)
    torch.testing.assert_close(pooled_texts, model.interbert.pool(texts)[0])
    torch.testing.assert_close(pooled_images, model.interbert.pool(images)[1])
    assert pooled_texts.std() > 0.05
    made = model.vectors_packed(both)
    assert (made[0].shape, made[1].shape, made[2].shape) == ((4, 5), (4, 5), (1,))
    torch.testing.assert_close(torch.cat(made[:2]).norm(dim=1), torch.ones(8))
    torch.testing.assert_close(made[0], model.vectors_packed(texts)[0])


def test_means_are_those_of_every_text_and_image_by_themselves() -> None:
    model = tiny_model(itc_size=5, itc_pooling="mean").double()
    texts, images, both = (
        replace(made, region_features=made.region_features.double(), region_locations=made.region_locations.double()) for made in mixed()
    )
    rows_of_texts = model.interbert.encode(texts).text_states.split(list(TEXT))
    rows_of_images = model.interbert.encode(images).region_states.split(list(REGIONS))
    wanted = [torch.stack([rows.mean(0) for rows in sides]) for sides in (rows_of_texts, rows_of_images)]
    for found, right in zip(model.interbert.pool_alone(both), wanted, strict=True):
        torch.testing.assert_close(found, right)
    assert model.itc_head.text.weight.shape == (5, model.config.hidden_size)


@pytest.mark.parametrize("of_regions", ["mean_feature", "first_feature"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_an_images_vector_may_be_made_of_a_feature_alone(pooling: str, of_regions: str) -> None:
    """Of the global region's, or of the first one after it where there is one, standardized; texts pass the layers as ever."""
    size = tiny_model().config.region_feature_size
    scaling = {"region_mean": [0.25] * size, "region_deviation": [0.5] * size}
    model = tiny_model(itc_size=5, itc_pooling=pooling, itc_regions=of_regions, region_feature_dropout_prob=0.5, **scaling)
    texts, images, both = mixed()
    later = torch.tensor([int(of_regions == "first_feature" and length > 1) for length in images.region_lengths])
    assert 1 in images.region_lengths
    firsts = images.region_features[images.region_lengths.cumsum(0) - images.region_lengths + later]
    found_texts, found_images, _ = model.vectors_packed(both)
    assert model.itc_head is not None
    torch.testing.assert_close(found_images, F.normalize(model.itc_head.region((firsts - 0.25) / 0.5), dim=-1))
    model.config.itc_regions = "states"
    torch.testing.assert_close(found_texts, F.normalize(model.itc_head.text(model.interbert.pool_alone(texts)[0]), dim=-1))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_text_sees_neither_other_texts_nor_any_image(pooling: str) -> None:
    model = tiny_model(itc_size=5, itc_pooling=pooling).double()
    texts, _, both = mixed()
    features = both.region_features.double().requires_grad_()
    embedded = model.interbert.text_embeddings.word.weight
    doubled = {"region_features": features, "region_locations": both.region_locations.double()}
    made = model.vectors_packed(PackedInputs(**vars(both) | doubled))
    assert torch.autograd.grad(made[0].square().sum(0)[0], features, retain_graph=True)[0].abs().max() == 0
    seen = torch.autograd.grad(made[0][1, 0], embedded)[0].abs().sum(1) > 0
    assert set(seen.nonzero()[:, 0].tolist()) == set(texts.input_ids[5:14].tolist())


def test_a_sample_of_both_sides_or_of_none_is_refused() -> None:
    model = tiny_model(itc_size=5)
    for text, regions in (((5, 3), (0, 2)), ((5, 0), (0, 0))):
        with pytest.raises(UsageError, match="both text and regions, or neither"):
            model.vectors_packed(packed_batch(0, text, regions))
    with pytest.raises(UsageError, match="single-modal samples by themselves"):
        model.interbert.pool(mixed()[2])


def test_the_head_is_there_where_it_is_asked_for_alone() -> None:
    assert "itc_head" not in {name.partition(".")[0] for name, _ in tiny_model().named_parameters()}
    extra = {name: p.shape for name, p in tiny_model(itc_size=5).named_parameters() if name.startswith("itc_head.")}
    assert extra == {"itc_head.log_scale": (1,), "itc_head.text.weight": (5, 16), "itc_head.text.bias": (5,),
                     "itc_head.region.weight": (5, 16), "itc_head.region.bias": (5,)}  # fmt: skip
    with pytest.raises(UsageError, match=r"training\.itc_weight above 0"):
        tiny_model().vectors_packed(packed_batch(1, TEXT, (0,) * 4))
    with pytest.raises(UsageError, match="itc_size"):
        tiny_config(itc_size=-1)


def test_scales_and_margin_do_not_decay() -> None:
    model = tiny_model(itc_size=5, itm_similarity=True)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    decay = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert model.itc_head is not None
    assert decay[id(model.itc_head.log_scale)] == 0
    assert model.itm_similarity is not None
    assert [decay[id(parameter)] for parameter in model.itm_similarity.parameters()] == [0, 0]
    assert decay[id(model.itc_head.text.weight)] == 0.1


def test_texts_and_images_by_name(tmp_path: Path) -> None:
    pairs_path, store_path = write_data(tmp_path, images=13)
    folder = write_model(tmp_path / "model", pairs_path, itc_size=8)
    pairs, store = read_pairs(pairs_path), FeatureStore(store_path)
    texts, records = pairs.table.column("caption").to_pylist(), [store[image_id] for image_id in pairs.image_ids]
    processor = InterBertProcessor.from_pretrained(folder)
    for kind in (InterBertForRetrieval, InterBertForPreTraining):
        model = kind.from_pretrained(folder).eval()
        text_vectors, image_vectors = model.encode_texts(texts, batch_texts=4), model.encode_images(records, batch_images=5)
        assert (text_vectors.shape, image_vectors.shape) == ((26, 8), (13, 8))
        assert text_vectors.dtype == image_vectors.dtype == torch.float32
        with torch.no_grad():
            for i in (0, 7, 25):
                torch.testing.assert_close(text_vectors[i], model.vectors_packed(processor.pack([texts[i]], None))[0][0])
            for i in (0, 12):
                torch.testing.assert_close(image_vectors[i], model.vectors_packed(processor.pack(None, [records[i]]))[1][0])
        assert len(model.encode_texts([], processor)) == 0
        with pytest.raises(UsageError, match="sequence of str"):
            model.encode_texts("a text", processor)
        with pytest.raises(UsageError, match="batch_texts is 0"):
            model.encode_texts(texts, processor, batch_texts=0)
        with pytest.raises(UsageError, match="training mode"):
            model.train().encode_images(records, processor)


def test_conversions_keep_the_head_and_the_official_form_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(itc_size=5)
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "ours" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(45))]) + "\n")
    (tmp_path / "ours" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    convert_hugging_face(tmp_path / "ours", tmp_path / "again", verify=True)
    again = InterBertForPreTraining.from_pretrained(tmp_path / "again")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters())

    weights = tmp_path / "weights"  # alone, without a configuration: the width is in the tensors
    weights.mkdir()
    torch.save(model.state_dict(), weights / "pytorch_model.bin")
    (weights / "sizes.json").write_text(json.dumps({"num_attention_heads": 4, "num_region_attention_heads": 3}))
    convert_hugging_face(weights / "pytorch_model.bin", tmp_path / "read", config_file=weights / "sizes.json")
    assert InterBertForPreTraining.from_pretrained(tmp_path / "read").config.itc_size == 5

    to_official(tmp_path / "ours", tmp_path / "official.bin")
    assert "itc_head) has no place" in capsys.readouterr().out
    convert_official(tmp_path / "official.bin", tmp_path / "back")
    back = InterBertForPreTraining.from_pretrained(tmp_path / "back")
    assert back.config.itc_size == 0
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in back.named_parameters())


@pytest.mark.parametrize("of_regions", ["states", "mean_feature", "first_feature"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_similarity_is_a_scaled_cosine_of_states_that_have_seen_each_other(pooling: str, of_regions: str) -> None:
    """Against a loop over single pairs: matching without it, and a cosine of what the ordinary encoding gives."""
    model, inputs = tiny_model(itc_size=5, itc_pooling=pooling, itc_regions=of_regions, itm_similarity=True), packed_batch()
    assert model.itm_similarity is not None
    assert model.itc_head is not None
    with torch.no_grad():
        model.itm_similarity.log_scale.fill_(1.7)
        model.itm_similarity.margin.fill_(-0.2)
        whole = model.score_packed(inputs, *([torch.zeros(0, dtype=torch.int64)] * 2)).itm_logits
        for i in range(len(inputs)):
            sample = samples_of(inputs, [i])
            alone = model.interbert.encode(sample)
            sides = (alone.text_states.mean(0), alone.region_states.mean(0))
            text, region = sides if pooling == "mean" else (alone.pooled_text[0], alone.pooled_region[0])
            if of_regions != "states":
                later = of_regions == "first_feature" and len(sample.region_features) > 1
                region = sample.region_features[int(later)]
            cosine = F.cosine_similarity(model.itc_head.text(text), model.itc_head.region(region), dim=0)
            plain = model.itm_head(model.fusion(alone.pooled_text, alone.pooled_region))[0]
            expected = plain + torch.tensor([math.exp(1.7) * (float(cosine) + 0.2), 0.0])
            torch.testing.assert_close(whole[i], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("of_regions", ["states", "mean_feature", "first_feature"])
def test_matching_may_weigh_the_vectors_of_each_side_alone(of_regions: str) -> None:
    """Against a loop over single pairs, whose text and image are encoded each by itself; a text without an image has none to weigh."""
    model, inputs = tiny_model(itc_size=5, itc_pooling="mean", itc_regions=of_regions, itm_vectors=True), packed_batch()
    assert model.itm_vectors is not None
    nothing = [torch.zeros(0, dtype=torch.int64)] * 2
    with torch.no_grad():
        model.itm_vectors.log_scale.fill_(1.7)
        model.itm_vectors.margin.fill_(-0.2)
        whole = model.score_packed(inputs, *nothing).itm_logits
        for i in range(len(inputs)):
            pair = samples_of(inputs, [i])
            text, image, _ = model.vectors_packed(pair.apart())
            encoded = model.interbert.encode(pair)
            plain = model.itm_head(model.fusion(encoded.pooled_text, encoded.pooled_region))[0]
            expected = plain + torch.tensor([math.exp(1.7) * (float(text[0] @ image[0]) + 0.2), 0.0])
            torch.testing.assert_close(whole[i], expected, atol=1e-5, rtol=1e-5)
        texts = packed_batch(0, TEXT, (0,) * len(TEXT))
        alone = model.interbert.encode(texts)
        bare = model.itm_head(model.fusion(alone.pooled_text, alone.pooled_region))
        torch.testing.assert_close(model.score_packed(texts, *nothing).itm_logits, bare, atol=1e-6, rtol=1e-5)


def test_similarity_needs_vectors_and_is_kept_but_in_the_official_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="itm_similarity compares the vectors"):
        tiny_model(itm_similarity=True)
    with pytest.raises(UsageError, match="itm_vectors compares the vectors"):
        tiny_model(itm_vectors=True)
    model = tiny_model(itc_size=5, itm_similarity=True, itm_vectors=True)
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save(model.state_dict(), weights / "pytorch_model.bin")
    (weights / "sizes.json").write_text(json.dumps({"num_attention_heads": 4, "num_region_attention_heads": 3}))
    convert_hugging_face(weights / "pytorch_model.bin", tmp_path / "read", config_file=weights / "sizes.json")
    read = InterBertForPreTraining.from_pretrained(tmp_path / "read")
    assert (read.config.itm_similarity, read.config.itm_vectors) == (True, True)
    assert all(torch.equal(p, read.get_parameter(name)) for name, p in model.named_parameters())

    (tmp_path / "read" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(45))]) + "\n")
    to_official(tmp_path / "read", tmp_path / "official.bin")
    assert capsys.readouterr().out.count("without it this model matches worse") == 2
    convert_official(tmp_path / "official.bin", tmp_path / "back")
    assert not InterBertForPreTraining.from_pretrained(tmp_path / "back").config.itm_similarity
