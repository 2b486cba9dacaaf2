"""Checkpoint folders on disk: every kind of damage is found before use, and the newest whole one is taken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megainter.errors import DamagedError
from megainter.files import sha256_of, write_json
from megainter.training import checkpoint


def write_checkpoint(root: Path, step: int) -> Path:
    """A checkpoint of one tensor whose value is its step."""
    folder = root / checkpoint.step_name(step)
    folder.mkdir(parents=True)
    save_file({"model.a": torch.full((4,), float(step))}, folder / "weights-00000-of-00001.safetensors")
    write_json(folder / "trainer.json", {"step": step})
    files = [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())]
    write_json(folder / checkpoint.MANIFEST, {"format": 1, "files": files})
    (root / "latest").write_text(folder.name + "\n")
    return folder


def test_newest_is_read_back(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step)
    warnings: list[str] = []
    saved = checkpoint.newest(tmp_path, warnings.append)
    assert saved is not None
    assert (saved.step, warnings) == (20, [])
    assert checkpoint.weight_names(saved) == ["model.a"]
    with checkpoint.reader(saved) as read:
        assert torch.equal(read("weights", "model.a"), torch.full((4,), 20.0))
        with pytest.raises(DamagedError, match=r"no exp_avg of model\.a"):
            read("exp_avg", "model.a")


def test_nothing_there_is_not_damage(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, print) is None
    assert checkpoint.newest(tmp_path / "missing", print) is None


def test_every_flipped_bit_and_truncation_is_found(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    for path in [path for path in folder.iterdir() if path.name != checkpoint.MANIFEST]:
        content = path.read_bytes()
        for position in range(0, len(content), 7):
            changed = bytearray(content)
            changed[position] ^= 1 << (position % 8)
            path.write_bytes(changed)
            assert checkpoint.damage(folder), f"{path.name} byte {position}"
        path.write_bytes(content[:-1])
        assert "bytes instead of" in str(checkpoint.damage(folder))
        path.write_bytes(content)
    assert checkpoint.damage(folder) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": [{"file": "x"}]}', '{"files": 3}'])
def test_torn_manifest_is_damage(content: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (folder / checkpoint.MANIFEST).write_text(content)
    assert "manifest.json" in str(checkpoint.damage(folder))


def test_fallback_is_said_and_none_whole_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    newer = write_checkpoint(tmp_path, 20)
    (newer / "trainer.json").unlink()
    warnings: list[str] = []
    saved = checkpoint.newest(tmp_path, warnings.append)
    assert saved is not None
    assert saved.step == 10
    assert "trainer.json is missing" in warnings[0]
    (tmp_path / checkpoint.step_name(10) / checkpoint.MANIFEST).unlink()
    with pytest.raises(DamagedError, match="none of the 2 checkpoints"):
        checkpoint.newest(tmp_path, warnings.append)


@pytest.mark.parametrize("content", ["", "step_0000099\n", "\x00\x01"])
def test_a_wrong_latest_does_not_lose_the_checkpoint(content: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    (tmp_path / "latest").write_text(content)
    warnings: list[str] = []
    saved = checkpoint.newest(tmp_path, warnings.append)
    assert saved is not None
    assert saved.step == 10
    assert len(warnings) == 1


def test_partial_folders_are_not_candidates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10).rename(tmp_path / f"{checkpoint.PARTIAL}step_0000010")
    assert checkpoint.newest(tmp_path, print) is None


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 10)
    write_checkpoint(tmp_path, 20).rename(tmp_path / f"{checkpoint.PARTIAL}step_0000020-0123abcd")
    (tmp_path / ".step_0000010.77.old").mkdir()
    checkpoint.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_0000010"]
    checkpoint.remove_unfinished(tmp_path / "missing")


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 1)
    (tmp_path / "elsewhere").write_text("x")
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"].append({"file": "../elsewhere", "bytes": 1, "sha256": sha256_of(tmp_path / "elsewhere")})
    write_json(folder / checkpoint.MANIFEST, manifest)
    assert "elsewhere is missing" in str(checkpoint.damage(folder))
