"""Weights by name, with the Hub's real client against a hub on localhost: `tests.hub`."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import save
from torch import hub as torch_hub

from megainter.errors import DamagedError, UsageError
from megainter.weights import PACKAGED, TORCHVISION, check_name, locate
from preprocessing.detector.convert import convert_detector
from preprocessing.detector.torchvision_models import TORCHVISION_MODELS
from tests.hub import COMMIT, Hub, serve
from tests.places import ROOT

LATER = "b" * 40
WEIGHTS = save({"x": torch.arange(5000.0)})
REPOSITORY = "team/model"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one model, and an empty cache."""
    files = {"config.json": b"{}", "vocab.txt": b"a\n", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"never", "README.md": b"#"}
    with serve(Hub(files={REPOSITORY: files})) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield served


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def fetched(hub: Hub) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_models_folder_has_its_safest_weights_and_what_stands_beside_them(hub: Hub) -> None:
    found = locate(f"hf:{REPOSITORY}")
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(path.name for path in found.path.iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    assert found.name == f"hf:{REPOSITORY}@{COMMIT}"
    assert found.digests == {"model.safetensors": sha256(WEIGHTS), "config.json": sha256(b"{}"), "vocab.txt": sha256(b"a\n")}
    assert found.told == f"weights hf:{REPOSITORY}@{COMMIT}: SHA-256 model.safetensors {sha256(WEIGHTS)}"


def test_what_is_cached_is_not_fetched_again_and_a_commit_asks_nothing(hub: Hub) -> None:
    first = locate(f"hf:{REPOSITORY}")
    hub.requests.clear()
    assert locate(f"hf:{REPOSITORY}") == first
    assert fetched(hub) == []
    hub.requests.clear()
    assert locate(first.again) == first
    assert hub.requests == []


def test_a_branch_that_moved_is_fetched_at_its_new_commit_and_the_old_one_stays(hub: Hub) -> None:
    old = locate(f"hf:{REPOSITORY}")
    changed = save({"x": torch.zeros(3)})
    hub.files[REPOSITORY]["model.safetensors"] = changed
    hub.revisions = {"main": LATER, "v1": COMMIT}
    new = locate(f"hf:{REPOSITORY}")
    assert (new.name, (new.path / "model.safetensors").read_bytes()) == (f"hf:{REPOSITORY}@{LATER}", changed)
    assert (locate(old.again).path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_revision_and_a_file_in_a_folder(hub: Hub) -> None:
    hub.revisions["v2"] = LATER
    hub.files[REPOSITORY] |= {"sub/net.bin": b"weights", "sub/net.json": b"{}", "sub/other.bin": b"other"}
    found = locate(f"hf:{REPOSITORY}/sub/net.bin@v2")
    assert (found.path.name, found.path.read_bytes()) == ("net.bin", b"weights")
    assert found.path.with_suffix(".json").is_file()
    assert not found.path.with_name("other.bin").exists()
    assert found.name == f"hf:{REPOSITORY}/sub/net.bin@{LATER}"


def test_shards_come_with_their_index(hub: Hub) -> None:
    index = json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}}).encode()
    hub.files["team/shards"] = {"model.safetensors.index.json": index, "config.json": b"{}"}
    hub.files["team/shards"] |= {f"model-0000{number}-of-00002.safetensors": b"%d" % number for number in (1, 2)}
    found = locate("hf:team/shards")
    assert (found.path / "model-00002-of-00002.safetensors").read_bytes() == b"2"
    assert found.path.name == COMMIT


def test_a_detector_is_a_file(hub: Hub) -> None:
    assert locate(f"hf:{REPOSITORY}", "detector").path.name == "model.safetensors"
    hub.files["team/two"] = {"a.pth": b"1", "b.pth": b"2"}
    with pytest.raises(UsageError, match=r"2 files .pth, first a.pth; name one"):
        locate("hf:team/two", "detector")


def test_vg_is_the_usual_repository(hub: Hub) -> None:
    hub.files["unc-nlp/frcnn-vg-finetuned"] = {"pytorch_model.bin": b"state", "config.yaml": b"", "objects_vocab.txt": b"cat\n"}
    found = locate("vg", "detector")
    assert (found.path.name, found.name) == ("pytorch_model.bin", f"hf:unc-nlp/frcnn-vg-finetuned/pytorch_model.bin@{COMMIT}")
    assert (found.path.parent / "objects_vocab.txt").is_file()


