"""`megainter prepare examples`: labelled texts, and texts about images, as the table that `finetune classification` takes."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from megainter.data.tables.labelled import Example, Problem, TaskFacts, write_examples
from megainter.errors import UsageError
from megainter.paths import require_file
from preprocessing.prepare import coco, labelled_images
from preprocessing.prepare.captions import names_in_store, normalise
from preprocessing.prepare.delimited import shown_names
from preprocessing.prepare.labelled_images import NO_LABEL, to_predict
from preprocessing.prepare.reading import Reading, Unusable, read_lines, shown, split_name, text_encoding
from preprocessing.prepare.report import Report, checked, publish, refuse_overwriting
from preprocessing.prepare.splits import Shares, Splitting

BLANK, OTHER_SPLIT = "blank text", "another split"
Source = Literal["cola", "sst-2", "mrpc", "qqp", "sts-b", "mnli", "qnli", "rte", "wnli", "tsv", "vqa", "nlvr2", "snli-ve"]


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table with tabs; None: there is no such column."""

    text_a: str
    text_b: str | None = None
    label: str | None = None
    example_id: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Layout:
    """Columns and labels of one task; no classes: those that occur."""

    columns: Columns
    problem: Problem
    classes: tuple[str, ...]
    figure: str


BINARY, THREE_WAY = ("0", "1"), ("entailment", "neutral", "contradiction")
# The columns of the files of GLUE (gluebenchmark.com), and the figure that each task is reported by.
GLUE = {
    "cola": Layout(Columns("sentence", None, "label"), "single_label", BINARY, "matthews"),
    "sst-2": Layout(Columns("sentence", None, "label"), "single_label", BINARY, "accuracy"),
    "mrpc": Layout(Columns("#1 String", "#2 String", "Quality"), "single_label", BINARY, "f1"),
    "qqp": Layout(Columns("question1", "question2", "is_duplicate"), "single_label", BINARY, "f1"),
    "sts-b": Layout(Columns("sentence1", "sentence2", "score"), "regression", (), "spearman"),
    "mnli": Layout(Columns("sentence1", "sentence2", "gold_label"), "single_label", THREE_WAY, "accuracy"),
    "qnli": Layout(Columns("question", "sentence", "label"), "single_label", ("entailment", "not_entailment"), "accuracy"),
    "rte": Layout(Columns("sentence1", "sentence2", "label"), "single_label", ("entailment", "not_entailment"), "accuracy"),
    "wnli": Layout(Columns("sentence1", "sentence2", "label"), "single_label", BINARY, "accuracy"),
}
COLA_COLUMNS = ["source", "label", "star", "sentence"]  # of its files without a header line


@dataclass(frozen=True)
class Options:
    """What a user gave beside the files. ``columns`` and ``regression`` are for tsv, the rest for sources with images."""

    columns: Columns | None = None
    regression: bool = False
    images: labelled_images.ImageOptions = field(default_factory=labelled_images.ImageOptions)


