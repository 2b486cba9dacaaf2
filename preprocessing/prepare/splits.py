"""Splits for images whose source names none: shares, drawn by a hash of the image's id, so that all captions of an image go together."""

import hashlib
from dataclasses import dataclass

from megainter.data.tables.parquet import SPLITS
from megainter.errors import UsageError
from preprocessing.prepare.report import Report


@dataclass(frozen=True)
class Shares:
    """Shares of the images for validation and test; the rest is for training. ``UsageError`` where they leave none for it."""

    val: float
    test: float
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise UsageError(f"--val-share {self.val:g} and --test-share {self.test:g} must be shares that leave some images for training")

    def split_of(self, image_id: str) -> str:
        """A function of the seed and the id alone: other images and their order do not matter."""
        digest = hashlib.blake2b(f"{self.seed}\0{image_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        return "test" if place < self.test else "val" if place < self.test + self.val else "train"


@dataclass(frozen=True)
class Splitting:
    """Which images to keep and what split to give: those of ``wanted`` (None: all); ``shares`` for sources that name none."""

    wanted: str | None = None
    shares: Shares | None = None

    def __post_init__(self) -> None:
        if self.wanted is not None and self.wanted not in SPLITS[:-1]:
            raise UsageError(f"split {self.wanted!r:.80} is not one of train, val, test")
        if self.wanted is not None and self.shares is not None:
            raise UsageError("give either --split or --val-share and --test-share")

    def keeps(self, named: str) -> bool:
        """Whether an image is kept whose source says that its split is ``named``, or says nothing."""
        return self.wanted is None or (named or self.wanted) == self.wanted

    def of(self, named: str, image_id: str) -> str:
        """The split of an image that is kept; ``UsageError`` where shares are asked for and the source has splits of its own."""
        if self.shares is None:
            return named or self.wanted or ""
        if named:
            raise UsageError(
                f"image {image_id!r:.80} is of split {named!r:.80}: --val-share and --test-share are for sources without splits; "
                "leave them out"
            )
        return self.shares.split_of(image_id)

    def notes(self, report: Report) -> list[str]:
        """What the user should know about the splits of what was kept."""
        none = report.splits.get("", 0)
        notes = [f"note: {none:,} have no split, and training takes split train: give --split train, or --val-share 0.05 --test-share 0.05"]
        asked = {"val": self.shares.val, "test": self.shares.test} if self.shares else {}
        empty = [name for name, share in asked.items() if share and not report.splits.get(name)]
        return notes[: bool(none)] + [f"note: no image fell to {name}: give a larger share, or another --seed" for name in empty]
