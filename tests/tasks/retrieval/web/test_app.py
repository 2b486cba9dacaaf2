"""The service over real sockets: its answers are a searcher's, its limits hold, and nothing of the disk leaves it."""

import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from megainter.errors import UsageError
from megainter.tasks.retrieval.search.options import SearchOptions, ServeOptions
from megainter.tasks.retrieval.search.searching import Searcher
from megainter.tasks.retrieval.web import app as web
from megainter.tasks.retrieval.web.batching import Batcher, Call, Search
from megainter.tasks.retrieval.web.guard import Guard, host_name, is_loopback
from megainter.tasks.retrieval.web.serving import serve_index
from megainter.verbs.serve import serve
from tests.tasks.retrieval.search.data import HOSTILE, PHOTOS, Gallery, write_photo_gallery
from tests.tasks.retrieval.web.server import Answer, Client, running

SECRET = b"do not tell"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Its photo 6 is a link to a picture outside, and 7 is no picture."""
    folder = tmp_path_factory.mktemp("gallery")
    gallery = write_photo_gallery(folder)
    (gallery.images / "6.png").rename(folder / "outside.png")
    (gallery.images / "6.png").symlink_to(folder / "outside.png")
    (gallery.images / "7.png").write_bytes(SECRET)
    return gallery


@pytest.fixture(scope="module")
def searcher(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    return Searcher(gallery.index(tmp_path_factory.mktemp("index") / "index"), SearchOptions(precision="fp32"))


@pytest.fixture(scope="module")
def client(searcher: Searcher, gallery: Gallery) -> Iterator[Client]:
    with running(searcher, gallery.images, allow_host=("photos.example",), title="<b>Mine</b>") as client:
        yield client


def test_searches_and_scores_are_the_searchers(client: Client, searcher: Searcher) -> None:
    text = searcher.index.caption(2)
    for order in ("both", "second", "first"):
        answer = client.get(f"/api/search?q={text.replace(' ', '+')}&top=5&order={order}").json()
        found = searcher.images_of([text], 5, order)[0].hits  # type: ignore[arg-type]
        assert [item["row"] for item in answer["images"]] == [hit.number for hit in found]
        assert [item["first_stage"] for item in answer["images"]] == pytest.approx([hit.first for hit in found], abs=1e-5)
        if order != "first":
            assert [item["both_stages"] for item in answer["images"]] == pytest.approx([hit.both for hit in found], abs=1e-5)

    everything = {hit.number: hit for hit in searcher.images_of([text], PHOTOS)[0].hits}
    pairs = [{"text": text, "row": row} for row in (3, 0, 3)]
    scored = client.ask("POST", "/api/score", json.dumps({"pairs": pairs})).json()["pairs"]
    assert [item["row"] for item in scored] == [3, 0, 3]
    for item in scored:
        hit = everything[item["row"]]
        assert (item["first_stage"], item["second_stage"], item["both_stages"]) == pytest.approx(
            (hit.first, hit.second, hit.both), abs=1e-5
        )

    similar = client.get("/api/images/2/similar?top=3").json()["similar"]
    assert [(item["row"], item["cosine"]) for item in similar] == [
        (hit.number, pytest.approx(hit.first, abs=1e-6)) for hit in searcher.similar_to_row(2, 3).hits
    ]


def test_a_photo_finds_its_own_captions_and_itself(client: Client, searcher: Searcher, gallery: Gallery) -> None:
    answer = client.ask("POST", "/api/photo?top=4", (gallery.images / "2.png").read_bytes()).json()
    record = searcher.record(2)
    assert [item["pair_id"] for item in answer["captions"]] == [
        searcher.index.pair_ids[hit.number].as_py() for hit in searcher.captions_of(record, 4).hits
    ]
    assert (answer["similar"][0]["row"], answer["similar"][0]["cosine"]) == (2, pytest.approx(1, abs=1e-4))
    assert (answer["width"], answer["height"], len(answer["boxes"])) == (record.width, record.height, len(record))
    assert set(answer["milliseconds"]) == {"detect", "encode", "nearest", "second_stage"}


def test_requests_that_come_together_are_computed_together(client: Client, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """One holds the model; twelve that come meanwhile are one batch of equal answers."""
    texts = [searcher.index.caption(number) for number in range(12)]
    alone = [client.get(f"/api/search?q={text.replace(' ', '%20')}").json()["images"] for text in texts if text != HOSTILE]
    images_of, together, entered, release = searcher.images_of, list[int](), threading.Event(), threading.Event()

    def noted(asked: list[str], *rest: object) -> object:
        together.append(len(asked))
        entered.set()
        release.wait(30)
        return images_of(asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(searcher, "images_of", noted)
    with ThreadPoolExecutor(13) as pool:
        first = pool.submit(client.get, "/api/search?q=first")
        assert entered.wait(30)
        plain = [text for text in texts if text != HOSTILE]
        answers = [pool.submit(client.get, f"/api/search?q={text.replace(' ', '%20')}") for text in plain]
        threading.Event().wait(0.5)
        release.set()
        assert first.result().status == 200
        for answer, wanted in zip(answers, alone, strict=True):
            found = answer.result().json()["images"]
            assert [item["row"] for item in found] == [item["row"] for item in wanted]
            scores = [item["both_stages"] for item in wanted]
            assert [item["both_stages"] for item in found] == pytest.approx(scores, abs=1e-5)
    assert together == [1, len(plain)]


def test_one_that_fails_does_not_fail_its_neighbours(searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> None:
    images_of = searcher.images_of

    def failing(texts: list[str], *rest: object) -> object:
        if "bad" in texts:
            raise ValueError("bad")
        return images_of(texts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(searcher, "images_of", failing)
    good, bad, called = Batcher(searcher)._compute([Search("red", 2, "both"), Search("bad", 2, "both"), Call(lambda: 7)])
    assert [hit.number for hit in good.hits] == [hit.number for hit in images_of(["red"], 2)[0].hits]
    assert isinstance(bad, ValueError)
    assert called == 7


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "photos.example.evil"])
def test_other_names_are_not_answered(client: Client, host: str) -> None:
    """What a page would get that had its name pointed here."""
    for target in ("/", "/api/about", "/images/0", "/nothing"):
        answer = client.get(target, Host=host)
        assert answer.status == 421
        assert b"--allow-host" in answer.body


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "192.168.1.7", "photos.example:8080"])
def test_own_names_and_addresses_are_answered(client: Client, host: str) -> None:
    assert client.get("/api/about", Host=host).status == 200
    assert client.get("/api/about", Host=host, Origin=f"http://{host}").status == 200


def test_pages_of_other_sites_may_not_send(client: Client) -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert client.ask("POST", "/api/score", b"{}", Origin=origin).status == 403
    assert host_name("[2001:db8::1]:80") == "2001:db8::1"
    assert host_name("Some.Name:x") == "some.name:x"
    assert is_loopback("::1")
    assert not is_loopback("0.0.0.0")


def png(width: int, height: int) -> bytes:
    """A small file of many pixels."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def refusals(client: Client) -> dict[str, tuple[Answer, int]]:
    """Requests that are refused, and the status that each deserves."""
    score, limit = "/api/score", web.MAX_PHOTO_BYTES
    many = json.dumps({"pairs": [{"text": "a", "row": 0}] * (web.MAX_PAIRS + 1)})
    return {
        "no query": (client.get("/api/search"), 400),
        "a query of spaces": (client.get("/api/search?q=+%20"), 400),
        "a long query": (client.get(f"/api/search?q={'a' * 501}"), 413),
        "a long address": (client.get(f"/api/search?q={'a' * 9000}"), 414),
        "no number": (client.get("/api/search?q=a&top=ten"), 400),
        "a large number": (client.get("/api/search?q=a&top=101"), 400),
        "an odd digit": (client.get("/api/search?q=a&top=%C2%B2"), 400),
        "another order": (client.get("/api/search?q=a&order=best"), 400),
        "an unknown parameter": (client.get("/api/search?q=a&topp=3"), 400),
        "an unknown parameter of a picture": (client.get("/images/0?sise=small"), 400),
        "an image beyond": (client.get(f"/images/{PHOTOS}"), 404),
        "an image far beyond": (client.get(f"/api/images/{'9' * 40}"), 404),
        "a negative row": (client.get("/images/-1"), 404),
        "another size": (client.get("/images/0?size=../../x"), 400),
        "a folder": (client.get("/images/../../../etc/passwd"), 404),
        "an escaped folder": (client.get("/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd"), 404),
        "an absolute path": (client.get("//etc/passwd"), 404),
        "the source": (client.get("/../app.py"), 404),
        "a zero byte": (client.get("/images/0%00.png"), 404),
        "a link that leaves": (client.get("/images/6"), 404),
        "no picture": (client.get("/images/7"), 404),
        "another method": (client.ask("DELETE", "/images/0"), 405),
        "a large body by its word": (client.ask("POST", "/api/photo", b"", Content_Length=str(limit + 1)), 413),
        "a large body in parts": (client.ask("POST", "/api/photo", iter([b"x" * (1 << 20)] * 21)), 413),
        "no photo": (client.ask("POST", "/api/photo", b"hello"), 415),
        "an empty photo": (client.ask("POST", "/api/photo", b""), 400),
        "many pixels": (client.ask("POST", "/api/photo", png(8000, 8000)), 413),
        "too many pixels to begin": (client.ask("POST", "/api/photo", png(20_000, 20_000)), 415),
        "no JSON": (client.ask("POST", score, b"{"), 400),
        "deep JSON": (client.ask("POST", score, b"[" * 100_000), 400),
        "other JSON": (client.ask("POST", score, b'{"pairs": 3}'), 400),
        "no pairs": (client.ask("POST", score, b'{"pairs": []}'), 413),
        "many pairs": (client.ask("POST", score, many), 413),
        "no row": (client.ask("POST", score, b'{"pairs": [{"text": "a", "row": "0"}]}'), 400),
        "a row beyond": (client.ask("POST", score, b'{"pairs": [{"text": "a", "row": 8}]}'), 400),
        "half a letter": (client.ask("POST", score, b'{"pairs": [{"text": "\\ud800", "row": 0}]}'), 400),
    }


