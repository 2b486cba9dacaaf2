"""`megainter prepare vcr`: VCR's JSON Lines as a table of questions, and its annotated boxes as a manifest for extraction."""

import os
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.manifest import SPLITS, ImageBoxes, check_relative, write_boxes
from megainter.data.questions import CHOICES, Question, Tokens, check_question, write_questions
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.files import inside, read_json, write_json
from megainter.progress import Progress
from preprocessing.captions.items import MALFORMED, MISSING_IMAGE, Report, Unusable, json_object, read_lines, text, texts

MISSING_METADATA = "metadata file missing"


def prepare_vcr(
    src: Path, output: Path, *, images: Path | None = None, boxes: Path | None = None, split: str | None = None, max_bad: float = 0.01
) -> Report:
    """Write the questions of ``src`` (train.jsonl, val.jsonl or test.jsonl) to ``output``, and a report beside it.

    ``images`` (vcr1images): drop questions whose image or metadata is not there. ``boxes``: a manifest of the annotated boxes of those
    images, in the order of the questions' objects. Raises ``UsageError`` (missing file, unknown split, nothing kept) and
    ``TooManyBadInputsError`` where more than ``max_bad`` of the questions cannot be used.
    """
    split = split if split is not None else _split_of(src)
    if split not in SPLITS[:-1]:
        raise UsageError(f"{src}: its name tells no split; give --split train, val or test")
    if not src.is_file():
        raise UsageError(f"{src} does not exist or is not a file")
    if boxes is not None and images is None:
        raise UsageError("boxes are read from the metadata in the images folder; give --images")
    if images is not None and not images.is_dir():
        raise UsageError(f"images folder {images} does not exist or is not a folder")
    report, sources = Report(), dict[str, tuple[str, str]]()
    report_path = output.with_name(output.name + ".report.json")
    write_questions(output, _checked_at_the_end(_questions(src, split, images, report, sources), report, src, report_path, max_bad))
    if boxes is not None and images is not None:
        write_boxes(boxes, _boxes(images, sources, split))
    report.images = len(sources)
    write_json(report_path, asdict(report))
    print(f"{src} -> {output}", *report.lines("questions"), sep="\n  ", flush=True)
    return report


def _split_of(src: Path) -> str:
    found = re.match(r"(train|val|test)", src.name)
    return found[1] if found else ""


def _questions(src: Path, split: str, images: Path | None, report: Report, sources: dict[str, tuple[str, str]]) -> Iterator[Question]:
    """Questions that can be used; ``sources`` takes image id -> (image, metadata)."""
    reading = read_lines(src, lambda number, line: (number, _question(json_object(line), split)))
    with Progress("questions", reading.total, reading.unit) as progress:
        for item in reading.items:
            if isinstance(item, Unusable):
                report.drop(MALFORMED, f"{item.where}: {item.reason}")
                continue
            number, question = item
            if reason := _missing(question, images):
                report.drop(reason, f"{number}: {question.image!r}")
                continue
            report.kept += 1
            report.splits[split] = report.splits.get(split, 0) + 1
            sources[question.image_id] = (question.image, question.metadata)
            if report.kept % 1000 == 0 and reading.position:
                progress.update(reading.position() - progress.done)
            yield question
        progress.update(reading.total - progress.done)


def _question(value: dict[str, Any], split: str) -> Question:
    """A line of VCR; ``ValueError`` says what is wrong with it."""
    image, metadata = text(value, "img_fn"), text(value, "metadata_fn")
    for path in (image, metadata):
        if reason := check_relative(path):
            raise ValueError(f"path {path!r} {reason}")
    question = Question(
        text(value, "annot_id"),
        os.path.splitext(image)[0],
        image,
        metadata,
        split,
        tuple(texts(value, "objects")),
        _tokens(value.get("question")),
        _choices(value, "answer_choices"),
        _choices(value, "rationale_choices"),
        int(text(value, "answer_label", "-1")),
        int(text(value, "rationale_label", "-1")),
    )
    try:
        check_question(question)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return question


def _choices(value: dict[str, Any], name: str) -> tuple[Tokens, ...]:
    choices = value.get(name)
    if not isinstance(choices, list):
        raise ValueError(f"field {name!r} is not a list of {CHOICES}")
    return tuple(_tokens(tokens) for tokens in choices)


def _tokens(tokens: Any) -> Tokens:
    """Words as they are, lists of object indices as tuples."""
    if not isinstance(tokens, list) or not all(isinstance(token, str) or _is_reference(token) for token in tokens):
        raise ValueError(f"{tokens!r:.80} is not a list of words and of lists of object indices")
    return tuple(token if isinstance(token, str) else tuple(token) for token in tokens)


def _is_reference(token: Any) -> bool:
    return isinstance(token, list) and bool(token) and all(isinstance(one, int) and not isinstance(one, bool) for one in token)


def _missing(question: Question, images: Path | None) -> str | None:
    if images is None:
        return None
    for path, reason in ((question.image, MISSING_IMAGE), (question.metadata, MISSING_METADATA)):
        try:
            if not inside(images, path).is_file():
                return reason
        except (UsageError, OSError):
            return reason
    return None


def _checked_at_the_end(questions: Iterator[Question], report: Report, src: Path, report_path: Path, max_bad: float) -> Iterator[Question]:
    """Passes questions on; at the end, with the counts known and nothing published, refuses what may not become a table."""
    yield from questions
    bad = sum(report.dropped.values())
    if report.kept and bad <= max_bad * (report.kept + bad):
        return
    report_path.parent.mkdir(parents=True, exist_ok=True)
    write_json(report_path, asdict(report))
    what = "; ".join(report.lines("questions")[1:]) or "it holds none"
    if not bad:
        raise UsageError(f"{src}: no question is left: {what}")
    raise TooManyBadInputsError(
        f"{src}: {bad:,} of {report.kept + bad:,} questions cannot be used, more than {max_bad:.1%}: {what}; see {report_path}"
    )


def _boxes(images: Path, sources: dict[str, tuple[str, str]], split: str) -> Iterator[ImageBoxes]:
    """The annotated boxes of each image: x1, y1, x2, y2 in pixels (VCR's fifth number is a confidence), with their class names."""
    with Progress("boxes", len(sources), "images") as progress:
        for image_id, (image, metadata) in sources.items():
            value = read_json(inside(images, metadata))
            try:
                found = np.array([box[:4] for box in value["boxes"]], np.float32).reshape(-1, 4)
                width, height, names = int(value["width"]), int(value["height"]), texts(value, "names")
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{metadata} is not VCR's metadata: {error!r}") from None
            limit = np.array([width, height] * 2, np.float32)
            yield ImageBoxes(image_id, image, width, height, found.clip(0, limit), names, split)
            progress.update()
