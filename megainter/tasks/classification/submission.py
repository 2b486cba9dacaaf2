"""Predictions in the form that a benchmark's own server takes: VQA's JSON, GLUE's TSV, NLVR2's CSV."""

import json
import re
from collections.abc import Callable
from pathlib import Path

from megainter.data.tables.labelled import Examples
from megainter.errors import UsageError
from megainter.files import write_atomically

GLUE = ("cola", "sst-2", "mrpc", "qqp", "sts-b", "mnli", "qnli", "rte", "wnli")
FIRST_LINE = 2  # of a file of GLUE under its header line
LARGEST_SIMILARITY = 5  # of sts-b's values, from 0
Writer = Callable[[list[str], list[str]], str]  # from the ids of the examples and what is predicted of each to the file's text


def submission_ids(path: Path, examples: Examples) -> list[str]:
    """What a benchmark's file calls each example: a question's id, an identifier, or GLUE's index, which counts the rows of the test file.

    ``UsageError`` where the task has no such file, and where rows of GLUE's test are missing, or those of two files stand together.
    """
    task, ids = examples.task.name, [str(one) for one in examples.column("example_id")]
    if task not in WRITERS:
        raise UsageError(
            f"--submission is for vqa, nlvr2 and GLUE's tasks, and {path} is of {task!r:.80}; predictions are written in any case"
        )
    if task == "vqa" and (odd := next((one for one in ids if not (one.isascii() and one.isdecimal())), None)) is not None:
        raise UsageError(f"--submission needs VQA's question ids, which are numbers, and {path} has {odd!r:.80}")
    return _indices(path, ids) if task in GLUE else ids


def write_submission(path: Path, task: str, ids: list[str], predictions: list[str]) -> None:
    """Write a benchmark's file, whole or not at all, its rows in the order of the examples."""
    write_atomically(path, WRITERS[task](ids, predictions))


def _indices(path: Path, ids: list[str]) -> list[str]:
    """Rows from 0, by the lines that the ids of `prepare examples` tell, as in test_matched#17."""
    found = [re.fullmatch(r"(.*)#(\d+)", one, re.DOTALL) for one in ids]
    if not all(found):
        raise UsageError(f"{path} has the example id {ids[found.index(None)]!r:.80}, which is no line of GLUE's test: prepare that file")
    names = sorted({match[1] for match in found if match})
    if len(names) > 1:
        raise UsageError(f"{path} holds rows of {names[0]!r:.80} and {names[1]!r:.80}, and a submission is of one file: prepare them apart")
    lines = [int(match[2]) for match in found if match]
    wrong = next((place for place, line in enumerate(lines) if line != place + FIRST_LINE), None)
    if wrong is not None:
        raise UsageError(f"{path} lacks line {wrong + FIRST_LINE} of {names[0]!r:.80}, and a submission has every row: see its report")
    return [str(row) for row in range(len(lines))]


def _vqa(ids: list[str], predictions: list[str]) -> str:
    rows = zip(ids, predictions, strict=True)
    return json.dumps([{"question_id": int(number), "answer": answer} for number, answer in rows], ensure_ascii=False)


def _nlvr2(ids: list[str], predictions: list[str]) -> str:
    return "".join(f"{identifier},{label}\n" for identifier, label in zip(ids, predictions, strict=True))


def _glue(ids: list[str], predictions: list[str]) -> str:
    return "".join(f"{index}\t{label}\n" for index, label in zip(["index", *ids], ["prediction", *predictions], strict=True))


def _similarities(ids: list[str], predictions: list[str]) -> str:
    return _glue(ids, [f"{min(max(float(value), 0.0), LARGEST_SIMILARITY):.6g}" for value in predictions])


WRITERS: dict[str, Writer] = {"vqa": _vqa, "nlvr2": _nlvr2, **dict.fromkeys(GLUE, _glue), "sts-b": _similarities}
