"""The verb as a real process: it answers where it says, and a signal lets requests under way end."""

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.tasks.retrieval.search.data import Gallery, write_photo_gallery
from tests.tasks.retrieval.web.server import started

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return write_photo_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_requests_under_way_are_answered(gallery: Gallery, tmp_path: Path, number: signal.Signals) -> None:
    index = gallery.index(tmp_path / "index")
    with started(index.path, "--precision", "fp32") as (process, client, lines):
        assert not [line for line in lines if "warning" in line]
        assert client.get("/api/search?q=red").status == 200
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(client.ask, "POST", "/api/photo", (gallery.images / "1.png").read_bytes()) for _ in range(8)]
            while not any(answer.done() for answer in asked):
                pass
            process.send_signal(number)
            statuses = {answer.result().status for answer in asked if answer.exception() is None}
        assert statuses == {200}
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read().endswith("stopped\n")
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_whoever_listens_to_all_is_warned(gallery: Gallery, tmp_path: Path) -> None:
    index = gallery.index(tmp_path / "index")
    with started(index.path, "--host", "0.0.0.0", "--order", "first") as (_, client, lines):
        assert any("there is no password" in line for line in lines)
        assert client.get("/api/about", Host="photos.example").status == 421
        assert client.get("/api/search?q=red").json()["order"] == "first"