def prepare_examples(
    source: Source,
    sources: Sequence[Path],
    output: Path,
    *,
    options: Options | None = None,
    split: str | None = None,
    shares: Shares | None = None,
    store: Path | None = None,
    max_bad: float = 0.01,
    encoding: str | None = None,
    replace_table: bool = True,
) -> Report:
    """Write the examples of one or several files to ``output``, print a report and write it to ``output``.report.json.

    A file's split is in its name (train, dev, test1), or in a column of a tsv; ``split`` keeps only that one, and is given to what names
    none; ``shares`` draws them by the example's id. ``store``: the feature store whose ids the examples' images are to have.
    ``encoding`` of tables with tabs that are not UTF-8. Without ``replace_table`` another table that is at ``output`` stays.

    Raises ``UsageError`` (missing file, another format, nothing kept, an id that repeats) and ``TooManyBadInputsError`` where more than
    ``max_bad`` of the examples, and more than one line, cannot be used.
    """
    options, splitting = options or Options(), Splitting(split, shares)
    if not sources:
        raise UsageError("give at least one file to read")
    for src in sources:
        require_file(src)
    refuse_overwriting(output, *sources, *options.images.annotations)
    readings = [(src, reading) for src, reading in zip(sources, _open(source, sources, options, encoding))]
    report = Report(place="entry" if source == "vqa" else "line")
    kept = list(checked(_kept(readings, report, splitting), report, sources[0], output, max_bad, "examples"))
    notes = list[str]()
    if store is not None:
        kept = _matched(kept, store, notes)
    report.images = len({image for example in kept for image in example.images})
    task = _task(source, kept, options)
    if task.problem != "regression" and not task.classes:
        notes.append("note: no example has a label, nor is there a class: this table is for predictions by a model that knows its classes")
    write_examples(output, kept, task, replace_table)
    publish(report, sources[0], output, "examples", *notes, *splitting.notes(report))
    return report


def _matched(examples: list[Example], store: Path, notes: list[str]) -> list[Example]:
    """The examples under the ids of the store's images."""
    names, told = names_in_store(dict.fromkeys(image for example in examples for image in example.images), store)
    notes.append(told)
    return [replace(example, images=tuple(names.get(image, image) for image in example.images)) for example in examples]


def _open(source: str, sources: Sequence[Path], options: Options, encoding: str | None) -> list[Reading[tuple[int, Example]]]:
    """A reading of each file."""
    if source in ("vqa", "nlvr2", "snli-ve"):
        if encoding is not None:
            raise UsageError(f"{source} is always UTF-8; --encoding is for tables with tabs")
        return labelled_images.open_files(source, sources, options.images, split_of)
    if options.images != labelled_images.ImageOptions():
        raise UsageError(f"{source} has no images; leave out what is for vqa, nlvr2 and snli-ve")
    if (options.columns is None) == (source == "tsv"):
        raise UsageError("tsv needs --text, and no other source takes it: its columns are known")
    return [_table(source, src, _layout(source, options), encoding) for src in sources]


def _layout(source: str, options: Options) -> Layout:
    if options.columns is None:
        return GLUE[source]
    return Layout(options.columns, "regression" if options.regression else "single_label", (), _figure_of(options.regression))


def _figure_of(regression: bool) -> str:
    return "spearman" if regression else "accuracy"


def _kept(
    readings: Sequence[tuple[Path, Reading[tuple[int, Example]]]], report: Report, splitting: Splitting
) -> Iterator[Example]:  # fmt: skip
    """Examples that can be used, with their splits; what is wrong with the others goes to ``report``."""
    for src, reading in readings:
        where = f" of {src.name}" if len(readings) > 1 else ""
        for item in shown(reading, src):
            if isinstance(item, Unusable):
                report.drop(NO_LABEL if item.reason == NO_LABEL else item.kind, f"{item.where}{where}: {item.reason}", item.count)
                continue
            number, example = item
            if not example.text_a:
                report.drop(BLANK, f"{number}{where}")
            elif not splitting.keeps(example.split):
                report.drop(OTHER_SPLIT, f"{number}{where}: {example.split}")
            else:
                given = splitting.of(example.split, example.example_id)
                report.keep(given)
                yield replace(example, split=given)


def _task(source: str, kept: Sequence[Example], options: Options) -> TaskFacts:
    """What the examples have in common; classes that the source does not fix are those that occur, in order."""
    if source in ("vqa", "nlvr2", "snli-ve"):
        return labelled_images.task_of(source, kept, options.images)
    layout = _layout(source, options)
    found = {label for example in kept for label in example.labels}
    whole = all(re.fullmatch(r"-?\d+", label) for label in found)
    classes = layout.classes or tuple(sorted(found, key=(lambda label: (int(label), label)) if whole else None))
    if layout.problem == "single_label" and not classes and not to_predict(kept):
        raise UsageError("no example has a label, so the classes are not known; name their column with --label")
    return TaskFacts(source, layout.problem, classes, layout.figure)


