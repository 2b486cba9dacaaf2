"""The repository's pages as one tree that a site generator reads, in which links hold as they stand, those to source files too."""

import re
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"(^```.*?^```|`[^`\n]+`)", flags=re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
NOT_TEXT = {".png", ".webp", ".jpg", ".svg"}


def starting_pages() -> list[Path]:
    """What a reader finds by itself; whatever these link to comes along."""
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]


def lay(target: Path, generated: dict[str, str]) -> None:
    """Lay all pages, what they link to, and the ``generated`` ones (by path) into a fresh folder, in the repository's own tree."""
    shutil.rmtree(target, ignore_errors=True)
    waiting, laid = starting_pages(), set[Path]()
    while waiting:
        file = waiting.pop()
        if file not in laid:
            laid.add(file)
            waiting += _lay_one(file, target)
    for path, text in generated.items():
        _write(target / path, text)


def _lay_one(file: Path, target: Path) -> list[Path]:
    """Lay one file; returns the files that it links to."""
    place = target / file.relative_to(ROOT)
    if file.suffix in NOT_TEXT:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
        return []
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".md":
        _write(place.with_name(f"{place.name}.md"), _source_page(file, text))
        return []
    parts, found = FENCE.split(text), list[Path]()
    _write(place, "".join(part if part.startswith("`") else LINK.sub(lambda link: _link(link, file, found), part) for part in parts))
    return found


def _source_page(file: Path, text: str) -> str:
    kinds = {".toml": "toml", ".py": "python", ".yaml": "yaml", ".json": "json"}
    language = kinds.get(file.suffix, "docker" if "Docker" in file.name else "text")
    return f"# {file.relative_to(ROOT)}\n\n````{language}\n{text.rstrip()}\n````\n"


def _link(link: re.Match[str], page: Path, found: list[Path]) -> str:
    """A link as the site has it: files of the source are pages there, named as they are with .md behind."""
    path, mark, anchor = link[2].partition("#")
    if re.match(r"[a-z]+:", path) or not path:
        return link[0]
    there = (page.parent / path).resolve()
    if not there.is_file() or not there.is_relative_to(ROOT):
        return link[0]  # the strict build says so
    found.append(there)
    plain = there.suffix in {".md", *NOT_TEXT}
    return f"{link[1]}{path}{'' if plain else '.md'}{mark}{anchor}{link[3]}"


def _write(place: Path, text: str) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(text, encoding="utf-8")


def navigation(reference: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """The sections of docs/README.md with the pages that their tables link to, each page once; then the reference."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    nav: list[dict[str, Any]] = [{"megainter": "README.md"}, {"The pages": "docs/README.md"}]
    seen = set[str]()
    first, *sections = re.split(r"^## ", index, flags=re.MULTILINE)
    nav += _entries(first, seen)
    for section in sections:
        title, _, body = section.partition("\n")
        rows = "\n".join(line.split("|")[1] for line in body.splitlines() if line.startswith("|"))
        if entries := _entries(rows, seen):
            nav.append({title: entries})
    nav.append({"Reference": [{title: f"docs/{path}"} for path, (title, _) in reference.items()]})
    return [*nav, {"Changelog": "CHANGELOG.md"}, {"Contributing": "CONTRIBUTING.md"}]


def _entries(text: str, seen: set[str]) -> list[dict[str, Any]]:
    """The pages that a piece of docs/README.md links to and that were not seen before, by the links' words."""
    entries = []
    for words, target in re.findall(r"\[([^\]]+)\]\(([^)#\s]+\.md)\)", text):
        path = (ROOT / "docs" / target).resolve().relative_to(ROOT).as_posix()
        if path not in seen and path not in ("CHANGELOG.md", "CONTRIBUTING.md"):
            seen.add(path)
            entries.append({words[0].upper() + words[1:]: path})
    return entries


def slug(heading: str, separator: str) -> str:
    """A heading's anchor as GitHub makes it, so that links hold in both places."""
    return re.sub(r"[^\w\- ]", "", heading.lower().strip()).replace(" ", separator)
