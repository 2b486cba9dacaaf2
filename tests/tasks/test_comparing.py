"""Reports side by side: figures, what is not alike, and single queries counted by hand."""

import json
from fractions import Fraction
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megainter.errors import UsageError
from megainter.files import sha256_of
from megainter.tasks.comparing import compare, mcnemar, told
from tests.test_cli import run


def write_report(path: Path, ranks: list[int], **changes: Any) -> Path:
    """A report of retrieval as `megainter evaluate` writes it, with the table of its captions."""
    recall = {f"r_at_{k}": float(np.mean(np.array(ranks) <= k)) for k in (1, 5, 10)}
    report = {
        "text_to_image": recall, "image_to_text": recall, "images": 20, "captions": len(ranks), "pairs": "p.parquet",
        "pairs_digest": "a" * 64,
        "model": "m", "model_digest": "b" * 64, "split": "test", "precision": "fp32", "store_digest": "c" * 64, "max_regions": 36,
        "max_text_tokens": 36, "prefilter": None, "both_stages": None, "top": f"{path.stem}.top.parquet",
    }  # fmt: skip
    path.write_text(json.dumps(report | changes))
    pq.write_table(pa.table({"pair_id": [str(n) for n in range(len(ranks))], "rank": ranks}), path.with_suffix(".top.parquet"))
    return path


def test_figures_and_queries_are_counted(tmp_path: Path) -> None:
    one = write_report(tmp_path / "one.json", [1, 1, 1, 2, 3, 1, 9, 20, 1, 4])
    other = write_report(tmp_path / "other.json", [1, 2, 1, 1, 1, 1, 1, 20, 1, 1])
    found = compare([one, other])
    figures = {figure.name: (figure.values, figure.difference) for figure in found.figures}
    assert figures["text to image R@1"] == ([50.0, 80.0], 30.0)
    assert figures["image to text R@5"] == ([80.0, 90.0], 10.0)
    assert found.unlike == []
    assert found.paired is not None
    assert (found.paired.both, found.paired.first_alone, found.paired.second_alone, found.paired.neither) == (4, 1, 4, 1)
    assert found.paired.p == pytest.approx(12 / 32)  # twice (1 + 5) of 32
    assert "of 10, 4 with both, 1 with one.json alone, 4 with other.json alone; p 0.38" in told(found)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (3, 3), (2, 8), (40, 25), (0, 400), (190, 210)])
def test_mcnemar_is_the_exact_binomial(first: int, second: int) -> None:
    count = first + second
    shares = [Fraction(comb(count, k), 2**count) for k in range(count + 1)]
    both_tails = sum(share for k, share in enumerate(shares) if abs(2 * k - count) >= abs(first - second))
    assert mcnemar(first, second) == pytest.approx(float(both_tails), rel=1e-12)


def test_both_stages_and_several_reports_have_columns(tmp_path: Path) -> None:
    stages = {"prefilter": {"candidates": 20, "text_to_image": {"r_at_1": 0.1, "r_at_5": 0.2, "r_at_10": 0.3}}}
    stages["prefilter"]["image_to_text"] = stages["prefilter"]["text_to_image"]
    paths = [write_report(tmp_path / "a.json", [1, 2]), write_report(tmp_path / "b.json", [1, 1], **stages), tmp_path / "sub" / "a.json"]
    paths[2].parent.mkdir()
    write_report(paths[2], [2, 2])
    found = compare(paths)
    figures = {figure.name: (figure.values, figure.difference) for figure in found.figures}
    assert figures["first stage, text to image R@5"] == ([None, 20.0, None], None)
    assert figures["text to image R@1"] == ([50.0, 100.0, 0.0], -50.0)
    assert found.paired is None
    assert told(found).splitlines()[0].split() == [f"{tmp_path.name}/a.json", f"{tmp_path.name}/b.json", "sub/a.json", "difference"]


def test_what_was_not_measured_alike_is_told_and_not_paired(tmp_path: Path) -> None:
    one, other = (
        write_report(tmp_path / "one.json", [1, 2]),
        write_report(tmp_path / "other.json", [1, 2], split="val", pairs_digest="e" * 64),
    )
    found = compare([one, other])
    assert found.unlike == [f"pairs digest: {'a' * 12}, {'e' * 12}", "split: test, val"]
    assert found.paired is None
    outside = write_report(tmp_path / "outside.json", [1, 2], top="../one.top.parquet")
    assert compare([one, outside]).paired is None


def test_a_table_that_was_written_anew_is_not_counted_and_one_model_is_told(tmp_path: Path) -> None:
    one, other = write_report(tmp_path / "one.json", [1, 2]), write_report(tmp_path / "other.json", [1, 1])
    digest = sha256_of(tmp_path / "one.top.parquet")
    one.write_text(json.dumps(json.loads(one.read_text()) | {"top_sha256": digest}))
    assert compare([one, other]).paired is not None
    write_report(tmp_path / "new.json", [2, 2]).with_suffix(".top.parquet").rename(tmp_path / "one.top.parquet")
    found = compare([one, other])
    assert found.paired is None
    assert "queries are not counted one by one: the tables beside the reports are not there, or were written anew" in told(found)
    assert "all are of the same weights" in told(found)
    assert "in percent; one of 2 is 50" in told(found)


def test_other_settings_are_told_and_counted_all_the_same(tmp_path: Path) -> None:
    one, other = write_report(tmp_path / "one.json", [1, 2]), write_report(tmp_path / "other.json", [1, 1], precision="bf16")
    found = compare([one, other])
    assert found.settings == ["fp32", "bf16"]
    assert found.paired is not None
    assert "measured by: fp32; bf16" in told(found)
    assert "not counted" not in told(found)


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    one = write_report(tmp_path / "one.json", [1, 2])
    vcr = {"model_digest": "b", "questions_file": "q.parquet", "answer": 0.5, "rationale": 0.5, "both": 0.25, "labelled": 4}
    (tmp_path / "vcr.json").write_text(json.dumps(vcr))
    (tmp_path / "none.json").write_text("[]")
    with pytest.raises(UsageError, match=r"one\.json is a report of retrieval and .*vcr\.json of vcr"):
        compare([one, tmp_path / "vcr.json"])
    with pytest.raises(UsageError, match=r"none\.json is no report of `megainter evaluate`"):
        compare([one, tmp_path / "none.json"])
    with pytest.raises(UsageError, match="at least two"):
        compare([one])


def test_from_the_command_line(tmp_path: Path) -> None:
    one, other = write_report(tmp_path / "one.json", [1, 2]), write_report(tmp_path / "other.json", [1, 1])
    done = run("evaluate", "compare", one, other, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["paired"]["second_alone"] == 1
    missing = run("evaluate", "compare", one, tmp_path / "othr.json")
    assert missing.returncode == 2
    assert "did you mean" in missing.stderr
