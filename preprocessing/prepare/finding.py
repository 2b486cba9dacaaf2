"""Which file of a folder a path in a table means, and what is there instead where it means none."""

import os
import unicodedata
from functools import lru_cache
from pathlib import Path

from megainter.data.tables.parquet import check_relative
from megainter.errors import UsageError
from megainter.files import inside
from megainter.paths import did_you_mean
from preprocessing.prepare.report import EXAMPLES_KEPT, MISNAMED, MISSING_IMAGE, RENAMED, Report


class Finder:
    """Finds the images of a table in ``folder`` (None: takes every path as it is). ``UsageError`` for a folder that is none.

    With ``similar``, a path that no file has means the one file whose name is the same but for case, backslashes or Unicode form.
    """

    def __init__(self, folder: Path | None, similar: bool = False) -> None:
        if folder is not None and not folder.is_dir():
            raise UsageError(f"images folder {folder} does not exist or is not a folder{did_you_mean(folder)}")
        self.folder, self.similar = folder, similar
        self.backslashes: list[str] = []  # paths with some that were taken as they are, the first of them
        self.renamed: dict[str, str] = {}  # files by the paths that were taken for them, of another name
        self._known: dict[str, str | None] | None = None
        self._found = lru_cache(maxsize=65536)(self._look)  # captions of one image stand near each other

    def __call__(self, paths: tuple[str, ...]) -> str | None:
        """The first of an image's paths that is there, or the first where no folder was given."""
        return self._found(paths)

    def missing(self, paths: tuple[str, ...]) -> tuple[str, str]:
        """Why none of the paths was found: a heading of the report, and words about these."""
        path = paths[0]
        if found := self._similar(path):
            return MISNAMED, f"{path!r:.80} is {found!r:.80} there ({_difference(path, found)}); --similar-names takes such files"
        if self.folder is not None and (self.folder / path).is_file() and not check_relative(path):
            return MISSING_IMAGE, f"{path!r:.80} is a link to a file outside --images: give the folder it leads to, or copy the files"
        folder, _, tail = path.replace("\\", "/").partition("/")
        if tail and self.folder is not None and _is_file(self.folder, tail):
            return MISSING_IMAGE, f"{path!r:.80}, but {tail!r:.80} is there: give --images the folder that {folder!r:.80} is in"
        return MISSING_IMAGE, f"{path!r:.80}"

    def enter(self, report: Report) -> None:
        """Count in ``report`` what was taken by a similar name, with the first examples."""
        report.renamed = len(self.renamed)
        if self.renamed:
            report.examples[RENAMED] = [f"{path!r:.80} as {found!r:.80}" for path, found in [*self.renamed.items()][:EXAMPLES_KEPT]]

    def notes(self) -> list[str]:
        """What the user should know of paths that were taken for other names, or that nothing was compared with."""
        if self.renamed:
            path, found = next(iter(self.renamed.items()))
            return [f"note: {len(self.renamed):,} files {RENAMED} (--similar-names), first {path!r:.80} as {found!r:.80}"]
        if not self.backslashes:
            return []
        first = f"{self.backslashes[0]!r:.80}"
        return [f"note: paths hold backslashes, first {first}; --similar-names makes slashes of them, --images FOLDER looks them up"]

    def _look(self, paths: tuple[str, ...]) -> str | None:
        if self.folder is None:
            return os.path.normpath(self._taken(paths[0]))
        found = next((os.path.normpath(path) for path in paths if _is_file(self.folder, path)), None)
        if found is not None or not self.similar:
            return found
        for path in paths:
            if (name := self._similar(path)) is not None:
                self.renamed[path] = name
                return name
        return None

    def _taken(self, path: str) -> str:
        """A path in no folder."""
        if "\\" not in path:
            return path
        if self.similar:
            return self.renamed.setdefault(path, path.replace("\\", "/"))
        self.backslashes = self.backslashes or [path]
        return path

    def _similar(self, path: str) -> str | None:
        """The one file of the folder whose name is nearly ``path``. The folder is listed once, where that is needed."""
        if self.folder is None:
            return None
        if self._known is None:
            self._known = {}
            for place, _, names in os.walk(self.folder):
                for name in names:
                    file = os.path.relpath(os.path.join(place, name), self.folder)
                    self._known[_plain(file)] = None if _plain(file) in self._known else file
        found = self._known.get(_plain(os.path.normpath(path.replace("\\", "/"))))
        return found if found is not None and _is_file(self.folder, found) else None


def _plain(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _difference(path: str, found: str) -> str:
    """In what two nearly equal names differ."""
    slashed = path.replace("\\", "/")
    composed, other = (unicodedata.normalize("NFC", name) for name in (os.path.normpath(slashed), found))
    kinds = ["backslashes"] * (slashed != path) + ["upper and lower case"] * (composed != other)
    forms = [unicodedata.is_normalized("NFC", name) for name in (path, found)]
    return ", ".join(kinds + ["Unicode form"] * (not kinds or forms[0] != forms[1]))


def _is_file(folder: Path, path: str) -> bool:
    try:
        return inside(folder, path).is_file()
    except (UsageError, OSError):
        return False
