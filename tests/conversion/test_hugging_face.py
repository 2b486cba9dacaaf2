"""From a folder of ours to another one: dtype, vocabulary, heads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megainter import InterBertForMultipleChoice, InterBertForPreTraining, InterBertForRetrieval, InterBertForSequenceClassification
from megainter.conversion.folder import write_tensors
from megainter.conversion.foreign_files import LazyTensor
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.errors import DamagedError, UsageError
from tests.model.tiny import packed_batch, padded, tiny_config, tiny_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(45))]
EMBEDDINGS, BIAS = "interbert.text_embeddings.word.weight", "msm_head.decoder.bias"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "ours"
    tiny_model().save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_unchanged_is_bit_equal(folder: Path, tmp_path: Path) -> None:
    convert_hugging_face(folder, tmp_path / "hf", verify=True)
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["do_lower_case"] is False
    assert (tmp_path / "hf" / "vocab.txt").read_text() == (folder / "vocab.txt").read_text()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype(name: str, dtype: torch.dtype, folder: Path, tmp_path: Path) -> None:
    convert_hugging_face(folder, tmp_path / "hf", dtype=name, verify=True)
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert all(torch.equal(after[key], before[key].to(dtype)) for key in before)
    assert InterBertForPreTraining.from_pretrained(tmp_path / "hf").dtype == dtype


def test_what_fp16_cannot_hold_is_refused(folder: Path, tmp_path: Path) -> None:
    state = tensors(folder)
    state[BIAS][2] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DamagedError, match="65504"):
        convert_hugging_face(folder, tmp_path / "hf", dtype="fp16")
    assert not (tmp_path / "hf").exists()


def test_more_rows(folder: Path, tmp_path: Path) -> None:
    convert_hugging_face(folder, tmp_path / "hf", resize_vocabulary=64, seed=3)
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert torch.equal(after[EMBEDDINGS][:50], before[EMBEDDINGS])
    assert torch.equal(after[BIAS], torch.cat([before[BIAS], torch.zeros(14)]))
    assert float(after[EMBEDDINGS][50:].std()) == pytest.approx(0.15, rel=0.2)
    model = InterBertForPreTraining.from_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == 64
    assert model.msm_head.decoder.weight is model.interbert.text_embeddings.word.weight


def test_fewer_rows_than_entries_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fewer than"):
        convert_hugging_face(folder, tmp_path / "hf", resize_vocabulary=40)


def test_a_new_vocabulary_keeps_the_rows_of_its_old_entries(folder: Path, tmp_path: Path) -> None:
    new = [*reversed(WORDS[:30]), "neu", "new"]
    (tmp_path / "new.txt").write_text("\n".join(new) + "\n")
    convert_hugging_face(folder, tmp_path / "hf", vocabulary=tmp_path / "new.txt", cased=True)
    before, after = tensors(folder), tensors(tmp_path / "hf")
    assert torch.equal(after[EMBEDDINGS][:30], before[EMBEDDINGS][:30].flip(0))
    assert torch.equal(after[BIAS][:30], before[BIAS][:30].flip(0))
    assert after[EMBEDDINGS].shape == (32, 24)
    assert (tmp_path / "hf" / "vocab.txt").read_text().split() == new


@pytest.mark.parametrize(
    ("head", "model", "prefix"),
    [("choice", InterBertForMultipleChoice, "choice_head"), ("classification", InterBertForSequenceClassification, "classifier")],
)
def test_heads_are_added_beside_what_is_there(head: str, model: type, prefix: str, folder: Path, tmp_path: Path) -> None:
    plan = convert_hugging_face(folder, tmp_path / "hf", head=head, num_labels=3 if head == "classification" else None)
    assert plan.fresh == (f"{prefix}.weight", f"{prefix}.bias")
    loaded, report = model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(loaded.get_parameter(f"{prefix}.weight"), tensors(tmp_path / "hf")[f"{prefix}.weight"])
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [model.__name__]
    if head == "classification":
        assert loaded.classifier.out_features == 3
    # converted once more, nothing is new, and the pretraining heads are still there
    assert not convert_hugging_face(tmp_path / "hf", tmp_path / "again", head=head).fresh
    assert torch.equal(InterBertForPreTraining.from_pretrained(tmp_path / "again").itm_head.weight, tiny_model().itm_head.weight)


def test_retrieval_takes_the_matching_head(folder: Path, tmp_path: Path) -> None:
    assert not convert_hugging_face(folder, tmp_path / "hf", head="retrieval").fresh
    batch = padded(packed_batch())
    logits = InterBertForRetrieval.from_pretrained(tmp_path / "hf").eval()(**batch).logits
    torch.testing.assert_close(logits, tiny_model()(**batch).itm_logits)


@pytest.mark.parametrize("kind", [InterBertForRetrieval, InterBertForMultipleChoice, InterBertForSequenceClassification])
def test_a_folder_as_fine_tuning_leaves_it_converts_whole(kind: Any, tmp_path: Path) -> None:
    """Without the heads of pretraining: nothing is missing, and nothing is made up."""
    torch.manual_seed(0)
    tuned = kind(tiny_config())
    tuned.config.architectures = [kind.__name__]
    tuned.save_pretrained(tmp_path / "tuned")
    plan = convert_hugging_face(tmp_path / "tuned", tmp_path / "hf", cased=False)
    assert (plan.missing, plan.fresh, plan.unknown) == ((), (), ())
    assert tensors(tmp_path / "hf").keys() == tensors(tmp_path / "tuned").keys()
    again = kind.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tuned.parameters(), strict=True))
    if kind is InterBertForRetrieval:
        made = convert_hugging_face(tmp_path / "tuned", tmp_path / "labelled", head="classification", num_labels=3, cased=False)
        assert set(made.fresh) == {"classifier.weight", "classifier.bias"}


def test_what_is_drawn_for_missing_tensors_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: tensor for name, tensor in tiny_model().state_dict().items() if not name.startswith("itm_head")}
    tiny_model().save_pretrained(tmp_path / "model", state_dict=state)
    convert_hugging_face(tmp_path / "model", tmp_path / "hf", allow_partial=True, cased=False)
    assert "note: the 2 missing tensors begin anew, drawn by the seed" in capsys.readouterr().out


def test_another_models_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match="not an InterBERT"):
        convert_hugging_face(folder, tmp_path / "hf")


def test_written_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """The streamed file holds what the library's own writer would write, also tensors without elements or dimensions."""
    state = {"matrix": torch.randn(3, 5).t(), "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "vector": torch.arange(7.0)}
    write_tensors(tmp_path / "a.safetensors", {name: LazyTensor.of(tensor) for name, tensor in state.items()}, torch.float32)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(tmp_path / "a.safetensors")
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert all(loaded[name].shape == tensor.shape for name, tensor in state.items())


def test_a_number_of_classes_without_a_new_head_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--num-labels 5 is for a new classification head"):
        convert_hugging_face(folder, tmp_path / "out", num_labels=5)
    convert_hugging_face(folder, tmp_path / "three", head="classification", num_labels=3)
    with pytest.raises(UsageError, match="has a classification head of 3 classes already"):
        convert_hugging_face(tmp_path / "three", tmp_path / "out", head="classification", num_labels=5)
