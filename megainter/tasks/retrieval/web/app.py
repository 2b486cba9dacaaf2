"""The application: pages, pictures and JSON over one index.

    GET  /                            the page
    GET  /api/about                   what is here
    GET  /api/search?q=&top=&order=   images for a sentence
    POST /api/photo                   captions and similar images for the photo in the body
    GET  /api/images/ROW              captions and regions of an image
    GET  /api/images/ROW/similar      images like it
    POST /api/score                   scores of pairs: {"pairs": [{"text": ..., "row": ...}, ...]}
    GET  /images/ROW?size=            its picture

Images are asked for by their row in the index; nothing that a client sends is ever a path.
"""

import asyncio
import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from megainter.data.feature_store.record import RegionRecord
from megainter.errors import MegainterError
from megainter.tasks.retrieval.search.answers import image_item, images_answer, similar_items
from megainter.tasks.retrieval.search.checks import is_unicode
from megainter.tasks.retrieval.search.command import notes_on, photo_answer
from megainter.tasks.retrieval.search.options import Order, ServeOptions
from megainter.tasks.retrieval.search.searching import Found, Searcher
from megainter.tasks.retrieval.web.batching import Batcher, BusyError, Call, Scoring, Search
from megainter.tasks.retrieval.web.guard import Guard
from megainter.tasks.retrieval.web.thumbnails import SIZES, Thumbnails
from megainter.view.pages import STYLE, plain
from megainter.view.pictures import region_boxes
from preprocessing.images.decode import UnreadableImageError, image_size

MAX_PHOTO_BYTES = 20 << 20
MAX_PHOTO_PIXELS = 50_000_000
MAX_JSON_BYTES = 1 << 20
MAX_QUERY = 500  # characters
MAX_PAIRS = 256  # of one request
MAX_TOP, TOP = 100, 24
BODY_SECONDS = 30.0  # in which a body must have come
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
ASSETS = [*(Path(__file__).parent / "assets" / name for name in ("page.css", "page.js", "icon.svg")), STYLE]
PAGE = Path(__file__).parent / "assets" / "page.html"


