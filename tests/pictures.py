"""``python -m tests.pictures FOLDER``: the pictures of docs/first-run.md, made by the page's own commands.

FOLDER is where the page is followed. Its lines about ``demo-run`` are run there as they stand (the demo itself unless it is finished, which
takes half an hour), what they print is printed for the page's blocks of output, and what they leave is opened in a headless Chromium.
"""

import argparse
import io
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.commands import lines, run_line
from tests.places import ROOT
from tests.tasks.retrieval.web.server import started

PAGE = "docs/first-run.md"
WIDTH, HEIGHT, SCALE = 1120, 1400, 1.125  # of the window, in CSS pixels, and how many pixels each becomes
MARGIN = 12  # below the last thing that is shown
MOST_BYTES = 150_000
PATIENCE = 36_000.0  # seconds for a command: the machine may be busy


def main() -> None:
    """Write all pictures into docs/."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    for picture in make_pictures(options.parse_args().folder, ROOT / "docs"):
        print(f"{picture}: {picture.stat().st_size:,} bytes")


def make_pictures(folder: Path, output: Path) -> Iterator[Path]:
    """Run the page's lines about the demo in ``folder`` and write a picture for each of ``PICTURES`` into ``output``."""
    from tests.browser import chromium  # here, since the pictures' names are asked for where there is no browser

    if not (folder / "demo-run" / "index.html").exists():
        run_line("megainter demo --output demo-run", folder, PATIENCE)
    for line in demo_lines():
        if " serve " not in line:
            print(f"$ {line}\n{run_line(line, folder, PATIENCE)}")
    with chromium() as browser:
        for name, photograph in PICTURES.items():
            picture = output / name
            write_picture(picture, photograph(browser, folder / "demo-run"))
            yield picture


def demo_lines() -> list[str]:
    """The page's lines that look at what the demo left."""
    return [line for line in lines(PAGE) if " demo-run/" in line]


def query() -> str:
    """The sentence that the page searches the demo's scenes for."""
    return next(shlex.split(line)[3] for line in demo_lines() if line.startswith("megainter search "))


def of_the_demo(browser: Any, run: Path) -> bytes:
    """The demo's page, down to the first caption and its images."""
    page = window(browser, (run / "index.html").as_uri())
    return shot(page, ".query >> nth=0")


def of_the_search(browser: Any, run: Path) -> bytes:
    """The page of ``megainter serve`` after the query was typed, with the regions of the first picture."""
    with started(run / "scenes.index") as (_, client, _):
        page = window(browser, f"http://127.0.0.1:{client.port}/")
        page.wait_for_selector(".examples button")
        page.keyboard.type(query())
        page.keyboard.press("Enter")
        page.wait_for_selector("#results .open")
        page.hover("#results figure:nth-child(1)")
        page.wait_for_selector("#results figure:nth-child(1) .box")
        page.wait_for_load_state("networkidle")
        return shot(page, "#results figure:nth-child(-n+8)")  # two rows


def of_the_model(browser: Any, run: Path) -> bytes:
    """What the model believes of a scene and its caption, with what the caption's last word looks at."""
    page = window(browser, (run / "believes.html").as_uri())
    page.hover(".words .word >> nth=-3")  # a full stop and [SEP] follow it
    return shot(page, "section:nth-of-type(2)")


PICTURES: dict[str, Callable[[Any, Path], bytes]] = {
    "first-run-demo.webp": of_the_demo,
    "first-run-search.webp": of_the_search,
    "first-run-model.webp": of_the_model,
}


def window(browser: Any, address: str) -> Any:
    """A page at ``address``, in light colours."""
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=SCALE, color_scheme="light")
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(address)
    return page


def shot(page: Any, last: str) -> bytes:
    """A PNG of the page from its top to the end of the lowest element that fits the selector ``last``."""
    boxes = [element.bounding_box() for element in page.locator(last).all()]
    bottom = max(box["y"] + box["height"] for box in boxes)
    page.wait_for_timeout(1000)  # pictures fade in
    return page.screenshot(clip={"x": 0, "y": 0, "width": WIDTH, "height": bottom + MARGIN}, full_page=True)


def write_picture(picture: Path, png: bytes) -> None:
    """Write a PNG as WebP; raises ValueError where that is larger than a page should load."""
    Image.open(io.BytesIO(png)).convert("RGB").save(picture, quality=80, method=6)
    if picture.stat().st_size > MOST_BYTES:
        raise ValueError(f"{picture} has {picture.stat().st_size:,} bytes, more than {MOST_BYTES:,}: show less of the page")


if __name__ == "__main__":
    main()
