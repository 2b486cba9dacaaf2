"""What an image is called: one rule for the ids that captions, boxes and feature stores meet by, and how other names are brought together.

The rule: an image's id is its path below the images folder, without suffix, or its key where it has no path. Public features and captions
call the same image by its number in COCO, by its file's name alone, by shard and key, or by WebDataset's key, which ends at the first
dot of a name. These are forms of one name, each looser than
the one before; two lists meet in the strictest form in which most of their ids do, and only where neither has two ids of one form.
"""

import os
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megainter.errors import UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".heic", ".heif", ".tif", ".tiff", ".npz", ".npy")
NUMBERED = re.compile(r"(?:coco_(?:(?:train|val|test)\d{4}_)?|flickr30k_|vg_|gqa_)?0*(\d{1,18})", re.IGNORECASE)  # and no other prefix
FORMS = ("id", "id without suffix", "file name without folder and suffix", "file name up to its first dot", "number")


def stem(image_id: str) -> str:
    """The last part of an id that is a path, without an image's suffix."""
    return _without_suffix(os.path.basename(image_id))


def number(image_id: str) -> int | None:
    """The number that an image's name is, or has behind the name of a data set, as in COCO; else None."""
    name = stem(image_id)
    found = NUMBERED.fullmatch(name)
    return int(found[1]) if found else None


def forms(image_id: str) -> tuple[str, ...]:
    """The name in each of ``FORMS``; "" in a form that it does not have."""
    found, name = number(image_id), stem(image_id)
    path = _without_suffix(os.path.normpath(image_id)) if image_id else ""
    return image_id, path, name, name.partition(".")[0], "" if found is None else str(found)


def _without_suffix(name: str) -> str:
    root, suffix = os.path.splitext(name)
    return root if suffix.lower() in SUFFIXES else name


def renamer(pattern: str) -> Callable[[str], str]:
    """From an image's id to the one that ``pattern`` makes of its parts: {id}, {stem}, {folder}, {number}; "COCO_val2014_{number:012d}".

    ``UsageError`` for another pattern; the function raises ``ValueError`` for an id that lacks a part.
    """
    try:
        parts = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        if not parts or parts - {"id", "stem", "folder", "number"}:
            raise ValueError("its parts are {id}, {stem}, {folder} and {number}, one of them at least")
        pattern.format(id="a/1", stem="1", folder="a", number=1)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(f"--ids {pattern!r:.80} cannot be filled in: {error}") from None

    def rename(image_id: str) -> str:
        found = number(image_id) if "number" in parts else 0
        if found is None:
            raise ValueError(f"id {image_id!r:.80} has no number for --ids")
        return pattern.format(id=image_id, stem=stem(image_id), folder=os.path.dirname(image_id), number=found)

    return rename


@dataclass(frozen=True)
class Match:
    """Which ids of a store the wanted ones mean: ``form`` of ``FORMS``, ``names`` the store's id by the wanted one, where one is found."""

    form: str
    names: dict[str, str]

    def told(self, wanted: Sequence[str], stored: Sequence[str], store: object) -> str:
        """The line for the user: how many were found and by what, with an id of each side where some were not."""
        missing = next((image_id for image_id in wanted if image_id not in self.names), None)
        by = "" if self.form == FORMS[0] else f" by their {self.form}"
        text = f"{len(self.names):,} of {len(wanted):,} images are in {store}{by}"
        if missing is None:
            return text
        return f"{text}; not {missing!r:.80} (the store has {stored[0]!r:.80}{' and others' if len(stored) > 1 else ''})"


def match(wanted: Iterable[str], stored: Sequence[str]) -> Match:
    """The wanted ids (each once) among those of a store, in the strictest form in which most are found.

    In a form that is not the id itself, fewer than half of the shorter list may be chance, and are none.
    """
    wanted = list(wanted)
    best, few = Match(FORMS[0], {}), min(len(wanted), len(stored)) / 2
    for place, form in enumerate(FORMS):
        there, asked = _by_form(stored, place), _by_form(wanted, place)
        names = {asked[name]: there[name] for name in asked.keys() & there.keys()}
        if len(names) > len(best.names) and (place == 0 or len(names) >= few):
            best = Match(form, names)
        if len(best.names) == len(wanted):
            break
    return best


def _by_form(ids: Iterable[str], place: int) -> dict[str, str]:
    """Ids by their form, where no other has the same."""
    found, repeated = dict[str, str](), set[str]()
    for image_id in ids:
        name = forms(image_id)[place]
        if name and found.setdefault(name, image_id) != image_id:
            repeated.add(name)
    return {name: image_id for name, image_id in found.items() if name not in repeated}
