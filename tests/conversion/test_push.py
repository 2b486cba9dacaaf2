"""A folder pushed to a hub on localhost by the Hub's own client, and loaded from there by name."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

from megainter import InterBertForPreTraining
from megainter.conversion.card import CardOptions
from megainter.errors import UsageError
from megainter.verbs.convert import convert_hf
from tests.hub import Hub, serve
from tests.model.tiny import packed_batch, padded, tiny_model
from tests.places import ROOT

REPOSITORY = "team/interbert"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub without repositories, and the token to write there. The client keeps large files to LFS: Xet's server is not Git's."""
    with serve(Hub(token="secret")) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield served


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_files_arrive_and_the_model_loads_by_its_name(hub: Hub, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_hf(model, push=REPOSITORY, private=True)
    files = hub.files[REPOSITORY]
    assert set(files) >= {"README.md", "config.json", "model.safetensors", "modeling_interbert.py", "checksums.json"}
    assert files["model.safetensors"] in hub.large.values()  # by LFS, the small ones in the commit itself
    assert files["config.json"] not in hub.large.values()
    assert hub.created[REPOSITORY]["visibility"] == "private"
    assert f"{hub.url}/{REPOSITORY}/commit/" in capsys.readouterr().out
    assert ModelCard(files["README.md"].decode()).text.strip().startswith("# interbert")

    loaded = InterBertForPreTraining.from_pretrained(f"hf:{REPOSITORY}")
    before = tiny_model().state_dict()
    assert all(torch.equal(before[name], value) for name, value in loaded.state_dict().items())


def test_with_a_folder_both_are_there_and_a_second_push_goes_on_in_the_same_repository(hub: Hub, model: Path, tmp_path: Path) -> None:
    convert_hf(model, tmp_path / "out", push=REPOSITORY)
    first = hub.files[REPOSITORY]["config.json"]
    assert (tmp_path / "out" / "config.json").read_bytes() == first
    assert hub.created[REPOSITORY].get("visibility") is None
    convert_hf(model, dtype="bf16", push=REPOSITORY)
    assert json.loads(hub.files[REPOSITORY]["config.json"])["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token": None}, "needs a token.*HF_TOKEN"),
        ({"offline": True}, "HF_HUB_OFFLINE forbids"),
        ({"push": "interbert"}, "OWNER/NAME"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_converted(
    wrong: dict[str, Any], message: str, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "token" in wrong:
        monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", wrong.get("offline", False))
    with pytest.raises(UsageError, match=message):
        convert_hf(model, tmp_path / "out", push=wrong.get("push", REPOSITORY))
    assert not (tmp_path / "out").exists()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        ({"token": "another"}, "answers 401.*may not write"),
        ({"broken": {"lfs/": 403}}, "answers 403"),
        ({"broken": {"/commit/": 400}}, "400"),
    ],
)
def test_what_the_hub_refuses_is_one_line_and_a_folder_stays(
    breaks: dict[str, Any], message: str, hub: Hub, model: Path, tmp_path: Path
) -> None:
    for name, value in breaks.items():
        setattr(hub, name, value)
    with pytest.raises(UsageError, match=rf"--push {REPOSITORY}: .*{message}.*nothing was committed"):
        convert_hf(model, tmp_path / "out", push=REPOSITORY)
    assert (tmp_path / "out" / "config.json").is_file()


def test_what_the_hub_says_of_a_card_is_said(hub: Hub, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown license ncsa"):
        convert_hf(model, tmp_path / "out", push=REPOSITORY, about=CardOptions(license="ncsa"))


def test_a_hub_that_is_not_there_is_named(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=r"cannot be reached.*http://127.0.0.1:9"):
        convert_hf(model, tmp_path / "out", push=REPOSITORY)


def test_without_a_folder_or_a_repository_the_line_says_so(model: Path) -> None:
    with pytest.raises(UsageError, match="give DST"):
        convert_hf(model)
    with pytest.raises(UsageError, match="--private is for a repository"):
        convert_hf(model, model / "out", private=True)


@pytest.mark.slow
def test_transformers_alone_loads_what_was_pushed(hub: Hub, model: Path, tmp_path: Path) -> None:
    convert_hf(model, push=REPOSITORY)
    given = padded(packed_batch(), extra=1)
    asked = {"folder": REPOSITORY, "auto": "AutoModelForPreTraining", "method": "", "given": (), "named": given}
    torch.save([asked, asked], tmp_path / "asked.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "tests" / "model" / "stranger.py"), str(tmp_path / "asked.pt"), str(tmp_path / "answers.pt")]
    done = subprocess.run(script, cwd=tmp_path, env=environment | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, _ = torch.load(tmp_path / "answers.pt", weights_only=False)
    right = tiny_model()(**given)
    for answered in answers:
        torch.testing.assert_close(answered["text_logits"], right.text_logits.detach(), rtol=0, atol=1e-5)
