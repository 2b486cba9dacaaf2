"""How a page is written: a template of this folder, everything in it escaped, and what is shown of other people's texts."""

import unicodedata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megainter.files import write_atomically

STYLE = Path(__file__).with_name("style.css")  # of all pages


def write_template(output: Path, name: str, values: dict[str, Any]) -> None:
    """Render a page of this folder, whatever is in ``values`` escaped, and write it."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    pages.filters["counted"] = counted
    write_atomically(output, pages.get_template(name).render(values))


def counted(number: int, what: str) -> str:
    """A number of things in words, ``what`` being one of them: "1 region", "2,000 regions"."""
    return f"{number:,} {what}" + "s" * (number != 1)


def plain(text: str) -> str:
    """``text`` without control, format and direction characters, which could disguise what is shown."""
    return "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
