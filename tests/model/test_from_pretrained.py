"""`from_pretrained` of models and processor: one line for what is no model of ours, and names of the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModel, BertConfig, BertModel

from megainter import InterBertForPreTraining, InterBertModel, InterBertProcessor
from megainter.errors import UsageError
from tests.hub import COMMIT, Hub, serve
from tests.model.tiny import tiny_model

DOORS = [InterBertForPreTraining, InterBertProcessor]


@pytest.mark.parametrize("door", DOORS)
def test_another_models_folder_a_run_and_no_path_at_all_are_told_in_one_line(door: Any, tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=3)).save_pretrained(tmp_path / "bert")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    expected = {
        "bert": "holds a model of type 'bert'",
        "run": "is a training run; `megainter convert zero",
        "brt": r"did you mean .*bert\?",
    }
    for name, message in expected.items():
        with pytest.raises(UsageError, match=message) as refused:
            door.from_pretrained(tmp_path / name)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("door", DOORS)
def test_a_path_that_does_not_exist_never_asks_the_network(door: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with serve(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        for name in ("nothing", "./nothing", "models/nothing", "a/b/c", str(tmp_path / "nothing")):
            with pytest.raises(UsageError, match="does not exist"):
                door.from_pretrained(name)
        assert hub.requests == []


def test_a_model_of_the_hub_is_opened_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(45))]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.chdir(tmp_path)
    with serve(Hub(files={"team/interbert": files})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for name in ("hf:team/interbert", f"hf:team/interbert@{COMMIT}", "team/interbert"):
            found = InterBertForPreTraining.from_pretrained(name)
            assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
            assert InterBertProcessor.from_pretrained(name, max_text_tokens=8).vocabulary.size == 50
        with pytest.raises(UsageError, match="no repository team/other on the Hub"):
            InterBertModel.from_pretrained("team/other")


def test_the_auto_classes_open_a_folder_as_before(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), InterBertModel)
