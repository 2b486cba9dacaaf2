"""Files that appear whole or not at all, on disks that are really full and under a limit of a file's size."""

import errno
import os
from pathlib import Path

import pytest

from megainter.errors import NoSpaceError, UsageError
from megainter.files import aside, is_full, write_atomically
from tests.disks import mounting, run_python

__all__ = ["mounting"]  # a fixture
ROWS = 20_000  # of the tables written to a full disk: more than any buffer holds

# What writes results, by name; each is called with the path that it writes.
WRITERS = """
    import json, os, resource
    import numpy as np, pyarrow as pa, torch
    from pathlib import Path
    from safetensors.torch import save_file
    from megainter.data.tables.pairs import PAIRS_SCHEMA, Pair, Pairs, write_pairs
    from megainter.data.tables.labelled import Examples, TaskFacts
    from megainter.data.tables.questions import Question, read_questions, write_questions
    from megainter.errors import MegainterError
    from megainter.files import aside, write_atomically, write_json
    from megainter.tasks.classification.batches import EncodedExamples
    from megainter.tasks.classification.metrics import labels_of
    from megainter.tasks.classification.report import write_predictions
    from megainter.tasks.retrieval.gallery import Gallery
    from megainter.tasks.retrieval.ranking import Ranks
    from megainter.tasks.retrieval.report import write_pair_scores, write_scores, write_top
    from megainter.tasks.vcr.batches import all_items
    from megainter.tasks.vcr.report import write_probabilities, write_submission

    N = {rows}
    rng = np.random.default_rng(0)
    random = rng.random((4, N)).astype(np.float32)

    def gallery():
        columns = [[f"{{n}}-{{rng.integers(1 << 60)}}" for n in range(N)] for _ in PAIRS_SCHEMA.names]
        table = pa.table(columns, schema=PAIRS_SCHEMA)
        ids, own = ["a", "b", "c", "d"], np.zeros(N, np.int32)
        return Gallery(Pairs(table, own, ids, "x"), ids, np.arange(N), own, 0)

    def predictions(path):
        ids = [f"{{rng.integers(1 << 60)}}" for n in range(N)]
        texts, none = ["a"] * N, [[]] * N
        columns = {{"example_id": ids, "text_a": texts, "labels": none, "targets": none, "counts": none, "kinds": none, "group": texts}}
        examples = Examples(pa.table(columns), TaskFacts("t", "single_label", ("x", "y"), "accuracy"), 0, "d")
        encoded = EncodedExamples(None, labels_of(examples, ("x", "y")), 0, (), None, 1, 1, ())
        write_predictions(path, examples, encoded, np.round(random[:3].T))

    texts = [f"{{n}}-{{rng.integers(1 << 60)}}" for n in range(5000)]
    one = lambda text: Question(text, "a", "a", "a", "val", ("p",), ("Is",), (("a",),) * 4, (("b",),) * 4)
    write_questions(Path({other!r}), map(one, texts))
    questions = read_questions(Path({other!r}))

    def vcr(path, write):
        items = all_items(questions, (0, 1), every_answer=True)
        write(path, questions, items, rng.random((len(items), 4)).astype(np.float32))

    def saved(path, save):
        with aside(path) as partial:
            save(partial)

    def torch_saved(partial):
        with open(partial, "wb") as file:
            torch.save({{"x": torch.from_numpy(random)}}, file)

    def folder(path):
        with aside(path) as partial:
            partial.mkdir()
            save_file({{"x": torch.from_numpy(random)}}, partial / "model.safetensors")

    ranks = lambda: Ranks(np.ones(N, int), np.ones(4, int), np.zeros((N, 4), np.int32), random.T.copy())
    writers = {{
        "text": lambda path: write_atomically(path, os.urandom(1 << 20)),
        "json": lambda path: write_json(path, random.tolist()),
        "pairs": lambda path: write_pairs(path, (Pair(str(n), "a", "a.jpg", str(rng.integers(1 << 60)), "") for n in range(N))),
        "top": lambda path: write_top(path, gallery(), ranks()),
        "scores": lambda path: write_scores(path, random, gallery()),
        "pair scores": lambda path: write_pair_scores(path, random.ravel(), np.arange(4 * N), gallery()),
        "predictions": predictions,
        "probabilities": lambda path: vcr(path, write_probabilities),
        "submission of vcr": lambda path: vcr(path, write_submission),
        "safetensors": lambda path: saved(path, lambda partial: save_file({{"x": torch.from_numpy(random)}}, partial)),
        "torch": lambda path: saved(path, torch_saved),
        "numpy": lambda path: saved(path, lambda partial: np.save(open(partial, "wb"), random)),
        "folder": folder,
    }}
"""

REFUSED = """
    disk = Path({disk!r})
    for name, write in writers.items():
        path = disk / name
        if name == "folder":
            path.mkdir()
        elif name != "pairs":  # which is no table yet
            path.write_bytes(b"old")
    before = sorted(os.listdir(disk))
    {limit}
    for name, write in writers.items():
        try:
            write(disk / name)
            print(name, "was written")
        except MegainterError as error:
            if error.exit_code != 5 or not str(error).startswith(f"{{disk / name}} cannot be written: "):
                print(name, type(error), error)
        if (disk / name).is_file() and (disk / name).read_bytes() != b"old":
            print(name, "is another file")
        if sorted(os.listdir(disk)) != before:
            print(name, "left", set(os.listdir(disk)) ^ set(before))
    print(len(writers), "tried")
"""


def refused_script(disk: Path, limit: str = "") -> str:
    return WRITERS.format(rows=ROWS, other=str(disk.parent / "questions.parquet")) + REFUSED.format(disk=str(disk), limit=limit)


def test_every_writer_tells_a_full_disk_and_leaves_the_old_file(mounting: Path) -> None:
    run = run_python(refused_script(mounting), f"mount -t tmpfs -o size=128k tmpfs {mounting}")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "13 tried\n"


@pytest.mark.slow
def test_every_writer_tells_a_limit_of_a_file_s_size(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    run = run_python(refused_script(tmp_path / "disk", "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"))
    assert run.returncode == 0, run.stderr
    assert run.stdout == "13 tried\n"


def test_what_ends_badly_leaves_the_old_file_and_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def interrupted() -> None:
        with aside(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("x", "old")]


def test_a_folder_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with aside(tmp_path / "run") as partial:
            (partial / "deep").mkdir(parents=True)
            (partial / "deep" / content).write_text(content)
    assert [one.relative_to(tmp_path).as_posix() for one in sorted(tmp_path.rglob("*"))] == ["run", "run/deep", "run/deep/new"]


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f".x.{os.getpid()}.partial").mkdir()
    write_atomically(tmp_path / "x", "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("x", "new")]


@pytest.mark.parametrize("place", ["absent/x", "file/x", "folder", "x" * 300])
def test_a_place_that_cannot_be_written_is_a_mistake_of_the_user(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=rf"{place} cannot be written: "):
        write_atomically(tmp_path / place, "text")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_errors_about_other_files_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="source"), aside(tmp_path / "x"):
        (tmp_path / "source").read_text()
    with pytest.raises(ZeroDivisionError), aside(tmp_path / "y"):
        assert 1 / 0
    with pytest.raises(NoSpaceError, match="no space left in the quota"), aside(tmp_path / "z"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_known_by_number_and_by_words() -> None:
    assert is_full(OSError(errno.ENOSPC, "x"))
    assert is_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_full(OSError(errno.EACCES, "x"))
    assert not is_full(RuntimeError("out of memory"))
