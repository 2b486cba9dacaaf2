"""Labelled texts about images: VQA v2, NLVR2 and SNLI-VE."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ijson

from megainter.data.image_ids import SUFFIXES
from megainter.data.tables.labelled import Example, TaskFacts, answer_accuracy
from megainter.errors import UsageError
from megainter.files import read_json
from megainter.paths import require_file
from preprocessing.prepare import coco
from preprocessing.prepare.captions import normalise
from preprocessing.prepare.reading import NOT_ITS_FORM, Reading, json_object, parsed, read_lines, text
from preprocessing.prepare.vqa_answers import normalise_answer

NO_LABEL = "no gold label"
ENTAILMENT, TRUTH = ("entailment", "neutral", "contradiction"), ("False", "True")
IMAGE_NAMES = {"vqa": "{source}_{subset}_{id:012d}", "nlvr2": "{id}-img{number}", "snli-ve": "{id}"}
NAMED = ("image", "img_id", "imageId")  # fields that hold an image's name, and not COCO's number
SplitOf = Callable[[Path], str]


class AnswerOf(NamedTuple):
    """What is known of a question's answer; ``given``: by all annotators."""

    question_type: str
    answer_type: str
    agreed: str
    given: tuple[str, ...]


@dataclass(frozen=True)
class ImageOptions:
    """``annotations``: VQA's files of answers. ``image_names``: how an image's id in the feature store is made; None: the usual names.

    ``targets``: soft scores of VQA's answers, min(count / 3, 1), or the evaluation's mean over leaving one annotator out.
    ``least``: occurrences among the agreed answers for training that make an answer a class.
    """

    annotations: tuple[Path, ...] = ()
    image_names: str | None = None
    targets: Literal["min", "official"] = "min"
    least: int = 9


def open_files(source: str, sources: Sequence[Path], options: ImageOptions, split_of: SplitOf) -> list[Reading[tuple[int, Example]]]:
    """A reading of each file. ``UsageError`` for a file of another format or a pattern of names that cannot be filled in."""
    names = options.image_names or IMAGE_NAMES[source]
    if options.annotations and source != "vqa":
        raise UsageError(f"{source} has its labels in the file itself; leave --annotations out")
    if source == "vqa":
        answers = {number: answer for src in options.annotations for number, answer in _annotations(src)}
        return [_questions(src, answers, names, options, split_of(src)) for src in sources]
    parse = _nlvr2 if source == "nlvr2" else _snli_ve
    return [_lines(src, parse, names, split_of(src)) for src in sources]


def task_of(source: str, kept: Sequence[Example], options: ImageOptions) -> TaskFacts:
    """The classes, and the figure by which a model is judged."""
    if source == "nlvr2":
        return TaskFacts(source, "single_label", TRUTH, "accuracy")
    if source == "snli-ve":
        return TaskFacts(source, "single_label", ENTAILMENT, "accuracy")
    classes = () if to_predict(kept) else _answer_classes(kept, options.least)
    counted = not classes or any(example.counts for example in kept)
    return TaskFacts(source, "multi_label", classes, "vqa_accuracy" if counted else "soft_accuracy")


def to_predict(kept: Sequence[Example]) -> bool:
    """Whether examples are a test whose labels are not public, of which no classes can be known."""
    return all(example.split == "test" and not example.labels for example in kept)


def _answer_classes(kept: Sequence[Example], least: int) -> tuple[str, ...]:
    """Agreed answers that occur often enough in training (in all where nothing is for training), the most frequent first."""
    training = [example for example in kept if example.split == "train"] or kept
    agreed = Counter(example.labels[0] for example in training if example.labels)
    classes = tuple(answer for answer, count in sorted(agreed.items(), key=lambda entry: (-entry[1], entry[0])) if count >= least)
    if not classes:
        raise UsageError(f"no answer is agreed on for {least} questions or more: give the annotations, or a smaller --least")
    return classes


def _lines(
    src: Path, parse: Callable[[dict[str, Any], str, str], Example], names: str, split: str
) -> Reading[tuple[int, Example]]:  # fmt: skip
    return read_lines(src, lambda number, line: (number, parse(json_object(line), names, split)))


