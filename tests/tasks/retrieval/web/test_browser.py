"""The page in a headless Chromium: typed and dropped searches, phone width, dark mode, keyboard, hostile captions."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megainter.tasks.retrieval.search.options import SearchOptions
from megainter.tasks.retrieval.search.searching import Searcher
from megainter.view.pages import plain
from tests.browser import MARKS, Watched, chromium
from tests.tasks.retrieval.search.data import HOSTILE, PHOTOS, Gallery, write_photo_gallery
from tests.tasks.retrieval.web.server import Client, running

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True, "device_scale_factor": 2}
DROP = """([bytes, name]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""

pytestmark = MARKS


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return write_photo_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def client(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    searcher = Searcher(gallery.index(tmp_path_factory.mktemp("index") / "index"), SearchOptions(precision="fp32"))
    with running(searcher, gallery.images, title="My photos") as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def open_page(browser: Any, client: Client) -> Iterator[Any]:
    """Opens the page; afterwards nothing was in the console, and nothing was asked of another host."""
    watched, host = Watched(browser), f"127.0.0.1:{client.port}"

    def opened(path: str = "", **context: Any) -> Any:
        return watched.open(f"http://{host}/{path}", **context)

    opened.told = watched.told  # type: ignore[attr-defined]
    yield opened
    watched.close()
    assert watched.told == []
    assert {address.split("/")[2] for address in watched.asked if address.startswith("http")} == {host}


def until(page: Any, expression: str, seconds: float = 20) -> None:
    """Wait until an expression is true on the page: playwright's own waiting needs the eval that the page's policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(50)


def rows(page: Any) -> list[int]:
    """Rows of the pictures that are shown."""
    sources = page.eval_on_selector_all("#results img", "images => images.map(image => image.getAttribute('src'))")
    return [int(source.split("/")[1].split("?")[0]) for source in sources]


def test_a_typed_query_shows_what_the_service_finds(open_page: Any, client: Client) -> None:
    """The order of the answer, pictures that load, regions under the pointer, and the address for coming back."""
    page = open_page()
    page.wait_for_selector(".examples button")
    assert page.title() == "My photos"
    page.keyboard.type("a red picture")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .open")
    answer = client.get("/api/search?q=a+red+picture").json()
    assert rows(page) == [item["row"] for item in answer["images"]]
    until(page, "[...document.querySelectorAll('#results img')].slice(0, 4).every(image => image.naturalWidth > 0)")
    assert "looked at closely" in page.inner_text("#status")
    assert page.url.endswith("?q=a+red+picture")

    page.hover("#results figure:nth-child(2)")
    page.wait_for_selector("#results figure:nth-child(2) .box")
    found = client.get(f"/api/images/{rows(page)[1]}").json()["boxes"]
    assert page.locator("#results figure:nth-child(2) .box").count() == len(found)
    until(page, "getComputedStyle(document.querySelector('#results figure:nth-child(2) .box')).opacity > 0.4")

    before = rows(page)
    page.click("#results figure:nth-child(1) .foot button")
    page.wait_for_selector("#heading:not([hidden])")
    similar = client.get(f"/api/images/{before[0]}/similar").json()["similar"]
    assert rows(page) == [item["row"] for item in similar]
    page.go_back()
    page.wait_for_selector("#heading", state="hidden")
    page.wait_for_selector("#results .open")
    assert rows(page) == before


def test_a_dropped_photo_finds_captions_and_similar_pictures(open_page: Any, client: Client, gallery: Gallery) -> None:
    page = open_page()
    page.wait_for_selector(".examples button")
    content = (gallery.images / "5.png").read_bytes()
    page.evaluate(DROP, [list(content), "x.png"])
    page.wait_for_selector("#asked:not([hidden])")
    answer = client.ask("POST", "/api/photo", content).json()
    assert page.locator("#asked li span:first-child").all_inner_texts() == [plain(item["caption"]) for item in answer["captions"]]
    assert rows(page)[0] == 5
    until(page, "document.querySelector('#asked img').naturalWidth > 0")
    assert page.locator("#asked .box").count() == len(answer["boxes"])
    assert page.locator("#drop").is_hidden()


def test_a_hostile_caption_is_text(open_page: Any) -> None:
    page = open_page("?q=script+alert")
    page.wait_for_selector("#results .open")
    assert page.locator("#results script, #results b script").count() == 0
    shown = page.locator("#results figcaption p").all_inner_texts()
    assert plain(HOSTILE) in shown
    page.click(f"#results figure:nth-child({1 + next(i for i, text in enumerate(shown) if '<script>' in text)}) .open")
    page.wait_for_selector("dialog[open] .box")
    assert plain(HOSTILE) in page.inner_text("dialog .captions")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_both_schemes(open_page: Any, scheme: str) -> None:
    """No sideways scrolling on the welcome, the results, a picture and a photo; colours follow the system."""
    page = open_page(color_scheme=scheme, **PHONE)
    fits = "document.documentElement.scrollWidth <= window.innerWidth"
    page.wait_for_selector(".examples button")
    assert page.evaluate(fits)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    darkness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert (darkness < 200) == (scheme == "dark")
    page.tap(".examples button")
    page.wait_for_selector("#results .open")
    assert page.evaluate(fits)
    assert page.locator("#results figure").count() == PHOTOS
    page.tap("#results figure:nth-child(1) .open")
    page.wait_for_selector("dialog[open] .box")
    assert page.evaluate("document.querySelector('dialog').scrollWidth <= window.innerWidth")
    page.tap("dialog .close")
    assert page.locator("dialog[open]").count() == 0


def test_everything_is_reached_by_keyboard(open_page: Any) -> None:
    page = open_page()
    page.wait_for_selector(".examples button")
    page.keyboard.type("green")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .open")
    page.focus("#results figure:nth-child(1) .open")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.closest('figure') === document.querySelector('#results figure:nth-child(2)')")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog:not([open])", state="attached")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "pick"


def test_what_goes_wrong_is_told(open_page: Any, tmp_path: Path) -> None:
    """A file that is no picture, by the button: one sentence, and the page goes on."""
    page = open_page()
    page.wait_for_selector(".examples button")
    (tmp_path / "no.png").write_text("no picture")
    page.set_input_files("#file", str(tmp_path / "no.png"))
    page.wait_for_selector("#status.wrong")
    assert page.inner_text("#status").startswith("Not a readable image")
    assert all("status of 415" in line for line in open_page.told)  # Chromium itself notes requests that were refused
    open_page.told.clear()
    page.fill("#query", "green")
    page.keyboard.press("Enter")
    page.wait_for_selector("#results .open")