def test_what_is_refused_tells_nothing_of_the_disk(client: Client, gallery: Gallery) -> None:
    """Each is answered, with its status and one sentence; the service goes on."""
    found = refusals(client)
    assert {name: answer.status for name, (answer, _) in found.items()} == {name: status for name, (_, status) in found.items()}
    for name, (answer, _) in found.items():
        assert str(gallery.images.parent).encode() not in answer.body, name
        assert b"/tmp" not in answer.body, name
        assert SECRET not in answer.body, name
        assert b"Traceback" not in answer.body, name
    assert client.get("/api/search?q=red").status == 200


def test_pictures_are_made_anew(client: Client, gallery: Gallery) -> None:
    """What a camera or a person wrote into the file stays behind; the picture is the same."""
    image = Image.open(gallery.images / "1.png").convert("RGB")
    exif = Image.Exif()
    exif[0x010E] = SECRET.decode()
    image.save(gallery.images / "1.png", "JPEG", exif=exif, comment=SECRET, quality=95)
    answer = client.get("/images/1?size=large")
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg")
    assert SECRET not in answer.body
    shown = Image.open(io.BytesIO(answer.body))
    assert (shown.size, dict(shown.getexif())) == (image.size, {})


def test_every_answer_is_guarded_and_the_page_loads_nothing_else(client: Client) -> None:
    for target in ("/", "/page.js", "/page.css", "/style.css", "/icon.svg", "/api/about", "/images/0", "/nothing", "/api/search"):
        headers = client.get(target).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers
    page = client.get("/").body.decode()
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"icon.svg", "style.css", "page.css", "page.js", "./"}
    for name in ("page.js", "page.css", "style.css"):
        assert b"http" not in client.get(f"/{name}").body
    assert b"innerHTML" not in client.get("/page.js").body