def image_name(names: str, **parts: Any) -> str:
    """An image's id by the pattern ``names``; ``UsageError`` where it cannot be filled in."""
    try:
        return names.format(**parts)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UsageError(f"--image-names {names!r:.80} cannot be filled in ({error!r:.80}); there are {', '.join(parts)}") from None


def _nlvr2(value: dict[str, Any], names: str, split: str) -> Example:
    """A line of NLVR2: two images and a sentence. Examples with one sentence are a group, whatever their images."""
    identifier = text(value, "identifier")
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"identifier {identifier!r:.80} is not split-set-pair-sentence")
    pair = identifier.rpartition("-")[0]
    images = tuple(image_name(names, id=pair, number=number) for number in (0, 1))
    label = value.get("label")
    if label is not None and str(label) not in TRUTH:
        raise ValueError(f"label {label!r:.80} is neither True nor False")
    labels, targets = ((str(label),), (1.0,)) if label is not None else ((), ())
    sentence = normalise(text(value, "sentence"))
    return Example(identifier, sentence, "", images, labels, targets, group="-".join((parts[0], parts[1], parts[3])), split=split)


def _snli_ve(value: dict[str, Any], names: str, split: str) -> Example:
    """A line of SNLI-VE: a hypothesis (sentence2) about a photo of Flickr30K, whose caption (sentence1) the model does not see.

    A line without label is one to predict; "-" says that the annotators did not agree.
    """
    photo = text(value, "Flickr30K_ID" if "Flickr30K_ID" in value else "Flickr30kID").removesuffix(".jpg")
    label = text(value, "gold_label", "") if value.get("gold_label") is not None else ""
    if label == "-":
        raise ValueError(NO_LABEL)
    if label and label not in ENTAILMENT:
        raise ValueError(f"gold_label {label!r:.80} is none of {', '.join(ENTAILMENT)}")
    image, agreed = image_name(names, id=photo), (label,) if label else ()
    return Example(text(value, "pairID"), normalise(text(value, "sentence2")), "", (image,), agreed, (1.0,) * len(agreed), split=split)


def _annotations(src: Path) -> Iterator[tuple[str, AnswerOf]]:
    """Answers by question, read as they are needed, of VQA's document or of VQA-CP's bare list. ``UsageError`` for another file."""
    require_file(src)
    found = False
    with open(src, "rb") as file:
        listed = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        file.seek(0)
        try:
            for entry in ijson.items(file, "item" if listed else "annotations.item"):
                found = True
                answers = tuple(normalise_answer(str(one["answer"])) for one in entry["answers"])
                agreed = normalise_answer(str(entry["multiple_choice_answer"]))
                yield str(entry["question_id"]), AnswerOf(str(entry["question_type"]), str(entry["answer_type"]), agreed, answers)
        except ijson.JSONError as error:
            raise UsageError(f"{src} is not valid JSON: {' '.join(str(error).split())[:200]}") from None
        except NOT_ITS_FORM as error:
            raise UsageError(f"{src}: an annotation lacks a field of VQA v2: {error!r:.80}") from None
    if not found:
        raise UsageError(f"{src} has no annotations; VQA's are in v2_mscoco_train2014_annotations.json")


def _questions(
    src: Path, answers: dict[str, AnswerOf], names: str, options: ImageOptions, split: str
) -> Reading[tuple[int, Example]]:  # fmt: skip
    """The questions of one file, with their answers where there are some."""
    document = read_json(src)
    entries = _question_list(src, document)
    parts = _image_set(src, document if isinstance(document, dict) else {}, entries, names)

    def parse(number: int, entry: dict[str, Any]) -> tuple[int, Example]:
        question = text(entry, "question_id")
        image = _image_of(entry, names, parts)
        asked = normalise(text(entry, "sent" if "sent" in entry else "question"))
        example = Example(question, asked, "", (image,), split=split)
        if question in answers:
            return number, _answered(example, answers[question], options)
        if answers and split != "test":
            raise ValueError(f"question {question} has no annotation")
        return number, _answered_inside(example, entry, options)

    return Reading(parsed(iter(entries), parse), len(entries), "entries", place="entry")


