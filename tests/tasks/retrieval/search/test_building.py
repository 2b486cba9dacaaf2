"""The index: what it holds, that a stopped run goes on to the same bytes, and what is refused."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from huggingface_hub import constants

from megainter.data.feature_store import FeatureStore
from megainter.data.mapped import note_facts, open_arrays
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.errors import DamagedError, TooManyBadInputsError, UsageError
from megainter.model.folder import read_config, read_vocabulary
from megainter.tasks.retrieval.gallery import read_gallery, tokenize
from megainter.tasks.retrieval.prefilter.towers import caption_vectors, image_vectors, load_prefilter
from megainter.tasks.retrieval.search import building
from megainter.tasks.retrieval.search.checks import check_index, require_index
from megainter.tasks.retrieval.search.index import KEY, open_index
from megainter.tasks.retrieval.search.options import IndexOptions, SearchOptions
from megainter.tasks.retrieval.search.searching import Searcher
from tests.hub import COMMIT, Hub, serve
from tests.synthetic import environment
from tests.tasks.retrieval.search.data import CAPTIONS, IMAGES, Gallery, captions_of, write_gallery


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return write_gallery(tmp_path_factory.mktemp("gallery"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_it_holds_the_vectors_ids_and_captions_of_all(gallery: Gallery, tmp_path: Path) -> None:
    """Vectors against the first stage's own functions; captions and files against the table."""
    index = gallery.index(tmp_path / "index")
    store, cpu = FeatureStore(gallery.store), torch.device("cpu")
    vocabulary = read_vocabulary(gallery.model, read_config(gallery.model))
    encoder = load_prefilter(gallery.prefilter, vocabulary, store)
    everything = read_gallery(gallery.pairs, store, None, None, None)
    tokens = tokenize(everything.texts(), vocabulary, encoder.settings.max_text_tokens)
    np.testing.assert_allclose(index.image_vectors, image_vectors(encoder, store, everything.image_ids, cpu).numpy(), atol=1e-6)
    by_pair = dict(zip(read_pairs(gallery.pairs).table.column("pair_id").to_pylist(), caption_vectors(encoder, tokens, cpu).numpy()))
    for number, pair_id in enumerate(index.pair_ids.to_pylist()):
        np.testing.assert_allclose(index.caption_vectors[number], by_pair[pair_id], atol=1e-6)

    table = read_pairs(gallery.pairs).table
    assert index.image_ids.to_pylist() == everything.image_ids
    assert (index.facts.image_count, index.facts.caption_count, index.facts.missing) == (IMAGES, IMAGES * CAPTIONS, 0)
    for row, image_id in enumerate(everything.image_ids):
        assert index.captions_of(row) == captions_of(gallery.pairs, image_id)
        files = table.filter(pc.equal(table.column("image_id"), image_id)).column("image").to_pylist()
        assert index.file(row) == files[0]
        assert (index.image_of_caption[index.caption_starts[row] : index.caption_starts[row + 1]] == row).all()


def test_captions_that_are_not_in_order_stand_image_by_image(gallery: Gallery, tmp_path: Path) -> None:
    rows = [Pair(**row) for row in read_pairs(gallery.pairs).table.to_pylist()]
    mixed = tmp_path / "pairs.parquet"
    write_pairs(mixed, [rows[i] for i in np.random.default_rng(0).permutation(len(rows))])
    index = gallery.index(tmp_path / "index", pairs=mixed)
    for row in range(IMAGES):
        assert sorted(index.captions_of(row)) == sorted(captions_of(gallery.pairs, index.image_id(row)))


