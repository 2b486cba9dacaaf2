"""The first stage of large galleries: its training, its candidates and the second stage behind it, against brute force."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants

from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import read_pairs
from megainter.errors import UsageError
from megainter.files import write_json
from megainter.model.folder import read_config, read_vocabulary
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.both import FILE, Learned
from megainter.tasks.retrieval.gallery import read_gallery, tokenize
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.pairs import CandidateScorer
from megainter.tasks.retrieval.prefilter import candidates
from megainter.tasks.retrieval.prefilter.candidates import choose_candidates, nearest, rank_candidates
from megainter.tasks.retrieval.prefilter.towers import PrefilterSettings, caption_vectors, image_vectors, load_prefilter
from megainter.tasks.retrieval.prefilter.training import PrefilterTraining, batches, contrastive_loss, finetune
from megainter.tasks.retrieval.ranking import rank_scores
from megainter.tasks.retrieval.report import RetrievalReport
from tests.hub import COMMIT, Hub, serve
from tests.synthetic import write_data
from tests.tasks.retrieval.test_evaluation import write_model
from tests.tasks.retrieval.test_ranking import brute_force

IMAGES, CAPTIONS, KEEP = 40, 2, 10  # 30 images of train, 10 of val
TRAINING = PrefilterTraining(epochs=60, batch=20, learning_rate=3e-3)


def evaluate(model: Path, pairs: Path, store: Path, **given: Any) -> RetrievalReport:
    return evaluation.evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, **given))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, pairs, store)."""
    folder = tmp_path_factory.mktemp("prefilter")
    pairs, store = write_data(folder, images=IMAGES, captions=CAPTIONS)
    return write_model(folder / "model", pairs), pairs, store


