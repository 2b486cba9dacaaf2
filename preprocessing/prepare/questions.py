"""`megainter prepare vcr`: VCR's JSON Lines as a table of questions, and its annotated boxes as a manifest for extraction."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.tables.boxes import ImageBoxes, write_boxes
from megainter.data.tables.parquet import SPLITS, check_relative
from megainter.data.tables.questions import CHOICES, Question, Tokens, check_question, write_questions
from megainter.errors import UsageError
from megainter.files import inside, read_json
from megainter.paths import did_you_mean, require_file
from megainter.progress import Progress
from preprocessing.prepare.captions import names_in_store
from preprocessing.prepare.reading import Unusable, json_object, read_lines, shown, text, texts
from preprocessing.prepare.report import MALFORMED, MISSING_IMAGE, MISSING_METADATA, Report, checked, publish, refuse_overwriting


def prepare_vcr(
    src: Path,
    output: Path,
    *,
    images: Path | None = None,
    boxes: Path | None = None,
    split: str | None = None,
    store: Path | None = None,
    max_bad: float = 0.01,
    replace_tables: bool = True,
) -> Report:
    """Write the questions of ``src`` (train.jsonl, val.jsonl or test.jsonl) to ``output``, and a report beside it.

    ``images`` (vcr1images): drop questions whose image or metadata is not there. ``boxes``: a manifest of the annotated boxes of those
    images, in the order of the questions' objects. ``store``: the feature store whose ids the images are to have, in both. Without
    ``replace_tables`` others that are there stay.

    Raises ``UsageError`` (missing file, unknown split, nothing kept, no image in the store) and ``TooManyBadInputsError`` where more than
    ``max_bad`` of the questions, and more than one, cannot be used.
    """
    split = split if split is not None else _split_of(src)
    if split not in SPLITS[:-1]:
        raise UsageError(f"{src}: its name tells no split; give --split train, val or test")
    require_file(src)
    if boxes is not None and images is None:
        raise UsageError("boxes are read from the metadata in the images folder; give --images")
    if images is not None and not images.is_dir():
        raise UsageError(f"images folder {images} does not exist or is not a folder{did_you_mean(images)}")
    if boxes is not None and boxes.resolve() == output.resolve():
        raise UsageError(f"--output and --boxes are both {output}; questions and boxes are two files")
    refuse_overwriting(output, src)
    report, sources = Report(), dict[str, tuple[str, str]]()
    questions = checked(_questions(src, split, images, report, sources), report, src, output, max_bad, "questions", images)
    names, notes = dict[str, str](), list[str]()
    if store is not None:
        questions = iter([*questions])  # to the last one, so that all images are known
        names, told = names_in_store(sources, store)
        notes.append(told)
    written = (replace(question, image_id=names.get(question.image_id, question.image_id)) for question in questions)
    write_questions(output, written, replace_tables)
    if boxes is not None and images is not None:
        paths_of = {names.get(image_id, image_id): paths for image_id, paths in sources.items()}
        write_boxes(boxes, _boxes(images, paths_of, split), replace_tables)
    report.images = len(sources)
    publish(report, src, output, "questions", *notes)
    return report


def _split_of(src: Path) -> str:
    found = re.match(r"(train|val|test)", src.name)
    return found[1] if found else ""


def _questions(src: Path, split: str, images: Path | None, report: Report, sources: dict[str, tuple[str, str]]) -> Iterator[Question]:
    """Questions that can be used; ``sources`` takes image id -> (image, metadata)."""
    for item in shown(read_lines(src, lambda number, line: (number, _question(json_object(line), split))), src):
        if isinstance(item, Unusable):
            report.drop(MALFORMED, f"{item.where}: {item.reason}")
            continue
        number, question = item
        if reason := _missing(question, images):
            report.drop(reason, f"{number}: {question.image!r:.80}")
            continue
        report.keep(split)
        sources[question.image_id] = (question.image, question.metadata)
        yield question


def _question(value: dict[str, Any], split: str) -> Question:
    """A line of VCR; ``ValueError`` says what is wrong with it."""
    image, metadata = text(value, "img_fn"), text(value, "metadata_fn")
    for path in (image, metadata):
        if reason := check_relative(path):
            raise ValueError(f"path {path!r:.80} {reason}")
    question = Question(
        question_id=text(value, "annot_id"),
        image_id=os.path.splitext(image)[0],
        image=image,
        metadata=metadata,
        split=split,
        objects=tuple(texts(value, "objects")),
        question=_tokens(value.get("question")),
        answers=_choices(value, "answer_choices"),
        rationales=_choices(value, "rationale_choices"),
        answer_label=int(text(value, "answer_label", "-1")),
        rationale_label=int(text(value, "rationale_label", "-1")),
    )
    try:
        check_question(question)
    except UsageError as error:
        raise ValueError(str(error)) from None
    return question


def _choices(value: dict[str, Any], name: str) -> tuple[Tokens, ...]:
    choices = value.get(name)
    if not isinstance(choices, list):
        raise ValueError(f"field {name!r:.80} is not a list of {CHOICES}")
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


def _boxes(images: Path, sources: dict[str, tuple[str, str]], split: str) -> Iterator[ImageBoxes]:
    """The annotated boxes of each image: x1, y1, x2, y2 in pixels (VCR's fifth number is a confidence), with their class names."""
    with Progress("boxes", len(sources), "images") as progress:
        for image_id, (image, metadata) in sources.items():
            value = read_json(inside(images, metadata))
            try:
                found = np.array([box[:4] for box in value["boxes"]], np.float32).reshape(-1, 4)
                width, height, names = int(value["width"]), int(value["height"]), texts(value, "names")
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise UsageError(f"{metadata} is not VCR's metadata: {error!r:.80}") from None
            limit = np.array([width, height] * 2, np.float32)
            yield ImageBoxes(
                image_id=image_id, image=image, width=width, height=height, boxes=found.clip(0, limit), labels=names, split=split
            )
            progress.update()
