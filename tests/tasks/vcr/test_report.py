"""VCR's figures against brute force, and the files that carry them."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megainter.data.tables.questions import Question, read_questions, write_questions
from megainter.errors import UsageError
from megainter.tasks.vcr.batches import all_items, right_choices
from megainter.tasks.vcr.inputs import ANSWER, RATIONALE
from megainter.tasks.vcr.report import Judged, accuracies, is_right, write_probabilities, write_submission


def write(folder: Path, labels: list[tuple[int, int]], split: str = "val"):
    one = Question("", "a", "a.jpg", "a.json", split, ("person",), ("Is", (0,), "?"), (("a",),) * 4, (("b",),) * 4)
    rows = [replace(one, question_id=f"{split}-{n}", answer_label=a, rationale_label=r) for n, (a, r) in enumerate(labels)]
    write_questions(folder / "q.parquet", rows)
    return read_questions(folder / "q.parquet")


def test_both_right_is_joined_by_id_and_not_by_place(tmp_path: Path) -> None:
    """Random scores of 500 questions, the rationales in another order than the answers; counted by a loop over questions."""
    rng = np.random.default_rng(3)
    labels = [(int(a), int(r)) for a, r in rng.integers(0, 4, (500, 2))]
    questions = write(tmp_path, labels)
    items = all_items(questions, (0, 1), every_answer=False)
    order = rng.permutation(len(items))
    items = [items[i] for i in order]
    scores = rng.random((len(items), 4)).astype(np.float32).round(1)  # with ties
    wanted = right_choices(questions, items)
    scores[rng.random(len(items)) < 0.5, 0] += 2  # where 0 is right it is, mostly
    right = is_right(scores, wanted)
    judged = [Judged(f"val-{item.row}", item.kind, bool(value)) for item, value in zip(items, right, strict=True)]
    found = accuracies(judged)
    chosen = {(item.row, item.kind): row for item, row in zip(items, scores, strict=True)}
    hits = np.zeros((500, 2), dtype=bool)
    for number, pair in enumerate(labels):
        for kind in (0, 1):
            row = chosen[number, kind]
            hits[number, kind] = all(row[pair[kind]] > row[other] for other in range(4) if other != pair[kind])
    assert found == {"answer": hits[:, 0].mean(), "rationale": hits[:, 1].mean(), "both": (hits[:, 0] & hits[:, 1]).mean()}
    by_place = np.mean([a.right and r.right for a, r in zip(judged[::2], judged[1::2], strict=True)])
    assert found["both"] != by_place, "the order of the test tells nothing"


def test_a_model_that_cannot_decide_is_never_right() -> None:
    assert is_right(np.full((4, 4), 0.25, np.float32), np.arange(4)).tolist() == [False] * 4
    assert is_right(np.array([[0.5, 0.5, 0, 0], [0.6, 0.4, 0, 0]]), np.array([0, 0])).tolist() == [False, True]


def test_figures_of_nothing_are_left_out() -> None:
    assert accuracies([]) == {}
    assert accuracies([Judged("a", ANSWER, True)]) == {"answer": 1.0}
    assert accuracies([Judged("a", ANSWER, True), Judged("b", RATIONALE, False)]) == {"answer": 1.0, "rationale": 0.0}
    with pytest.raises(UsageError, match="'a' was judged twice for its rationale"):
        accuracies([Judged("a", RATIONALE, True)] * 2)


def test_the_leaderboards_file(tmp_path: Path) -> None:
    questions = write(tmp_path, [(-1, -1)] * 3, "test")
    items = all_items(questions, (0, 1), every_answer=False)
    order = np.random.default_rng(0).permutation(len(items))
    scores = np.random.default_rng(1).dirichlet(np.ones(4), len(items)).astype(np.float32)
    write_submission(tmp_path / "s.csv", questions, [items[i] for i in order], scores[order])
    with open(tmp_path / "s.csv", newline="") as file:
        header, *rows = csv.reader(file)
    expected = """annot_id answer_0 answer_1 answer_2 answer_3
        rationale_conditioned_on_a0_0 rationale_conditioned_on_a0_1 rationale_conditioned_on_a0_2 rationale_conditioned_on_a0_3
        rationale_conditioned_on_a1_0 rationale_conditioned_on_a1_1 rationale_conditioned_on_a1_2 rationale_conditioned_on_a1_3
        rationale_conditioned_on_a2_0 rationale_conditioned_on_a2_1 rationale_conditioned_on_a2_2 rationale_conditioned_on_a2_3
        rationale_conditioned_on_a3_0 rationale_conditioned_on_a3_1 rationale_conditioned_on_a3_2 rationale_conditioned_on_a3_3"""
    assert header == expected.split()
    assert [row[0] for row in rows] == ["test-0", "test-1", "test-2"]
    for number, row in enumerate(rows):
        np.testing.assert_allclose([float(value) for value in row[1:]], scores[5 * number : 5 * number + 5].flatten(), rtol=1e-6)


def test_the_table_of_probabilities(tmp_path: Path) -> None:
    questions = write(tmp_path, [(2, 1), (0, 3)])
    items = all_items(questions, (0, 1), every_answer=False)
    scores = np.random.default_rng(1).dirichlet(np.ones(4), len(items)).astype(np.float32)
    write_probabilities(tmp_path / "p.parquet", questions, items, scores)
    rows = pq.read_table(tmp_path / "p.parquet").to_pylist()
    for number, (row, given) in enumerate(zip(rows, (2, 0), strict=True)):
        assert (row["question_id"], row["answer_label"]) == (f"val-{number}", given)
        assert row["answer"] == scores[2 * number].tolist()
        assert row[f"rationale_given_{given}"] == scores[2 * number + 1].tolist()
        assert [row[f"rationale_given_{other}"] for other in range(4) if other != given] == [None] * 3