def _question_list(src: Path, document: Any) -> list[Any]:
    """The questions of VQA's document, of a bare list (VQA-CP, LXMERT, ALBEF), or of GQA's, whose keys are the questions' ids."""
    if isinstance(document, dict) and isinstance(document.get("questions"), list):
        return list(document["questions"])
    if isinstance(document, list) and document and isinstance(document[0], dict) and "question_id" in document[0]:
        return document
    if isinstance(document, dict) and document and all(isinstance(entry, dict) and "imageId" in entry for entry in document.values()):
        return [{"question_id": number, **entry} for number, entry in document.items()]
    raise UsageError(f"{src} has no questions; VQA's are in v2_OpenEnded_mscoco_train2014_questions.json")


def _image_set(src: Path, document: dict[str, Any], entries: list[Any], names: str) -> dict[str, str]:
    """Whose images the questions are about, and which of them: what the document says, else its name, by what it means.

    The questions of test-dev2015 are about images of test2015. ``UsageError`` where the names need a set and neither that nor the
    questions themselves tell one.
    """
    told, kind = str(document.get("data_subtype") or ""), str(document.get("data_type") or "mscoco")
    subset = coco.images_of(told) or coco.images_of(src.name)
    themselves = bool(entries) and isinstance(entries[0], dict) and not {"coco_split", *NAMED}.isdisjoint(entries[0])
    if not subset and "{subset" in names and not themselves:
        raise UsageError(
            f"{src} does not tell which images it is about (data_subtype is {told[:40]!r:.80}): say how they are named with --image-names, "
            "such as 'COCO_val2014_{id:012d}'"
        )
    return {"subset": subset, "source": "COCO" if kind == "mscoco" else kind}


def _image_of(entry: dict[str, Any], names: str, parts: dict[str, str]) -> str:
    """The id of a question's image: the name that it gives, without suffix, or its number by the pattern ``names``."""
    named = next((text(entry, name) for name in NAMED if name in entry), None)
    if named is not None:
        return os.path.splitext(named)[0] if named.lower().endswith(SUFFIXES) else named
    subset = coco.images_of(str(entry.get("coco_split") or "")) or parts["subset"]
    return image_name(names, id=int(entry["image_id"]), **parts | {"subset": subset})


def _answered_inside(example: Example, entry: dict[str, Any], options: ImageOptions) -> Example:
    """The example with the answers that its question brings along: all annotators' (ALBEF), soft scores (LXMERT), or one (GQA)."""
    given, scores = entry.get("answer"), entry.get("label")
    if isinstance(given, list) and given:
        answers = tuple(normalise_answer(str(one)) for one in given)
        return _answered(example, AnswerOf("", "", Counter(answers).most_common(1)[0][0], answers), options)
    if isinstance(given, str) and given:
        scores = {given: 1.0}
    if not isinstance(scores, dict) or not scores:
        return example
    soft = sorted(((normalise_answer(str(label)), float(score)) for label, score in scores.items()), key=lambda one: -one[1])
    return replace(example, labels=tuple(label for label, _ in soft), targets=tuple(score for _, score in soft))


def _answered(example: Example, answer: AnswerOf, options: ImageOptions) -> Example:
    """The example with its answers, the agreed one first."""
    counts = {label: count for label, count in Counter(answer.given).items() if label}
    if not counts:
        raise ValueError("all its answers are empty")
    counts = {label: counts[label] for label in sorted(counts, key=lambda label: label != answer.agreed)}
    targets = tuple(_soft_target(count, len(answer.given), options.targets) for count in counts.values())
    kinds = tuple(f"{name}: {kind}" for name, kind in (("answer", answer.answer_type), ("question", answer.question_type)) if kind)
    return replace(example, labels=tuple(counts), targets=targets, counts=tuple(counts.values()), kinds=kinds)


def _soft_target(count: int, annotators: int, targets: str) -> float:
    return min(count / 3, 1.0) if targets == "min" else answer_accuracy(count, annotators)