class Service:
    """The handlers, and what they share."""

    def __init__(self, searcher: Searcher, thumbnails: Thumbnails, title: str) -> None:
        self.searcher, self.index, self.thumbnails, self.title = searcher, searcher.index, thumbnails, title
        self.batcher = Batcher(searcher)
        self.names = tuple(plain(name) for name in searcher.store.schema.class_names)
        self.photos, self.photos_note = _photos(searcher)

    async def about(self, request: Request) -> Response:
        facts, options = self.index.facts, self.searcher.options
        return JSONResponse({
            "title": self.title, "images": facts.image_count, "captions": facts.caption_count, "order": options.order,
            "candidates": options.candidates, "photos": self.photos, "photos_note": self.photos_note, "examples": examples(self.searcher),
            "limits": {"query": MAX_QUERY, "photo_bytes": MAX_PHOTO_BYTES, "photo_pixels": MAX_PHOTO_PIXELS, "top": MAX_TOP,
                       "pairs": MAX_PAIRS},
        })  # fmt: skip

    async def search(self, request: Request) -> Response:
        _require_known(request, "q", "top", "order")
        query = _query(request.query_params.get("q", ""))
        top, order = _number(request, "top", TOP, MAX_TOP), self._order(request)
        found: Found = await self.batcher.ask(Search(query, top, order))
        return JSONResponse(images_answer(query, found, self.index, notes_on(self.searcher, query)) | {"order": order})

    async def photo(self, request: Request) -> Response:
        if not self.photos:
            raise HTTPException(503, self.photos_note)
        _require_known(request, "top", "order")
        top, order = _number(request, "top", TOP, MAX_TOP), self._order(request)
        body = await _body(request, MAX_PHOTO_BYTES)
        return JSONResponse(await self.batcher.ask(Call(lambda: self._photo(body, top, order))))

    def _photo(self, body: bytes, top: int, order: Order) -> dict[str, Any]:
        with tempfile.NamedTemporaryFile(prefix="megainter-", suffix=".photo") as file:
            file.write(body)
            file.flush()
            width, height = image_size(Path(file.name))
            if width * height > MAX_PHOTO_PIXELS:
                raise HTTPException(413, f"the photo has {width} x {height} pixels; up to {MAX_PHOTO_PIXELS:,} are taken")
            answer, record = photo_answer(self.searcher, Path(file.name), "photo", top, order)
        return answer | {"order": order, "width": width, "height": height, "boxes": self._boxes(record)}

    async def image(self, request: Request) -> Response:
        row = self._row(request)
        record = await run_in_threadpool(self.searcher.record, row)
        facts = {"row": row, "image_id": self.index.image_id(row), "captions": self.index.captions_of(row)}
        return JSONResponse(facts | {"width": record.width, "height": record.height, "boxes": self._boxes(record)})

    async def similar(self, request: Request) -> Response:
        _require_known(request, "top")
        row, top = self._row(request), _number(request, "top", TOP, MAX_TOP)
        found: Found = await self.batcher.ask(Call(lambda: self.searcher.similar_to_row(row, top)))
        spent = {"nearest": round(found.nearest_ms, 3)}
        return JSONResponse({"row": row, "similar": similar_items(found, self.index), "milliseconds": spent})

    async def score(self, request: Request) -> Response:
        pairs = _pairs(await _body(request, MAX_JSON_BYTES), self.index.facts.image_count)
        hits = await self.batcher.ask(Scoring([text for text, _ in pairs], [row for _, row in pairs]))
        items = [image_item(hit, 0, self.index) for hit in hits]
        names = ("row", "image_id", "first_stage", "second_stage", "both_stages")
        scored = [{"text": text} | {name: item[name] for name in names} for (text, _), item in zip(pairs, items, strict=True)]
        return JSONResponse({"pairs": scored})

    async def picture(self, request: Request) -> Response:
        _require_known(request, "size")
        row, size = self._row(request), request.query_params.get("size", "small")
        if size not in SIZES:
            raise HTTPException(400, f"size is one of {', '.join(SIZES)}")
        content = await run_in_threadpool(self.thumbnails.get, row, size)
        return Response(content, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})

    def _boxes(self, record: RegionRecord) -> list[dict[str, Any]]:
        return [asdict(box) for box in region_boxes(record, self.names)]

    def _row(self, request: Request) -> int:
        row = int(request.path_params["row"])
        if row >= self.index.facts.image_count:
            raise HTTPException(404, "there is no such image")
        return row

    def _order(self, request: Request) -> Order:
        order = request.query_params.get("order", self.searcher.options.order)
        for known in get_args(Order):
            if order == known:
                return known  # type: ignore[no-any-return]
        raise HTTPException(400, f"order is one of {', '.join(get_args(Order))}")


def examples(searcher: Searcher, count: int = 6, longest: int = 60) -> list[dict[str, Any]]:
    """Short captions spread over the index, to begin with, and the rows of their images."""
    index, found = searcher.index, dict[str, int]()
    for part in range(4 * count if index.facts.caption_count else 0):
        place = int(index.facts.caption_count * (part + 0.5) / (4 * count))
        text = plain(index.caption(place))
        if 0 < len(text) <= longest and len(found) < count:
            found.setdefault(text, int(index.image_of_caption[place]))
    return [{"text": text, "row": row} for text, row in found.items()]