def test_a_cut_connection_goes_on_where_it_was(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 64)  # bytes; of the usual 10 MB a part that did not arrive whole is lost
    hub.cut_once.add("model.safetensors")
    found = locate(f"hf:{REPOSITORY}")
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [given for method, path, given in hub.requests if method == "GET" and path.endswith("model.safetensors")]
    assert ranges[0] is None
    assert len(WEIGHTS) // 2 - 64 <= int(str(ranges[1]).removeprefix("bytes=").removesuffix("-")) <= len(WEIGHTS) // 2


@pytest.mark.parametrize("digest", ["0" * 64, "0" * 40])
def test_content_of_another_digest_is_refused_and_removed(hub: Hub, digest: str) -> None:
    hub.stated["model.safetensors"] = digest
    with pytest.raises(DamagedError, match=r"model.safetensors has the digest .* the Hub states 0000.*run again"):
        locate(f"hf:{REPOSITORY}")
    del hub.stated["model.safetensors"]
    assert (locate(f"hf:{REPOSITORY}").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_cached_file_that_was_changed_is_refused_and_fetched_again(hub: Hub) -> None:
    found = locate(f"hf:{REPOSITORY}")
    (found.path / "model.safetensors").resolve().write_bytes(b"x" * len(WEIGHTS))
    with pytest.raises(DamagedError, match="it was removed: run again"):
        locate(found.again)
    assert (locate(f"hf:{REPOSITORY}").path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_file_shorter_than_stated_is_refused(hub: Hub) -> None:
    hub.longer["model.safetensors"] = 7
    with pytest.raises(DamagedError, match="not as large as the Hub states"):
        locate(f"hf:{REPOSITORY}")


def test_git_digests_are_those_of_git(hub: Hub) -> None:
    hub.stated["vocab.txt"] = "78981922613b2afb6025042ff6bd878ac1994e85"  # printf 'a\n' | git hash-object --stdin
    assert locate(f"hf:{REPOSITORY}").digests["vocab.txt"] == sha256(b"a\n")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:team/nothing", r"no repository team/nothing on the Hub, or is private.*HF_TOKEN"),
        ("hf:team/secret", r"no repository team/secret on the Hub, or is private.*HF_TOKEN"),
        (f"hf:{REPOSITORY}@v9", r"team/model has no revision v9"),
        (f"hf:{REPOSITORY}/modle.safetensors", r"has no modle.safetensors; did you mean model.safetensors\?"),
        ("hf:team/text", r"no weights there"),
    ],
)
def test_what_is_not_on_the_hub_is_told_in_one_line(hub: Hub, name: str, message: str) -> None:
    hub.files |= {"team/secret": {"model.safetensors": WEIGHTS}, "team/text": {"README.md": b"#"}}
    hub.private.add("team/secret")
    with pytest.raises(UsageError, match=message) as refused:
        locate(name)
    assert "\n" not in str(refused.value)


def test_offline_takes_the_cache_and_says_what_to_download_where_there_is_none(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = locate(f"hf:{REPOSITORY}")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert locate(f"hf:{REPOSITORY}") == online
    with pytest.raises(
        UsageError, match=rf"HF_HUB_OFFLINE forbids the network: download the files of {hub.url}/team/other/tree/main by hand"
    ):
        locate("hf:team/other")
    with pytest.raises(UsageError, match=r"unc-nlp/frcnn-vg-finetuned/resolve/main/pytorch_model.bin by hand, put it on this machine"):
        locate("vg", "detector")
    assert hub.requests == []


def test_without_a_network_the_cache_is_taken_out_loud(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    online = locate(f"hf:{REPOSITORY}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert locate(f"hf:{REPOSITORY}") == online
    assert f"the copy in the cache is taken, commit {COMMIT}" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"cannot be reached .* by hand"):
        locate("hf:team/other")


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub) -> tuple[bytes, str]:
    """torchvision's table with an address on localhost; the content there, and its digest."""
    content = b"weights of torchvision"
    digest = sha256(content)
    name = f"fasterrcnn-{digest[:8]}.pth"
    hub.files[REPOSITORY][name] = content
    weights = torchvision.models.get_model_weights(TORCHVISION[1])["DEFAULT"]
    monkeypatch.setattr(weights.value, "url", f"{hub.url}/{REPOSITORY}/resolve/main/{name}")
    monkeypatch.setattr(torch_hub, "_hub_dir", str(tmp_path / "torch"))
    return content, digest


NAME = f"torchvision:{TORCHVISION[1]}"


def test_torchvisions_weights_are_fetched_once(hub: Hub, table: tuple[bytes, str]) -> None:
    content, digest = table
    found = locate(NAME, "detector")
    assert (found.path.read_bytes(), found.name) == (content, NAME)
    assert found.told == f"weights {NAME}: SHA-256 {found.path.name} {digest}"
    hub.requests.clear()
    assert locate(NAME, "detector") == found
    assert hub.requests == []


def test_torchvisions_weights_of_another_digest_are_refused(hub: Hub, table: tuple[bytes, str]) -> None:
    name = next(name for name in hub.files[REPOSITORY] if name.endswith(".pth"))
    hub.cut_once.add(name)
    with pytest.raises(DamagedError, match=r"cut off or has another SHA-256 .*run again, or download http"):
        locate(NAME, "detector")
    found = locate(NAME, "detector")
    found.path.write_bytes(b"changed")
    with pytest.raises(DamagedError, match=r"its name says .*: remove it and run again"):
        locate(NAME, "detector")


def test_torchvisions_weights_without_a_network(hub: Hub, table: tuple[bytes, str], monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in hub.files[REPOSITORY] if name.endswith(".pth"))
    del hub.files[REPOSITORY][name]
    with pytest.raises(UsageError, match=rf"cannot be fetched .*: download {hub.url}/.*{name} by hand to .*checkpoints/{name}"):
        locate(NAME, "detector")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=rf"HF_HUB_OFFLINE forbids the network: download {hub.url}"):
        locate(NAME, "detector")


