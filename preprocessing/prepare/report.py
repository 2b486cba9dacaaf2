"""What became of a file that was prepared: counts, examples of what was left out, and when that is too much."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from megainter.errors import TooManyBadInputsError, UsageError
from megainter.files import write_json

MALFORMED, MISSING_IMAGE, MISSING_METADATA = "malformed", "image file missing", "metadata file missing"
BLANK, OTHER_SPLIT = "blank caption", "another split"
MISNAMED = "image file named a little otherwise"
RENAMED, NOT_STORED = "taken by a similar name", "image not in the store"  # asked for by --similar-names and by --only-stored
# Faults of the data; what is left out for another reason was asked for, or is usual.
BAD = (MALFORMED, MISSING_IMAGE, MISNAMED, MISSING_METADATA)
EXAMPLES_KEPT, EXAMPLE_LENGTH = 20, 300  # per reason; in characters, whatever a file holds
Row = TypeVar("Row")


@dataclass
class Report:
    """What became of a caption file. ``dropped`` and ``examples`` are by reason; the others count captions, ``images`` images.

    ``renamed`` counts paths that were taken for a file of nearly that name. An example of what is dropped begins with a number, which
    counts what ``place`` says: lines, rows or entries.
    """

    kept: int = 0
    images: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    place: str = "line"
    renamed: int = 0

    def keep(self, split: str, count: int = 1) -> None:
        """Count what is kept."""
        self.kept += count
        self.splits[split] = self.splits.get(split, 0) + count

    def drop(self, reason: str, example: str, count: int = 1) -> None:
        """Count what is left out, and keep the first examples."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES_KEPT:
            examples.append(
                example
                if len(example) <= EXAMPLE_LENGTH
                else f"{example[:EXAMPLE_LENGTH]} and {len(example) - EXAMPLE_LENGTH:,} more characters"
            )

    def drop_kept(self, split: str, reason: str, example: str) -> None:
        """Count as left out what was counted as kept."""
        self.kept -= 1
        self.splits[split] -= 1
        if not self.splits[split]:
            del self.splits[split]
        self.drop(reason, example)

    def bad(self) -> int:
        """How much was left out for a fault of the data."""
        return sum(self.dropped.get(reason, 0) for reason in BAD)

    def total(self) -> int:
        """How much there was."""
        return self.kept + sum(self.dropped.values())

    def too_bad(self, max_bad: float) -> bool:
        """Whether more than the share ``max_bad`` is bad. One bad line among good ones does not stop a small file, unless it is 0."""
        lines = sum(len(self.examples.get(reason, [])) for reason in BAD)
        return self.bad() > max_bad * self.total() and (lines > 1 or max_bad == 0 or not self.kept)

    def lines(self, what: str) -> list[str]:
        """The report for people; ``what`` is what it counts."""
        splits = ", ".join(f"{name or 'no split'} {count:,}" for name, count in sorted(self.splits.items()))
        of_images = f" of {self.images:,} images" if self.images else ""  # labelled texts have none
        kept = f"kept {self.kept:,} {what}{of_images} ({splits})"
        return [kept, *(f"dropped {n:,}: {name}, first {self.place} {self.examples[name][0]}" for name, n in sorted(self.dropped.items()))]


def checked(
    rows: Iterator[Row], report: Report, src: Path, output: Path, max_bad: float, what: str, images: Path | None = None
) -> Iterator[Row]:  # fmt: skip
    """Passes rows on; at the end, with the counts known and nothing published, refuses what may not become a table.

    ``images``: the folder in which images were looked for.

    Raises ``UsageError`` where nothing was kept and ``TooManyBadInputsError`` where ``report`` is too bad; then nothing is written.
    """
    yield from rows
    too_bad = report.too_bad(max_bad)
    if report.kept and not too_bad:
        return
    why = ("; ".join(report.lines(what)[1:]) or "it holds none") + _looked_in(images, report)
    if not too_bad:
        raise UsageError(f"{src}: no {what} are left: {why}")
    others = f"; --max-bad 1 keeps the others, and {report_path(output).name} then has more examples" if report.kept else ""
    raise TooManyBadInputsError(
        f"{src}: {report.bad():,} of {report.total():,} {what} cannot be used, more than --max-bad {max_bad:g}: {why}{others}"
    )


def _looked_in(folder: Path | None, report: Report) -> str:
    """Where images that are missing were looked for, and whether that folder may be another than the one that is meant."""
    missing = [reason for reason in (MISSING_IMAGE, MISSING_METADATA, MISNAMED) if reason in report.dropped]
    if folder is None or not missing:
        return ""
    some = report.kept or {MISNAMED, MISSING_METADATA, BLANK} & report.dropped.keys()
    if some or "--images" in report.examples[MISSING_IMAGE][0]:  # which says what helps
        return f"; looked for in {folder}"
    return f"; nothing of this table is in {folder}: is --images right?"


def publish(report: Report, src: Path, output: Path, what: str, *notes: str) -> None:
    """Write the report beside ``output`` and print it."""
    write_json(report_path(output), asdict(report))
    print(f"{src} -> {output}", *report.lines(what), *notes, sep="\n  ", flush=True)


def report_path(output: Path) -> Path:
    """Where the report of ``output`` stands."""
    return output.with_name(output.name + ".report.json")


def refuse_overwriting(output: Path, *sources: Path) -> None:
    """``UsageError`` where ``output`` or its report is one of the files that are read."""
    for path in (output, report_path(output)):
        if path.exists() and any(source.exists() and path.samefile(source) for source in sources):
            raise UsageError(f"{path} would be overwritten, and it is what is read; give another --output")