def split_of(src: Path) -> str:
    """The split a file's name tells: train.tsv, dev_matched.tsv, test1.json, snli_ve_dev.jsonl; "" where it tells none."""
    found = re.search(r"(?:^|[_.-])(train|dev|valid|validation|val|test)(?=[_.\-\d])", src.name)
    return split_name(found[1]) if found else coco.split_of(src.name)


def _table(source: str, src: Path, layout: Layout, encoding: str | None = None) -> Reading[tuple[int, Example]]:
    """A file of tab-separated lines without quoting, under a header line (CoLA's training files have none)."""
    header, has_header = _header(source, src, encoding)
    split, places = split_of(src), {name: column for column, name in enumerate(header)}
    _refuse_missing(src, layout, header, split)
    parse = _parser(source, src, layout, header, places, split)
    reading = read_lines(src, lambda number, line: None if has_header and number == 1 else (number, parse(number, line)), encoding, True)
    return Reading((item for item in reading.items if item is not None), reading.total, reading.unit, reading.position)


def _header(source: str, src: Path, encoding: str | None) -> tuple[list[str], bool]:
    """Names of the columns, and whether they stand in the file."""
    with open(src, encoding=text_encoding(src, encoding), errors="replace", newline="") as file:
        first = file.readline().rstrip("\r\n").split("\t")
    if source == "cola" and "sentence" not in first:
        if len(first) != len(COLA_COLUMNS):
            raise UsageError(f"{src} is not a file of CoLA: its first line has {len(first)} columns, not {len(COLA_COLUMNS)}")
        return COLA_COLUMNS, False
    if len(set(first)) != len(first):
        raise UsageError(f"{src}: a column stands twice in its first line, {shown_names(first)}")
    return first, True


def _refuse_missing(src: Path, layout: Layout, header: Sequence[str], split: str) -> None:
    columns = layout.columns
    needed = [columns.text_a, columns.text_b, columns.example_id, columns.split]
    needed += [columns.label] if split != "test" else []  # GLUE does not publish the labels of its tests
    missing = [name for name in needed if name is not None and name not in header]
    if missing:
        raise UsageError(f"{src} has no column {shown_names(missing, quoted=True)}; its first line has {shown_names(header, quoted=True)}")


def _parser(
    source: str, src: Path, layout: Layout, header: Sequence[str], places: dict[str, int], split: str
) -> Callable[[int, str], Example]:  # fmt: skip
    """From a line to an example; ``ValueError`` says what is wrong with it."""
    columns = layout.columns
    kinds = tuple(kind for kind in ("mismatched", "matched") if source == "mnli" and f"_{kind}" in src.stem)

    def parse(number: int, line: str) -> Example:
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{len(cells)} columns, the header has {len(header)}")

        def cell(name: str | None) -> str:
            return normalise(cells[places[name]]) if name is not None and name in places else ""

        labels, targets = _label(cell(columns.label), layout)
        example_id = cell(columns.example_id) or f"{src.stem}#{number}"
        named = split_name(cell(columns.split)) or split
        if columns.text_b is not None and not cell(columns.text_b):
            raise ValueError(f"column {columns.text_b!r:.80} is empty")
        return Example(example_id, cell(columns.text_a), cell(columns.text_b), (), labels, targets, kinds=kinds, split=named)

    return parse


def _label(text: str, layout: Layout) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if not text:
        return (), ()
    if layout.problem == "regression":
        try:
            return (), (float(text),)
        except ValueError:
            raise ValueError(f"label {text!r:.80} is no number") from None
    if text == "-":
        raise ValueError(NO_LABEL)
    if layout.classes and text not in layout.classes:
        raise ValueError(f"label {text!r:.80} is none of {', '.join(layout.classes)}")
    return (text,), (1.0,)
