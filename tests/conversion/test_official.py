"""Official checkpoints into a folder and back: the original implementation's numbers, every naming, both fusions and objectives."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from megainter import InterBertConfig, InterBertForMultipleChoice, InterBertForPreTraining, InterBertForSequenceClassification
from megainter.conversion.architecture import official_settings
from megainter.conversion.foreign_files import LazyTensor
from megainter.conversion.mapping import expected_shapes
from megainter.conversion.official import convert_official, official_state, to_official
from megainter.conversion.official_names import official_name, official_names, our_name
from megainter.conversion.plain_official import difference
from megainter.errors import DamagedError, UsageError
from megainter.verbs.convert import convert_app
from tests.model.test_golden import GOLDEN, OURS_OF_OFFICIAL, drawn_weight
from tests.model.tiny import every_row, packed_batch, tiny_config, tiny_model

CONFIG = tiny_config(initializer_range=0.02)


def official(model: InterBertForPreTraining | None = None) -> "OrderedDict[str, torch.Tensor]":
    model = model or tiny_model()
    return official_state({name: parameter.detach() for name, parameter in model.named_parameters()}, model.config)


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "official.json"
    path.write_text(json.dumps(official_settings(CONFIG)))
    return path


def saved(state: dict[str, torch.Tensor], folder: Path, name: str = "pytorch_model_3.bin") -> Path:
    torch.save(state, folder / name)
    return folder / name


def assert_same_model(folder: Path, expected: InterBertForPreTraining) -> None:
    loaded = InterBertForPreTraining.from_pretrained(folder)
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_golden_weights_pass_through_and_come_back(tmp_path: Path) -> None:
    with np.load(GOLDEN) as file:
        golden = {name: file[name] for name in file.files}
    meta = json.loads(str(golden["meta"]))
    (tmp_path / "c.json").write_text(json.dumps(meta["config"]))
    sizes = {OURS_OF_OFFICIAL.get(k, k): v for k, v in meta["config"].items() if k not in ("v_hidden_size", "v_intermediate_size")}
    config = InterBertConfig(**sizes)
    shapes = {official_name(name, config): shape for name, shape in expected_shapes(config).items()}
    state = OrderedDict((key, drawn_weight(key, shape)) for key, shape in shapes.items())
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()

    convert_official(
        saved(state, tmp_path), tmp_path / "hf", config_file=tmp_path / "c.json", choices={"fusion": meta["fusion"]}, verify=True
    )

    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    batch = {name.removeprefix("in_"): torch.from_numpy(array) for name, array in golden.items() if name.startswith("in_")}
    batch["msm_labels"] = batch["msm_labels"].masked_fill(batch["msm_labels"] == -1, -100)
    out = model(**batch)
    text, regions = batch["attention_mask"].bool(), batch["region_mask"].bool()
    for ours, theirs in [
        (out.text_logits[text], golden["out_text_logits"][text.numpy()]),
        (out.region_logits[regions], golden["out_region_logits"][regions.numpy()]),
        (out.itm_logits, golden["out_itm_logits"]),
        *((out[name].reshape(1), golden[f"out_{name}"]) for name in ("msm_loss", "mrm_loss", "itm_loss")),
    ]:
        torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=2e-5, rtol=2e-5)
    out.loss.backward()
    expected = dict(zip(map(str, golden["out_grad_names"]), golden["out_grad_norms"].tolist(), strict=True))
    for name, theirs in official_names([name for name, _ in model.named_parameters()], model.config).items():
        noise = 1e-7 if name.endswith("key.bias") else 0.0  # zero but for rounding
        assert float(model.get_parameter(name).grad.norm()) == pytest.approx(expected[theirs], rel=1e-4, abs=noise), name

    to_official(tmp_path / "hf", tmp_path / "back.bin", verify=True)
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert set(back) == set(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_the_official_tensor_is_tied_in_the_written_file(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "hf")
    to_official(tmp_path / "hf", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert back["cls.predictions.decoder.weight"].data_ptr() == back["bert.embeddings.word_embeddings.weight"].data_ptr()
    assert json.loads((tmp_path / "back.json").read_text())["t_num_hidden_layers"] == CONFIG.num_text_layers


def test_names_and_their_inverse() -> None:
    names = [name for name, _ in tiny_model().named_parameters()]
    theirs = official_names(names, CONFIG)
    assert [our_name(theirs[name], CONFIG.num_interaction_layers) for name in names] == names
    assert our_name("bert.encoder.layer.0.crossattention.self.query.weight", 1) is None


@pytest.mark.parametrize("naming", ["plain", "module", "bare wrapper", "gamma and beta", "no decoder", "legacy file"])
def test_every_naming(naming: str, tmp_path: Path, settings: Path) -> None:
    state: dict[str, object] = dict(official())
    if naming == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    if naming == "bare wrapper":
        state = {"epoch": 3, "model_state_dict": state}
    if naming == "gamma and beta":
        state = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for name, tensor in state.items()
        }
    if naming == "no decoder":
        del state["cls.predictions.decoder.weight"]
    torch.save(state, tmp_path / "m_ema.bin", _use_new_zipfile_serialization=naming != "legacy file")
    convert_official(tmp_path / "m_ema.bin", tmp_path / "hf", config_file=settings, verify=True)
    assert_same_model(tmp_path / "hf", tiny_model())


@pytest.mark.parametrize("fusion", ["mul", "sum"])
def test_fusion_comes_from_option_or_json(fusion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(official(tiny_model(fusion=fusion)), tmp_path)
    stated = official_settings(CONFIG)
    del stated["fusion_method"]
    (tmp_path / "c.json").write_text(json.dumps(stated))
    plan = convert_official(path, tmp_path / "a", config_file=tmp_path / "c.json", choices={"fusion": fusion}, verify=True)
    assert plan.config.fusion == fusion
    (tmp_path / "c.json").write_text(json.dumps(stated | {"fusion_method": fusion}))
    assert convert_official(path, tmp_path / "b", config_file=tmp_path / "c.json").config.fusion == fusion
    capsys.readouterr()
    (tmp_path / "c.json").write_text(json.dumps(stated))
    assert convert_official(path, tmp_path / "d", config_file=tmp_path / "c.json").config.fusion == "mul"
    assert "fusion cannot be read" in capsys.readouterr().out


def test_fusion_changes_what_is_verified(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert difference(official(), model.config, tmp_path) < 1e-5
    assert difference(official(), tiny_config(fusion="sum"), tmp_path) > 1e-2


@pytest.mark.parametrize(("changes", "objective"), [({}, "class"), ({"region_objective": "feature"}, "feature")])
def test_region_objective_is_read_from_the_head(changes: dict[str, str], objective: str, tmp_path: Path, settings: Path) -> None:
    model = tiny_model(**changes)
    plan = convert_official(saved(official(model), tmp_path), tmp_path / "hf", config_file=settings, verify=True)
    assert plan.config.region_objective == objective
    assert_same_model(tmp_path / "hf", model)


def test_a_head_as_wide_as_the_features_may_still_be_of_classes(tmp_path: Path, settings: Path) -> None:
    path = saved(official(tiny_model(num_region_classes=10)), tmp_path)
    plan = convert_official(path, tmp_path / "hf", config_file=settings, choices={"region_objective": "class"})
    assert (plan.config.region_objective, plan.config.num_region_classes) == ("class", 10)


def test_sizes_are_read_from_the_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a JSON: everything but heads, fusion and the number of interaction layers, which are assumed aloud."""
    model = tiny_model(hidden_size=48, num_text_layers=2, num_attention_heads=12, num_region_attention_heads=8)
    plan = convert_official(saved(official(model), tmp_path), tmp_path / "hf", verify=True)
    sizes = ("num_", "hidden_size", "intermediate", "pooler", "vocab", "max_", "type_", "region_feature")
    names = [name for name in vars(tiny_config()) if name.startswith(sizes)]
    assert {name: getattr(plan.config, name) for name in names} == {name: getattr(model.config, name) for name in names}
    said = capsys.readouterr().out
    for word in ("num_attention_heads cannot", "num_region_attention_heads cannot", "fusion cannot", "layers 0-1 of 4"):
        assert word in said