def test_the_names_of_torchvision_are_the_models_that_the_detector_reads() -> None:
    assert set(TORCHVISION) == set(TORCHVISION_MODELS)
    for name in TORCHVISION:
        assert torchvision.models.get_model_weights(name)["DEFAULT"].url.endswith(".pth")


def test_a_path_that_exists_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "vg", "hf:team"):
        Path(name).touch()
        assert locate(name, "detector").path == Path(name)
        assert locate(name, "detector").told is None
    (tmp_path / "hf:team").unlink()
    (tmp_path / "hf:team" / "model").mkdir(parents=True)
    assert locate("hf:team/model").path == Path("hf:team/model")


def test_a_folder_of_photos_is_no_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    Path("others").mkdir()
    assert locate("photos", "detector").path.name == PACKAGED["photos"]
    with pytest.raises(UsageError, match="--weights others is a folder; give the file"):
        check_name("others", "detector", "--weights")


def test_those_that_come_along_have_a_digest() -> None:
    for name, file in PACKAGED.items():
        found = locate(name, "detector")
        assert found.path.name == file
        assert found.digests[file] == sha256(found.path.read_bytes())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("fotos", "detector", r"did you mean photos\?"),
        ("torchvision:fasterrcnn_resnet50_v2", "detector", r"did you mean torchvision:fasterrcnn_resnet50_fpn_v2\?"),
        ("torchvision:ssd300", "detector", "does not exist"),
        ("detectr.safetensors", "detector", r"did you mean detector.safetensors\?"),
        ("team/model", "model", "a repository of the Hub is named hf:team/model"),
        ("hf:model", "model", r"give hf:OWNER/NAME"),
        ("hf:team/../model", "model", r"give hf:OWNER/NAME"),
        ("hf:team/model/../../x", "model", r"give hf:OWNER/NAME"),
        ("photos", "model", "names a detector, and a model is wanted"),
        ("nothing", "model", "nothing does not exist"),
    ],
)
def test_a_mistyped_name_gets_its_nearest(name: str, kind: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detector.safetensors").touch()
    with pytest.raises(UsageError, match=message):
        check_name(name, kind)  # type: ignore[arg-type]


def test_a_converted_detector_says_what_it_was_made_from(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files["team/photos"] = {"detector.safetensors": locate("photos", "detector").path.read_bytes()}
    digest = sha256(hub.files["team/photos"]["detector.safetensors"])
    convert_detector(Path("hf:team/photos"), tmp_path / "out.safetensors")
    assert f"weights hf:team/photos@{COMMIT}: SHA-256 detector.safetensors {digest}" in capsys.readouterr().out
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["origin.json"])["sha256"]["detector.safetensors"] == digest


def test_the_environment_names_the_hub_the_cache_and_the_lack_of_a_network(hub: Hub, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "own"), "PYTHONPATH": str(ROOT)}
    ask = [sys.executable, "-c", f"from megainter.weights import locate; print(locate('hf:{REPOSITORY}').path)"]
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    first = subprocess.run(ask, env=offline, capture_output=True, text=True)
    assert "HF_HUB_OFFLINE forbids the network: download the files of" in first.stderr
    found = subprocess.run(ask, env=environment, capture_output=True, text=True)
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "own"), found.stderr
    assert subprocess.run(ask, env=offline, capture_output=True, text=True).stdout == found.stdout
