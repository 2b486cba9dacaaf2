"""The process that writes checkpoints, by itself: what it writes, refuses and keeps. None of it needs torch."""

import base64
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from megainter.training.writing import BLOCK, MANIFEST, done
from tests.disks import mounting as mounting
from tests.disks import run_python

NAME = "exp_avg-00000-of-00001.safetensors"


def written(folder: Path, tensors: dict[str, np.ndarray], small: dict[str, bytes]) -> dict[str, Any]:
    """The answer to an order to write, with the memory as the library writes such a file."""
    content = save(tensors)
    memory = os.memfd_create("test")
    os.write(memory, b"what lies before" + content)
    order = {"do": "write", "folder": str(folder), "tensors": [[NAME, 16, len(content)]]}
    try:
        return done(order | {"small": {name: base64.b64encode(text).decode() for name, text in small.items()}}, memory)
    finally:
        os.close(memory)


def test_files_and_their_digests_are_those_of_the_memory(tmp_path: Path) -> None:
    tensors = {"a": np.arange(3 * BLOCK // 4 + 5, dtype=np.float32), "b": np.float32([[1.5]])}
    answer = written(tmp_path / "aside", tensors, {"vocab.txt": "ä\n".encode()})
    found = {path.name: (path.stat().st_size, sha256(path.read_bytes()).hexdigest()) for path in (tmp_path / "aside").iterdir()}
    assert {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in answer["entries"]} == found
    assert set(found) == {NAME, "vocab.txt"}
    loaded = load_file(tmp_path / "aside" / NAME)
    assert all(np.array_equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, BLOCK // 4 - 1, BLOCK // 4, 2 * BLOCK // 4 + 6])
def test_what_is_not_finite_is_named_wherever_it_is(value: float, position: int, tmp_path: Path) -> None:
    numbers = np.ones(2 * BLOCK // 4 + 7, dtype=np.float32)
    assert "entries" in written(tmp_path, {"a": numbers, "b": numbers}, {})
    numbers[position] = value
    assert written(tmp_path, {"a": np.ones(4, np.float32), "b": numbers}, {}) == {"not_finite": "exp_avg of b"}


def test_numbers_whose_sum_is_too_large_are_finite(tmp_path: Path) -> None:
    largest = np.full(1000, np.finfo(np.float32).max)
    assert "entries" in written(tmp_path, {"a": largest, "b": -largest}, {})


def publish(root: Path, step: int, keep: int, keep_every: int = 0) -> dict[str, Any]:
    """Publish a folder of one file."""
    folder = root / f".partial-step_{step:07d}-x"
    answer = written(folder, {"a": np.float32([step])}, {})
    order = {"do": "publish", "folder": str(folder), "final": str(root / f"step_{step:07d}"), "entries": answer["entries"]}
    return done(order | {"keep": keep, "keep_every": keep_every}, -1)


def test_the_newest_and_every_so_many_are_kept(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        assert publish(tmp_path, step, keep=2, keep_every=30) == {"left": None}
        assert (tmp_path / "latest").read_text() == f"step_{step:07d}\n"
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [f"step_{step:07d}" for step in (30, 60, 70)]
    publish(tmp_path, 80, keep=1)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["step_0000080"]


def test_a_step_that_is_published_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    publish(tmp_path, 10, keep=2)
    (tmp_path / "step_0000010" / "of the first").touch()
    publish(tmp_path, 10, keep=2)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [NAME, "latest", MANIFEST, "step_0000010"]


def test_a_folder_that_is_abandoned_is_gone(tmp_path: Path) -> None:
    written(tmp_path / "aside", {"a": np.float32([1])}, {})
    assert done({"do": "abandon", "folder": str(tmp_path / "aside")}, -1) == {}
    assert list(tmp_path.iterdir()) == []
    assert done({"do": "abandon", "folder": str(tmp_path / "never there")}, -1) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_a_full_disk_is_an_answer(mounting: Path) -> None:
    code = f"""
        import os
        from megainter.training.writing import done
        memory = os.memfd_create("test")
        header = b'{{"a":{{"dtype":"F32","shape":[1048574],"data_offsets":[0,4194296]}}}}   '
        os.write(memory, len(header).to_bytes(8, "little") + header)
        os.ftruncate(memory, 8 + len(header) + 4194296)
        order = {{"do": "write", "folder": "{mounting}/aside", "tensors": [["a.safetensors", 0, 8 + len(header) + 4194296]], "small": {{}}}}
        print(done(order, memory))
    """
    said = run_python(code, f"mount -t tmpfs -o size=1m tmpfs {mounting}")
    assert "No space left" in said.stdout, said.stdout + said.stderr
