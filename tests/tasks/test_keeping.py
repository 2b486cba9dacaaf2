"""What stands where a report or a page is to be written stays, unless it is the same model's, a page of ours, or is to be replaced."""

import json
from pathlib import Path

import pytest

from megainter.errors import UsageError
from megainter.files import OUR_PAGE, require_page_place
from megainter.model.folder import model_digest
from megainter.tasks.scoring.models import keep_reports
from megainter.view.pages import write_template


def model_folder(folder: Path, weights: bytes) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_report_of_another_model_and_any_other_file_stay(tmp_path: Path) -> None:
    one, two = model_folder(tmp_path / "one", b"1"), model_folder(tmp_path / "two", b"2")
    output = tmp_path / "scores.json"
    keep_reports(output, one, replace=False)
    output.write_text(json.dumps({"model": "one", "model_digest": model_digest(one)}))  # of unlabelled examples: no figures
    keep_reports(output, one, replace=False)
    with pytest.raises(UsageError, match=r"has the report of another model, one; give another name, or --replace"):
        keep_reports(output, two, replace=False)
    keep_reports(output, two, replace=True)
    for content in ("image,caption\na.jpg,x\n", "[]", '{"model_digest": 3}', "{"):
        output.write_text(content)
        with pytest.raises(UsageError, match="is there and is no report of `megainter evaluate`; give another name, or --replace"):
            keep_reports(output, one, replace=False)


def test_a_file_that_is_to_be_written_beside_no_report_stays(tmp_path: Path) -> None:
    model, output, beside = model_folder(tmp_path / "m", b"1"), tmp_path / "scores.json", tmp_path / "submission.csv"
    keep_reports(output, model, False, beside)
    beside.write_text("somebody's")
    with pytest.raises(UsageError, match=r"submission\.csv is there, and no report of it at --output"):
        keep_reports(output, model, False, beside)
    keep_reports(output, model, True, beside)
    output.write_text(json.dumps({"model": "m", "model_digest": model_digest(model)}))
    keep_reports(output, model, False, beside)


def test_a_file_that_is_no_page_of_ours_stays(tmp_path: Path) -> None:
    place = tmp_path / "page.html"
    require_page_place(place, "--output")
    for content in (b"image,caption\n", b"<!doctype html><title>mine</title>", b""):
        place.write_bytes(content)
        with pytest.raises(UsageError, match=r"--output .*page\.html is there and is no page of megainter"):
            require_page_place(place, "--output")
    write_template(place, "shell.html", {"title": "t", "facts": "f"})
    assert OUR_PAGE in place.read_bytes()
    require_page_place(place, "--output")