def create_app(searcher: Searcher, folder: Path, serving: ServeOptions) -> Starlette:
    """The application over a searcher and the folder of its images."""
    service = Service(searcher, Thumbnails(searcher.index, folder), plain(serving.title))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running

    routes = [
        Route("/", _asset(PAGE)),
        *(Route(f"/{path.name}", _asset(path)) for path in ASSETS),
        Route("/api/about", service.about),
        Route("/api/search", service.search),
        Route("/api/photo", service.photo, methods=["POST"]),
        Route("/api/images/{row:int}", service.image),
        Route("/api/images/{row:int}/similar", service.similar),
        Route("/api/score", service.score, methods=["POST"]),
        Route("/images/{row:int}", service.picture),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refused, UnreadableImageError: _unreadable, BusyError: _busy, Exception: _failed}
    names = [serving.host, *serving.allow_host]
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan, middleware=[Middleware(Guard, hosts=names)])


def _photos(searcher: Searcher) -> tuple[bool, str]:
    """Whether photos can be searched by, and what the page says where not; the log says why."""
    try:
        _ = searcher.photos
    except MegainterError as error:
        print(f"searching by photos is off: {error}", flush=True)
        return False, "searching by photos is off: the server does not have the detector that found this store's regions"
    return True, ""


def _asset(path: Path) -> Callable[[Request], Awaitable[Response]]:
    async def asset(request: Request) -> Response:
        return FileResponse(path, media_type=TYPES[path.suffix], headers={"cache-control": "no-cache"})

    return asset


def _require_known(request: Request, *names: str) -> None:
    """Answer 400 where the address has a parameter that is none of ``names``."""
    if unknown := [name for name in request.query_params if name not in names]:
        raise HTTPException(400, f"{plain(unknown[0])[:40]!r} is no parameter here; known are {', '.join(names)}")


def _query(text: str) -> str:
    text = text.strip()
    if not text:
        raise HTTPException(400, "the query is empty")
    if not is_unicode(text):
        raise HTTPException(400, "the query is not valid Unicode")
    if len(text) > MAX_QUERY:
        raise HTTPException(413, f"the query has {len(text):,} characters; up to {MAX_QUERY} are taken")
    return text


def _number(request: Request, name: str, usual: int, most: int) -> int:
    text = request.query_params.get(name, str(usual))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 1 <= int(text) <= most):
        raise HTTPException(400, f"{name} is a number from 1 to {most}")
    return int(text)


def _pairs(body: bytes, images: int) -> list[tuple[str, int]]:
    """Texts and rows of a request for scores."""
    try:
        given = json.loads(body)["pairs"]
        pairs = [(pair["text"], pair["row"]) for pair in given]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise HTTPException(400, 'the body is JSON like {"pairs": [{"text": "a red car", "row": 0}]}') from None
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise HTTPException(413, f"{len(pairs):,} pairs; 1 to {MAX_PAIRS} are taken")
    for text, row in pairs:
        if not isinstance(text, str) or type(row) is not int or not 0 <= row < images:
            raise HTTPException(400, f"a pair has a text and the row of an image, 0 to {images - 1}")
    return [(_query(text), row) for text, row in pairs]


async def _body(request: Request, most: int) -> bytes:
    """The body, as far as it comes in time and is not too large."""
    too_large = HTTPException(413, f"the body is larger than {most:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, "the body did not come in time") from None
    if not size:
        raise HTTPException(400, "the body is empty")
    return b"".join(parts)


async def _refused(request: Request, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


async def _unreadable(request: Request, error: UnreadableImageError) -> Response:
    """Its reason says nothing of where the file is."""
    return JSONResponse({"error": f"not a readable image: {plain(error.reason)}"}, 404 if request.method == "GET" else 415)


async def _busy(request: Request, error: BusyError) -> Response:
    return JSONResponse({"error": "too many requests at once; come again in a moment"}, 503, headers={"retry-after": "1"})


async def _failed(request: Request, error: Exception) -> Response:
    """What went wrong stands in the log alone: it may name paths."""
    if not isinstance(error, ClientDisconnect):
        print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    return JSONResponse({"error": "something went wrong here; the server's log says what"}, 500)