def test_about_says_what_is_here(client: Client, searcher: Searcher) -> None:
    about = client.get("/api/about").json()
    assert (about["title"], about["images"], about["captions"], about["photos"]) == ("<b>Mine</b>", PHOTOS, 2 * PHOTOS, True)
    for example in about["examples"]:
        assert example["text"] in searcher.index.captions_of(example["row"])
    image = client.get("/api/images/3").json()
    assert image["captions"] == searcher.index.captions_of(3)


def test_one_line_of_log_a_request_whatever_is_asked(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    client.get("/api/search?q=red%0a2026-01-01+forged%1b[31m")
    client.get("/nothing%0d%0aforged")
    printed = ""
    for _ in range(100):  # a line is written when its answer has been sent
        printed += capsys.readouterr().out
        if printed.count("forged") == 2 and printed.endswith("\n"):
            break
        time.sleep(0.05)
    lines = [line for line in printed.splitlines() if "forged" in line]
    assert len(lines) == 2
    assert re.fullmatch(r"\S+ \S+ 127\.0\.0\.1 GET /api/search\?q=red2026-01-01 forged\[31m 200 \d+ ms", lines[0])
    assert re.fullmatch(r"\S+ \S+ 127\.0\.0\.1 GET /nothingforged 404 \d+ ms", lines[1])


def test_photos_are_off_where_the_detector_is_unknown(
    client: Client, searcher: Searcher, gallery: Gallery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(self: Searcher) -> None:
        raise UsageError(f"photos need {gallery.store}")

    monkeypatch.setattr(Searcher, "photos", property(absent))
    with running(searcher, gallery.images) as other:
        about = other.get("/api/about").json()
        assert not about["photos"]
        assert str(gallery.store) not in about["photos_note"]
        assert other.ask("POST", "/api/photo", b"x").status == 503


def test_mistakes_are_one_line(searcher: Searcher, gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port {port} cannot be listened on: Address already in use; give another --port"):
            serve_index(searcher.index.path, SearchOptions(), ServeOptions(port=port))
    for port in (-1, 65536):
        with pytest.raises(UsageError, match="cannot be listened on"):
            serve_index(searcher.index.path, SearchOptions(), ServeOptions(port=port))
    with pytest.raises(UsageError, match="is no index"):
        serve(tmp_path)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UsageError, match=r"pip install 'megainter\[serve\]'"):
        serve(searcher.index.path)


def test_a_guard_counts_host_headers() -> None:
    """Two of them may mean one thing to a proxy and another here."""
    scope = {"type": "http", "headers": [(b"host", b"localhost"), (b"host", b"evil.example")], "query_string": b""}
    assert Guard(lambda *_: None, ())._refusal(scope) is not None  # type: ignore[arg-type, return-value]