def test_a_json_of_another_model_is_refused(tmp_path: Path) -> None:
    for change in ({"hidden_size": 48, "v_hidden_size": 48}, {"v_hidden_size": 12}, {"num_hidden_layers": 7}, {"hidden_act": "relu"}):
        (tmp_path / "c.json").write_text(json.dumps(official_settings(CONFIG) | change))
        with pytest.raises(UsageError):
            convert_official(saved(official(), tmp_path), tmp_path / "hf", config_file=tmp_path / "c.json")
        assert not (tmp_path / "hf").exists()


def vl_task_state() -> "OrderedDict[str, torch.Tensor]":
    state = official()
    torch.manual_seed(5)
    for name, width, rows in [("vil_prediction", 16, 3), ("vil_logit", 16, 1), ("vision_logit", 24, 1), ("linguisic_logit", 24, 1)]:
        state |= {f"{name}.weight": torch.randn(rows, width), f"{name}.bias": torch.randn(rows)}
    return state


def test_vl_task_heads_serve_the_downstream_models(tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = vl_task_state()
    plan = convert_official(saved(state, tmp_path), tmp_path / "hf", config_file=settings, verify=True)
    assert plan.left_over == ("vision_logit.weight", "vision_logit.bias", "linguisic_logit.weight", "linguisic_logit.bias")
    assert "left over: 4 tensors" in capsys.readouterr().out
    choice = InterBertForMultipleChoice.from_pretrained(tmp_path / "hf")
    assert torch.equal(choice.choice_head.weight, state["vil_logit.weight"])
    several, report = InterBertForSequenceClassification.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert torch.equal(several.classifier.weight, state["vil_prediction.weight"])
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert_same_model(tmp_path / "hf", tiny_model())


def test_vl_task_heads_come_back(tmp_path: Path, settings: Path) -> None:
    state = vl_task_state()
    convert_official(saved(state, tmp_path), tmp_path / "hf", config_file=settings)
    to_official(tmp_path / "hf", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert set(state) - set(back) == {name for name in state if name.startswith(("vision_logit", "linguisic_logit"))}
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())


def test_a_folder_without_a_vocabulary_is_told(tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_official(saved(official(), tmp_path), tmp_path / "hf", config_file=settings)
    assert "note: no vocabulary was given" in capsys.readouterr().out


def test_strict_is_an_option_and_the_default() -> None:
    parsed = [convert_app.parse_args(["official", "a.bin", "b", *flags])[1].arguments for flags in ([], ["--strict"], ["--allow-partial"])]
    assert [arguments.get("allow_partial", False) for arguments in parsed] == [False, False, True]


def test_incomplete_is_refused_and_leaves_nothing(tmp_path: Path, settings: Path) -> None:
    state = official()
    del state["bert.t_pooler.dense.weight"]
    before = set(tmp_path.iterdir())
    with pytest.raises(DamagedError, match=r"lacks 1 tensor \(interbert.text_pooler.dense.weight\)") as raised:
        convert_official(saved(state, tmp_path, "partial.bin"), tmp_path / "hf", config_file=settings)
    assert raised.value.exit_code == 4
    assert set(tmp_path.iterdir()) - before == {tmp_path / "partial.bin"}


def test_allowed_partial_draws_what_is_missing(tmp_path: Path, settings: Path) -> None:
    state = official() | {"surprise.weight": torch.zeros(2)}
    del state["cls.bi_seq_relationship.weight"]
    plan = convert_official(saved(state, tmp_path), tmp_path / "hf", config_file=settings, allow_partial=True)
    assert (plan.missing, plan.unknown) == (("itm_head.weight",), ("surprise.weight",))
    assert InterBertForPreTraining.from_pretrained(tmp_path / "hf").itm_head.weight.abs().sum() > 0


def test_an_untied_decoder_is_refused(tmp_path: Path, settings: Path) -> None:
    state = official()
    state["cls.predictions.decoder.weight"] = state["cls.predictions.decoder.weight"] + 1
    with pytest.raises(DamagedError, match="differs from the word embeddings"):
        convert_official(saved(state, tmp_path), tmp_path / "hf", config_file=settings)


def test_a_bert_is_not_an_interbert(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in official().items() if "v_" not in name}
    with pytest.raises(UsageError, match="use convert bert"):
        convert_official(saved(state, tmp_path), tmp_path / "hf")


def test_a_vilbert_is_refused_with_the_reason(tmp_path: Path) -> None:
    state = official() | {"bert.encoder.c_layer.0.biattention.query1.weight": torch.zeros(4, 4)}
    with pytest.raises(UsageError, match="co-attention"):
        convert_official(saved(state, tmp_path), tmp_path / "hf")


def test_an_existing_destination_is_kept(tmp_path: Path, settings: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(UsageError, match="exists"):
        convert_official(saved(official(), tmp_path), tmp_path / "hf", config_file=settings)
    assert not list((tmp_path / "hf").iterdir())


def test_nan_is_refused_and_leaves_nothing(tmp_path: Path, settings: Path) -> None:
    state = {name: tensor.clone() for name, tensor in official().items()}
    state["bert.t_pooler.dense.bias"][3] = float("nan")
    path = saved(state, tmp_path)
    with pytest.raises(DamagedError, match=r"text_pooler.dense.bias holds NaN"):
        convert_official(path, tmp_path / "hf", config_file=settings)
    assert set(tmp_path.iterdir()) == {path, settings}


def test_half_precision_is_written_as_fp32(tmp_path: Path, settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor.half() for name, tensor in official().items()}
    convert_official(saved(state, tmp_path), tmp_path / "hf", config_file=settings)
    assert "float16 tensors are written as fp32" in capsys.readouterr().out
    loaded = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert loaded.itm_head.weight.dtype == torch.float32
    assert torch.equal(loaded.itm_head.weight, state["cls.bi_seq_relationship.weight"].float())


def test_the_base_model_has_the_official_number_of_parameters() -> None:
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(InterBertConfig()).values()) == 157_021_565
    feature = InterBertConfig(region_objective="feature")
    assert sum(torch.Size(shape).numel() for shape in expected_shapes(feature).values()) == 157_365_308


def test_a_lazy_tensor_says_shape_before_it_is_read() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    lazy = LazyTensor.of(tensor)
    assert (lazy.shape, lazy.dtype) == ((2, 3), torch.float32)
    assert lazy.read() is tensor


def test_settings_beside_the_checkpoint_are_read_and_options_may_not_contradict_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    to_official(tmp_path / "model", tmp_path / "official.bin")
    heads = tiny_model().config.num_attention_heads
    assert convert_official(tmp_path / "official.bin", tmp_path / "back").config.num_attention_heads == heads
    assert "which lies beside the checkpoint" in capsys.readouterr().out
    for choices, words in (({"fusion": "sum"}, "--fusion sum contradicts"), ({"num_interaction_layers": 0}, "--interaction-layers 0")):
        with pytest.raises(UsageError, match=words):
            convert_official(tmp_path / "official.bin", tmp_path / "other", choices=choices)
    (tmp_path / "official.json").unlink()
    with pytest.raises(UsageError, match="needs a region head of"):
        convert_official(tmp_path / "official.bin", tmp_path / "other", choices={"region_objective": "feature"})


def test_standardized_features_are_so_in_the_official_form_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(region_mean=[0.5 * number for number in range(10)], region_deviation=[0.25] * 5 + [2.0] * 5)
    model.save_pretrained(tmp_path / "model")
    to_official(tmp_path / "model", tmp_path / "official.bin")
    assert "features are standardized by the weight and bias" in capsys.readouterr().out
    convert_official(tmp_path / "official.bin", tmp_path / "back")
    back, inputs = InterBertForPreTraining.from_pretrained(tmp_path / "back").eval(), packed_batch()
    assert back.config.region_mean is None
    for found, right in zip(back.score_packed(inputs, *every_row(inputs)), model.score_packed(inputs, *every_row(inputs)), strict=True):
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_an_incomplete_checkpoint_is_verified_as_far_as_it_can_be(
    settings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = official()
    del state["bert.v_embeddings.LayerNorm.bias"]
    convert_official(saved(state, tmp_path), tmp_path / "back", config_file=settings, allow_partial=True, verify=True)
    assert "could not be run beside the result" in capsys.readouterr().out