def test_a_stopped_run_goes_on_to_the_same_bytes(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in each chunk in turn: nothing is computed twice, and no folder appears before the end."""
    monkeypatch.setattr(building, "AT_ONCE", 5)
    whole = contents(gallery.index(tmp_path / "whole").path)
    put, done = building.ScoreFile.put, list[int]()

    def put_and_stop(self: building.ScoreFile, chunk: int, places: np.ndarray, vectors: np.ndarray) -> None:
        put(self, chunk, places, vectors)
        done.append(chunk)
        raise KeyboardInterrupt

    monkeypatch.setattr(building.ScoreFile, "put", put_and_stop)
    chunks = -(-IMAGES // 5) + -(-IMAGES * CAPTIONS // 5)
    for _ in range(chunks):
        with pytest.raises(KeyboardInterrupt):
            gallery.index(tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
    assert done == list(range(chunks))
    assert contents(gallery.index(tmp_path / "parts").path) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(gallery: Gallery, tmp_path: Path) -> None:
    """A real process, killed by SIGKILL at ten moments."""
    whole = contents(gallery.index(tmp_path / "whole").path)
    options = ["--store", gallery.store, "--pairs", gallery.pairs, "--prefilter-model", gallery.prefilter, "--images", gallery.images]
    command = [sys.executable, "-m", "megainter", "index", gallery.model, *options, "--output", tmp_path / "killed"]
    for seconds in np.linspace(2, 8, 10):
        process = subprocess.Popen([str(word) for word in command], env=environment(), stdout=subprocess.DEVNULL)
        time.sleep(float(seconds))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed").exists() or contents(tmp_path / "killed") == whole
    subprocess.run([str(word) for word in command], env=environment(), check=True)
    assert contents(tmp_path / "killed") == whole


def test_the_same_again_is_complete_and_something_else_is_refused(
    gallery: Gallery, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = gallery.index(tmp_path / "index")
    before = contents(index.path)
    gallery.index(tmp_path / "index")
    assert "complete before" in capsys.readouterr().out
    assert contents(index.path) == before
    with pytest.raises(UsageError, match=r"is an index of something else \(.*split.* differ\); name a new --output"):
        gallery.index(tmp_path / "index", split="val")
    assert contents(index.path) == before

    (tmp_path / "elsewhere").mkdir()
    moved = gallery.index(tmp_path / "index", images=tmp_path / "elsewhere")
    assert moved.facts.images == str((tmp_path / "elsewhere").resolve())
    np.testing.assert_array_equal(moved.image_vectors, index.image_vectors)

    (tmp_path / "elsewhere" / "letter.txt").write_text("mine")
    with pytest.raises(UsageError, match="is there and is no index; name a new folder"):
        gallery.index(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "letter.txt").read_text() == "mine"


def test_images_without_regions_are_counted_by_the_one_rule(gallery: Gallery, tmp_path: Path) -> None:
    rows = [Pair(**row) for row in read_pairs(gallery.pairs).table.to_pylist()]
    more = tmp_path / "pairs.parquet"
    write_pairs(more, [*rows, *(Pair(f"x#{i}", f"not-there-{i % 2}", f"not-there-{i % 2}.jpg", "red", "val") for i in range(3))])
    share = math.ceil(1000 * 2 / (IMAGES + 2)) / 1000
    told = rf"3 of {len(rows) + 3} captions .*\(2 of {IMAGES + 2} images\).*'not-there-0'.*--max-bad {share:g}"
    with pytest.raises(TooManyBadInputsError, match=told):
        gallery.index(tmp_path / "index", pairs=more)
    index = gallery.index(tmp_path / "index", pairs=more, max_bad=share)
    assert (index.facts.missing, index.facts.image_count) == (3, IMAGES)
    assert not {"not-there-0", "not-there-1"} & set(index.image_ids.to_pylist())


def test_the_first_stage_inside_the_model_is_found(gallery: Gallery, tmp_path: Path) -> None:
    model = shutil.copytree(gallery.model, tmp_path / "model")
    options = IndexOptions(store=gallery.store, pairs=gallery.pairs, output=tmp_path / "index")
    with pytest.raises(UsageError, match=r"has no first stage .*`megainter finetune prefilter .* --output .*prefilter` makes one"):
        building.build_index(model, options)
    shutil.copytree(gallery.prefilter, model / "prefilter")
    assert building.build_index(model, options).facts.prefilter == str(model / "prefilter")


def test_a_model_by_its_name_is_indexed_and_found_again_by_it(gallery: Gallery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {path.name: path.read_bytes() for path in gallery.model.iterdir() if path.is_file()}
    with serve(Hub(files={"team/interbert": files})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        options = IndexOptions(
            store=gallery.store, pairs=gallery.pairs, prefilter_model=gallery.prefilter, output=tmp_path / "index", images=gallery.images
        )
        check_index(Path("hf:team/interbert"), options)
        index = building.build_index(Path("hf:team/interbert"), options)
        assert index.facts.model == f"hf:team/interbert@{COMMIT}"
        assert index.facts.model_digest == gallery.index(tmp_path / "plain").facts.model_digest
        searcher = Searcher(index, SearchOptions(precision="fp32"))
        assert len(searcher.images_of(["red"], 3)[0].hits) == 3
        moved = SearchOptions(precision="fp32", model=Path("hf:team/interbert"))
        assert Searcher(index, moved).model_folder == searcher.model_folder
    with pytest.raises(UsageError, match="MODEL hf:team is no name of the Hub"):
        check_index(Path("hf:team"), options)


def test_what_is_no_whole_index_is_refused(gallery: Gallery, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no index"):
        open_index(tmp_path)
    (tmp_path / "photos.index").mkdir()
    with pytest.raises(UsageError, match=r"photo\.index does not exist; did you mean .*photos\.index\?"):
        require_index(tmp_path / "photo.index")
    with pytest.raises(UsageError, match="index two dogs does not exist; the index stands first"):
        require_index(Path("two dogs"))
    index = gallery.index(tmp_path / "index")
    facts = open_arrays(index.path, KEY).facts
    note_facts(index.path, {"model": 3})
    with pytest.raises(UsageError, match=r"index\.json: "):
        open_index(index.path)
    note_facts(index.path, facts)
    open_index(index.path)
    (index.path / "image_vectors").write_bytes((index.path / "image_vectors").read_bytes()[:-4])
    with pytest.raises(DamagedError, match="image_vectors is missing or is not as it was written"):
        open_index(index.path)