@pytest.fixture(scope="module")
def trained(data: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(*data, output=tmp_path_factory.mktemp("trained") / "prefilter", training=TRAINING)


@pytest.fixture(scope="module")
def weak(data: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that misses some: what is lost must be seen."""
    return finetune(
        *data, output=tmp_path_factory.mktemp("weak") / "prefilter", training=PrefilterTraining(epochs=1, batch=20, learning_rate=1e-6)
    )


def vectors(data: tuple[Path, Path, Path], folder: Path, split: str | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Vectors of captions and images, and the own image of each caption."""
    model, pairs, path = data
    store, cpu = FeatureStore(path), torch.device("cpu")
    vocabulary = read_vocabulary(model, read_config(model))
    encoder = load_prefilter(folder, vocabulary, store)
    gallery = read_gallery(pairs, store, split, None, None)
    tokens = tokenize(gallery.texts(), vocabulary, encoder.settings.max_text_tokens)
    found = caption_vectors(encoder, tokens, cpu), image_vectors(encoder, store, gallery.image_ids, cpu)
    return *found, gallery.image_of_caption


def scored(path: Path) -> dict[tuple[str, str], float]:
    """Written scores of pairs, by caption and image."""
    return {(row["pair_id"], row["image_id"]): row["score"] for row in pq.read_table(path).to_pylist()}


def matrix(path: Path) -> dict[tuple[str, str], float]:
    """The written score matrix likewise."""
    table = pq.read_table(path)
    images = json.loads(table.schema.metadata[b"images"])
    return {(row["pair_id"], image): score for row in table.to_pylist() for image, score in zip(images, row["scores"], strict=True)}


def test_it_finds_images_it_was_not_trained_on(data: tuple[Path, Path, Path], trained: Path) -> None:
    """Ten held-out images of random colours: by chance a tenth is found, and less than a third with the probability 1e-3."""
    captions, images, own = vectors(data, trained, "val")
    assert float(((captions @ images.T).argmax(1).numpy() == own).mean()) >= 0.6
    captions, images, own = vectors(data, trained, "train")
    assert float(((captions @ images.T).argmax(1).numpy() == own).mean()) >= 0.6


def test_vectors_have_length_one_and_see_no_neighbours(data: tuple[Path, Path, Path], trained: Path) -> None:
    model, _, path = data
    store, cpu = FeatureStore(path), torch.device("cpu")
    encoder = load_prefilter(trained, read_vocabulary(model, read_config(model)), store)
    ids = [f"image-{i:03d}" for i in range(5)]
    together = image_vectors(encoder, store, ids, cpu)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(torch.cat([image_vectors(encoder, store, [one], cpu) for one in ids]), together)


def test_the_same_seed_trains_the_same_weights(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    short = PrefilterTraining(epochs=2, batch=20)
    files = [finetune(*data, output=tmp_path / name, training=short) / "prefilter.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = finetune(*data, output=tmp_path / "three", training=PrefilterTraining(epochs=2, batch=20, seed=1))
    assert (other / "prefilter.safetensors").read_bytes() != files[0].read_bytes()


def test_an_epoch_shows_each_caption_once() -> None:
    rows = list(batches(PrefilterTraining(epochs=2, seed=4), 60, 20))
    assert [len(one) for one in rows] == [20] * 6
    assert sorted(np.concatenate(rows[:3]).tolist()) == list(range(60))
    assert np.concatenate(rows[:3]).tolist() != np.concatenate(rows[3:]).tolist()


def test_captions_of_one_image_are_no_wrong_answers_to_each_other() -> None:
    """Against a loop over single queries, with an image of three captions."""
    own = torch.tensor([0, 0, 1, 2, 0])
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    losses = []
    for c, image in enumerate(own.tolist()):
        losses.append(-logits[c].log_softmax(0)[image])
        rivals = [logits[c, image], *(logits[other, image] for other in range(5) if own[other] != image)]
        losses.append(-torch.stack(rivals).log_softmax(0)[0])
    torch.testing.assert_close(contrastive_loss(logits, own), torch.stack(losses).mean())


@pytest.mark.parametrize("few", [0, 7])
@pytest.mark.parametrize("blocks", [(1, 1), (3, 4), (1000, 16_384)])
def test_nearest_is_exact_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, int], few: int) -> None:
    """Vectors of small integers: dot products are exact, of both signs, and many are equal."""
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(-2, 3, (7, 4), generator=generator).float()
    gallery = torch.randint(-2, 3, (23, 4), generator=generator).float()
    monkeypatch.setattr(candidates, "QUERIES_AT_ONCE", blocks[0])
    monkeypatch.setattr(candidates, "VECTORS_AT_ONCE", blocks[1])
    monkeypatch.setattr(candidates, "FEW_QUERIES", few)
    scores = (queries @ gallery.T).numpy()
    for keep in (1, 5, 23, 50):
        found = nearest(queries, gallery, keep)
        wanted = [sorted(sorted(range(23), key=lambda v: (-scores[q, v], v))[:keep]) for q in range(7)]
        assert found.numbers.tolist() == wanted
        assert found.scores.tolist() == [scores[q, row].tolist() for q, row in enumerate(wanted)]


def test_ranks_among_candidates_equal_brute_force() -> None:
    """Everything that is not a candidate of the query counts as below, and a missing right answer as last; scores with ties."""
    generator = torch.Generator().manual_seed(2)
    captions, images = torch.randn(30, 5, generator=generator), torch.randn(14, 5, generator=generator)
    own = np.concatenate([np.arange(14), np.random.default_rng(0).integers(0, 14, 16)]).astype(np.int32)
    found = choose_candidates(captions, images, 6)
    scores = np.random.default_rng(1).integers(0, 4, (14, 30)).astype(np.float32)
    flat = scores.ravel()[found.keys]
    ranks = rank_candidates(found, own, found.scores_of_captions(flat), found.scores_of_images(flat), top=3)
    products = (captions @ images.T).numpy()
    for c in range(30):
        chosen = sorted(np.argsort(-products[c])[:6].tolist())
        order = sorted(chosen, key=lambda i: (-scores[i, c], i == own[c]))
        assert ranks.caption_ranks[c] == (order.index(own[c]) + 1 if own[c] in chosen else 14)
        assert ranks.top_images[c].tolist() == sorted(chosen, key=lambda i: (-scores[i, c], i))[:3]
    for i in range(14):
        chosen = np.argsort(-products[:, i])[:6].tolist()
        order = sorted(chosen, key=lambda c: (-scores[i, c], own[c] == i))
        assert ranks.image_ranks[i] == next((place for place, c in enumerate(order, 1) if own[c] == i), 30)


def test_all_pairs_as_candidates_give_the_same_bits_and_figures(data: tuple[Path, Path, Path], trained: Path, tmp_path: Path) -> None:
    plain = evaluate(*data, output=tmp_path / "plain.json", split=None, batch_pairs=24, scores=tmp_path / "plain.parquet")
    options = {"batch_pairs": 24, "prefilter": 100, "prefilter_model": trained}
    report = evaluate(*data, output=tmp_path / "two.json", split=None, scores=tmp_path / "two.parquet", **options)
    assert scored(tmp_path / "two.parquet") == matrix(tmp_path / "plain.parquet")
    assert (report.text_to_image, report.image_to_text) == (plain.text_to_image, plain.image_to_text)
    assert pq.read_table(tmp_path / "two.top.parquet").equals(pq.read_table(tmp_path / "plain.top.parquet"))
    assert report.prefilter is not None
    assert (report.prefilter.bound_text_to_image, report.prefilter.bound_image_to_text) == (1.0, 1.0)
    captions, images, own = vectors(data, trained, None)
    alone = rank_scores((images @ captions.T).numpy(), own)
    assert report.prefilter.text_to_image.r_at_5 == pytest.approx(np.mean(alone.caption_ranks <= 5))


def test_few_candidates_equal_brute_force(
    data: tuple[Path, Path, Path], weak: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"split": None, "precision": "fp32"}
    evaluate(*data, output=tmp_path / "plain.json", scores=tmp_path / "plain.parquet", **options)
    report = evaluate(*data, output=tmp_path / "two.json", scores=tmp_path / "two.parquet", prefilter=KEEP, prefilter_model=weak, **options)
    captions, images, own = vectors(data, weak, None)
    products = (images @ captions.T).numpy()
    pairs, everything, found = read_pairs(data[1]), matrix(tmp_path / "plain.parquet"), scored(tmp_path / "two.parquet")
    np.testing.assert_allclose([found[key] for key in sorted(found)], [everything[key] for key in sorted(found)], atol=1e-5)
    everything |= found  # equal captions tie or not by the last bit, which depends on who shares a forward
    scores = np.array([[everything[pairs.pair_id(c), image] for c in range(len(pairs))] for image in pairs.image_ids], dtype=np.float32)
    of_captions, of_images = (np.full_like(scores, -np.inf) for _ in range(2))
    for c in range(len(pairs)):
        near = np.argsort(-products[:, c], kind="stable")[:KEEP]
        of_captions[near, c] = scores[near, c]
    for i in range(len(images)):
        near = np.argsort(-products[i], kind="stable")[:KEEP]
        of_images[i, near] = scores[i, near]
    chosen = np.isfinite(of_captions) | np.isfinite(of_images)
    assert found.keys() == {(pairs.pair_id(c), pairs.image_ids[i]) for i, c in np.argwhere(chosen)}
    text_ranks = np.array(brute_force(of_captions, own)[0])
    image_ranks = np.array(brute_force(of_images, own)[1])
    assert 0 < chosen.mean() < 1
    assert [getattr(report.text_to_image, f"r_at_{k}") for k in (1, 5, 10)] == [np.mean(text_ranks <= k) for k in (1, 5, 10)]
    assert [getattr(report.image_to_text, f"r_at_{k}") for k in (1, 5, 10)] == [np.mean(image_ranks <= k) for k in (1, 5, 10)]
    stored = json.loads((tmp_path / "two.json").read_text())["prefilter"]
    assert stored["bound_text_to_image"] == np.isfinite(of_captions[own, np.arange(len(own))]).mean() < 1
    assert stored["bound_image_to_text"] == np.mean([np.isfinite(of_images[i, own == i]).any() for i in range(len(images))])
    assert stored["pairs"] == chosen.sum() == len(found)
    assert report.both_stages is not None
    logits = stored["scale"] * products
    assert report.both_stages.text_to_image.r_at_5 == np.mean(np.array(brute_force(of_captions + logits, own)[0]) <= 5)
    assert report.both_stages.image_to_text.r_at_5 == np.mean(np.array(brute_force(of_images + logits, own)[1]) <= 5)
    assert f"first stage: {KEEP} candidates each, {chosen.mean():.1%} of all pairs" in capsys.readouterr().out


def test_two_processes_and_a_resumed_run_give_the_same_bits(
    data: tuple[Path, Path, Path], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"split": None, "prefilter": KEEP, "prefilter_model": trained}
    for processes in (1, 2):
        evaluate(*data, output=tmp_path / f"{processes}.json", scores=tmp_path / f"{processes}.parquet", processes=processes, **options)
    calls: list[int] = []
    score = CandidateScorer.score

    def failing(self: CandidateScorer, chunk: int) -> np.ndarray:
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, chunk)

    monkeypatch.setattr(CandidateScorer, "score", failing)
    arguments = options | {"output": tmp_path / "3.json", "scores": tmp_path / "3.parquet", "processes": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate(*data, **arguments)
    partial = tmp_path / ".3.json.partial" / "scores.f32"
    assert partial.stat().st_size == 4 * len(scored(tmp_path / "1.parquet")) < 4 * IMAGES**2 * CAPTIONS
    evaluate(*data, **arguments)
    assert calls == [0, 1, 1, 2, 3, 4]
    assert scored(tmp_path / "1.parquet") == scored(tmp_path / "2.parquet") == scored(tmp_path / "3.parquet")


@pytest.mark.parametrize("fault", ["vocabulary_digest", "feature_size", "hidden_size", "unknown", "format", "no file", "cut"])
def test_a_prefilter_that_does_not_fit_is_refused(data: tuple[Path, Path, Path], trained: Path, tmp_path: Path, fault: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "prefilter")
    settings = json.loads((folder / "prefilter.json").read_text())
    changed = {"vocabulary_digest": "0" * 64, "feature_size": 99, "hidden_size": 7, "unknown": 1, "format": 2}
    if fault == "no file":
        (folder / "prefilter.json").unlink()
    elif fault == "cut":
        weights = folder / "prefilter.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (folder / "prefilter.json").write_text(json.dumps(settings | {fault: changed[fault]}))
    texts = {"vocabulary_digest": "another vocabulary", "feature_size": "takes features of 99 numbers", "no file": "is no prefilter"}
    text = texts.get(fault, "train the prefilter again")
    with pytest.raises(UsageError, match=text) as caught:
        evaluate(*data, output=tmp_path / "out.json", split=None, prefilter=KEEP, prefilter_model=folder)
    assert "\n" not in str(caught.value)
    assert PrefilterSettings(**settings).format == 1


@pytest.mark.parametrize("sizes", [{}, {"itc_regions": "mean_feature", "itm_similarity": True}], ids=["states", "feature"])
def test_a_model_with_vectors_is_its_own_first_stage(sizes: dict[str, Any], tmp_path: Path) -> None:
    pairs, path = write_data(tmp_path, images=IMAGES, captions=CAPTIONS)
    folder = write_model(tmp_path / "model", pairs, itc_size=8, **sizes)
    report = evaluate(folder, pairs, path, output=tmp_path / "out.json", split="train", prefilter=KEEP, scores=tmp_path / "scores.parquet")

    store, model = FeatureStore(path), InterBertForRetrieval.from_pretrained(folder).eval()
    gallery = read_gallery(pairs, store, "train", None, None)
    texts = model.encode_texts(gallery.texts())
    images = model.encode_images([store[image_id] for image_id in gallery.image_ids])
    chosen = choose_candidates(texts, images, KEEP)
    ranks = rank_candidates(chosen, gallery.image_of_caption, chosen.images.scores, chosen.captions.scores)
    assert report.prefilter is not None
    assert report.prefilter.text_to_image.r_at_1 == (ranks.caption_ranks == 1).mean()
    assert (report.prefilter.model, report.prefilter.model_digest) == (str(folder), report.model_digest)
    assert report.prefilter.pairs == len(chosen.keys) == len(scored(tmp_path / "scores.parquet"))
    assert report.both_stages is not None
    assert report.prefilter.scale == pytest.approx(1 / 0.07, rel=1e-6)
    assert (report.both_stages.weight, report.both_stages.temperature) == (1, 1)

    # What it learned of both stages is used for their sum.
    facts = Learned(0.25, 3.0, report.model_digest, "pairs", "val", 10, 20, KEEP)
    write_json(folder / FILE, asdict(facts))
    again = evaluate(folder, pairs, path, output=tmp_path / "again.json", split="train", prefilter=KEEP)
    assert again.both_stages is not None
    assert (again.both_stages.weight, again.both_stages.temperature) == (0.25, 3)
    by_pair, numbers = scored(tmp_path / "scores.parquet"), np.arange(len(gallery.rows))
    ids = [gallery.pairs.pair_id(int(row)) for row in gallery.rows]
    second = np.array([[by_pair[ids[c], gallery.image_ids[i]] for i in chosen.images.numbers[c]] for c in numbers])
    total = second + 0.25 / 0.07 * chosen.images.scores
    right = chosen.images.numbers == gallery.image_of_caption[:, None]
    ahead = (total > np.where(right, total, np.inf).min(1, keepdims=True)).sum(1)
    assert again.both_stages.text_to_image.r_at_1 == ((ahead == 0) & right.any(1)).mean()
    assert again.text_to_image == report.text_to_image


def test_a_model_by_its_name_is_its_own_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, path = write_data(tmp_path, images=IMAGES, captions=CAPTIONS)
    folder = write_model(tmp_path / "model", pairs, itc_size=8)
    by_path = evaluate(folder, pairs, path, output=tmp_path / "path.json", split="train", prefilter=KEEP)
    with serve(Hub(files={"team/interbert": {file.name: file.read_bytes() for file in folder.iterdir()}})) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        by_name = evaluate(Path("hf:team/interbert"), pairs, path, output=tmp_path / "name.json", split="train", prefilter=KEEP)
    assert by_name.prefilter is not None
    assert by_path.prefilter is not None
    assert by_name.prefilter.model == f"hf:team/interbert@{COMMIT}"
    assert by_name.prefilter.text_to_image == by_path.prefilter.text_to_image
    assert (by_name.text_to_image, by_name.both_stages) == (by_path.text_to_image, by_path.both_stages)


def test_options_that_cannot_be_are_one_clear_line(data: tuple[Path, Path, Path], trained: Path, tmp_path: Path) -> None:
    cases = [("has no vectors of its own", {"prefilter": 20}), ("give --prefilter", {"prefilter_model": trained})]
    cases += [("at least 10", {"prefilter": 9, "prefilter_model": trained})]
    for text, options in cases:
        with pytest.raises(UsageError, match=text):
            evaluate(*data, output=tmp_path / "out.json", split=None, **options)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(UsageError, match="something else in it"):
        finetune(*data, output=tmp_path / "photos")
    with pytest.raises(UsageError, match="--epochs is 0"):
        finetune(*data, output=tmp_path / "out", training=PrefilterTraining(epochs=0))
