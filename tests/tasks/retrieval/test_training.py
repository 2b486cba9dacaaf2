"""Fine-tuning for retrieval: which pairs a caption gets, what they cost, and whole runs in real processes."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megainter.config.reading import read_settings
from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import read_pairs
from megainter.data.text.token_table import build_token_table
from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForRetrieval
from megainter.tasks.contrast import Gathering, add_vectors, answered, compare
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.batches import GroupSettings, RetrievalStream
from megainter.tasks.retrieval.neighbours import build_neighbours, mean_features, nearest_images, open_neighbours
from megainter.tasks.retrieval.objective import RetrievalStep
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.report import RetrievalReport
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.tasks.retrieval.training import finetune as run_retrieval
from megainter.training.arrival import Arrivals
from megainter.training.metrics import read_metrics
from megainter.training.world import World
from tests.synthetic import FEATURE_SIZE, TINY, write_data
from tests.tasks.retrieval.tuning import CONTRAST, Data, arguments, finetune, pretrained

KINDS = {"random_captions": 1, "random_images": 2, "hard_captions": 2, "hard_images": 1}


def evaluate(model: Path, pairs: Path, store: Path, **given: Any) -> RetrievalReport:
    return evaluation.evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, **given))


@pytest.fixture(scope="module")
def stream_of(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("retrieval")
    path, store_path = write_data(folder, images=40, captions=3)
    pairs, store = read_pairs(path, split="train"), FeatureStore(store_path)
    vocabulary = load_vocabulary(train_vocabulary(pairs.table.column("caption").to_pylist(), 60, folder / "vocab.txt"))
    tokens = build_token_table(pairs, vocabulary, 12, folder / "tokens.arrow", progress=False)
    neighbours = nearest_images(mean_features(store, pairs.image_ids, 5), 7)

    def make(rank: int = 0, world: int = 1, listwise: bool = False, micro: int | None = None, **kinds: int) -> RetrievalStream:
        grouping = GroupSettings(3, 24, micro or 24 // world, **(KINDS | kinds))
        return RetrievalStream(pairs, store, tokens, vocabulary.facts, grouping, 5, listwise, neighbours, rank, world)

    return make


def test_pairs_of_a_caption_are_what_the_settings_say(stream_of) -> None:
    stream = stream_of()
    numbers = stream.pairs.image_numbers
    similar, texts = [set(row.tolist()) for row in stream.neighbours], stream.pairs.table.column("caption").to_pylist()
    seen = []
    for step in range(4):  # 96 captions: more than an epoch of 90
        groups = stream.groups(step)
        own_image, own = groups.images[:, 0], groups.captions[:, 0]
        seen += own.tolist()
        assert (numbers[own] == own_image).all()
        assert (numbers[groups.captions[:, 1]] != own_image).all()
        assert (groups.images[:, 1] == own_image[:]).all()
        for column in (2, 3):
            assert (groups.images[:, column] != own_image).all()
            assert (groups.captions[:, column] == own).all()
        for column in (4, 5):
            assert (groups.images[:, column] == own_image).all()
            assert np.mean([numbers[caption] in similar[image] for image, caption in zip(own_image, groups.captions[:, column])]) > 0.9
            assert not any(texts[caption] == texts[row] for row, caption in zip(own, groups.captions[:, column]))  # twins are replaced
        assert np.mean([other in similar[image] for image, other in zip(own_image, groups.images[:, 6])]) > 0.9
    assert sorted(seen[:90]) == list(range(90))  # an epoch shows each caption once
    assert (stream.groups(0).images[:, 2] != stream.groups(0).images[:, 3]).any()


def test_every_rank_has_its_share_of_the_same_pairs(stream_of) -> None:
    alone = stream_of()[1][0]
    parts = [stream_of(rank, 3)[1][0] for rank in range(3)]
    lengths = [batch.inputs.text_lengths.view(-1, batch.group) for batch in (alone, *parts)]
    assert sorted(lengths[0].tolist()) == sorted(torch.cat(lengths[1:]).tolist())
    assert float(alone.inputs.region_features.float().sum()) == pytest.approx(
        float(sum(part.inputs.region_features.double().sum() for part in parts)), rel=1e-3
    )


def test_packed_pairs_hold_the_regions_and_tokens_of_each_pair(stream_of) -> None:
    stream = stream_of()
    groups = stream.groups(0)
    images, captions = groups.images[:3].ravel(), groups.captions[:3].ravel()
    inputs = stream.pack(images, captions)
    regions = inputs.region_features.split(inputs.region_lengths.tolist())
    texts = inputs.input_ids.split(inputs.text_lengths.tolist())
    for image, caption, region, text in zip(images, captions, regions, texts, strict=True):
        stored = stream.store[stream.pairs.image_ids[image]].features[:5]
        assert torch.equal(region[1:], torch.from_numpy(stored.copy()))
        assert np.allclose(region[0], stored.astype(np.float32).mean(0), atol=2e-3)
        assert text[1:-1].tolist() == stream.tokens[int(caption)].tolist()


@pytest.mark.parametrize("listwise", [False, True])
def test_loss_is_the_cross_entropy_of_the_definition(stream_of, listwise: bool) -> None:
    torch.manual_seed(0)
    config = InterBertConfig(vocab_size=60, region_feature_size=FEATURE_SIZE, num_region_classes=8, **TINY)
    model = InterBertForRetrieval(config).eval()
    batch = stream_of(listwise=listwise)[0][0]
    counts = torch.tensor([float(batch.counts()[0])])
    loss, tallies = RetrievalStep(model)(batch, counts)
    logits = model.logits_packed(batch.inputs).double()
    if listwise:
        odds = (logits[:, 0] - logits[:, 1]).view(-1, batch.group)
        expected, right = F.cross_entropy(odds, torch.zeros(len(odds), dtype=torch.long)), (odds.argmax(1) == 0).sum()
    else:
        labels = torch.tensor([0] + [1] * (batch.group - 1)).repeat(len(logits) // batch.group)
        expected, right = F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert tallies[1, 0] == right


def itc_model(**changes: float) -> InterBertForRetrieval:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "region_feature_size": FEATURE_SIZE, "num_region_classes": 8, "itc_size": 12, "initializer_range": 0.1}
    return InterBertForRetrieval(InterBertConfig(**sizes, **TINY, **changes))


def test_sides_of_a_batch_are_its_captions_alone_and_their_images_alone(stream_of) -> None:
    stream, model = stream_of(contrast=True, micro=8), itc_model().eval()
    own = stream.groups(0)
    for batch in stream[0]:
        assert batch.sides is not None
        assert batch.counts() == (8 * batch.group, 8)
        rows = own.captions[batch.sides.places, 0]
        texts, regions, _ = model.vectors_packed(batch.sides.inputs(batch.inputs))
        for place, row in enumerate(rows.tolist()):
            pair = stream.pack(stream.pairs.image_numbers[[row]].astype(np.int64), np.array([row]))
            text, region = (half for half in (pair.input_ids, pair.region_features))
            nothing = torch.zeros(1, dtype=torch.int64)
            alone = replace(pair, region_features=region[:0], region_locations=pair.region_locations[:0], region_lengths=nothing)
            picture = replace(pair, input_ids=text[:0], token_type_ids=text[:0], text_lengths=nothing)
            torch.testing.assert_close(texts[place], model.vectors_packed(alone)[0][0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(regions[place], model.vectors_packed(picture)[1][0], atol=1e-5, rtol=1e-4)
            assert batch.sides.keys[place].tolist()[::2] == [stream.pairs.image_numbers[row], row]


@pytest.fixture
def alone() -> Iterator[World]:
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def test_micro_batches_together_have_the_gradient_of_contrast_over_the_whole_step(stream_of, alone: World) -> None:
    """Against automatic differentiation of one large batch: the loss of a double loop over captions that are rivals."""
    batches, weights = stream_of(contrast=True, micro=8)[0], (1.0, 0.5)
    model = itc_model().eval()
    step, gathering = RetrievalStep(model, weights), Gathering(24, alone)
    add_vectors(gathering, step, Arrivals(alone.device), batches, lambda micro: None)
    counts = torch.tensor([batch.counts() for batch in batches]).sum(0).float()
    parts = [step(batch, counts) for batch in answered(batches, compare(gathering.all()))]
    loss = torch.stack([share for share, _ in parts]).sum()
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    texts, regions, scale = (torch.cat(part) for part in zip(*(model.vectors_packed(b.sides.inputs(b.inputs)) for b in batches)))
    keys, judged = torch.cat([b.sides.keys for b in batches]), [RetrievalStep(model)(b, counts[:1])[0] for b in batches]
    contrast = torch.zeros(())
    for i in range(24):
        rivals = [j for j in range(24) if j == i or (keys[j, 0] != keys[i, 0] and keys[j, 1] != keys[i, 1])]
        for asking, answering in ((texts, regions), (regions, texts)):
            logits = scale[0].exp() * answering[rivals] @ asking[i]
            contrast = contrast + (logits.logsumexp(0) - logits[rivals.index(i)]) / 48
    expected = sum(judged) + 0.5 * contrast
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(expected, list(model.parameters()), allow_unused=True), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-3)


def test_nearest_images_against_brute_force() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((50, 6)).astype(np.float32)
    features[7] = features[3]  # twins: an image is never its own neighbour
    found = nearest_images(features, 5)
    for number in range(50):
        distances = ((features - features[number]) ** 2).sum(1)
        distances[number] = np.inf
        assert number not in found[number]
        assert np.allclose(np.sort(distances)[:5], distances[found[number]], atol=1e-5)


@pytest.mark.parametrize("harm", ["flip", "cut", "description", "nothing"])
def test_similar_images_that_were_harmed_are_found_anew(harm: str, tmp_path: Path) -> None:
    manifest, path = write_data(tmp_path, images=20)
    pairs, store, folder = read_pairs(manifest), FeatureStore(path), tmp_path / "cache" / "neighbours"
    expected = nearest_images(mean_features(store, pairs.image_ids, 5), 4)
    key = build_neighbours(pairs, store, 5, 4, folder)
    made = (folder / "neighbours").stat().st_mtime_ns
    content = bytearray((folder / "neighbours").read_bytes())
    content[5] ^= 1
    if harm == "flip":
        (folder / "neighbours").write_bytes(content)
    elif harm == "cut":
        (folder / "neighbours").write_bytes(content[:-4])
    elif harm == "description":
        (folder / "index.json").write_text((folder / "index.json").read_text().replace('"each": 4', '"each": 2'))
    assert build_neighbours(pairs, store, 5, 4, folder) == key
    assert np.array_equal(open_neighbours(folder, key), expected)
    assert (made == (folder / "neighbours").stat().st_mtime_ns) == (harm == "nothing")
    assert build_neighbours(pairs, store, 5, 3, folder) != key  # of another number of them
    assert open_neighbours(folder, build_neighbours(pairs, store, 5, 3, folder)).shape == (20, 3)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("start")
    pairs, store = write_data(folder, images=48)
    return pretrained(folder, pairs, store, training__steps=30)


def test_runs_agree_over_processes_and_the_folder_scores_as_validated(start: Data, tmp_path: Path) -> None:
    alone = finetune(arguments(start, tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    both = finetune(arguments(start, tmp_path / "two", engine__zero_stage=3), processes=2)
    assert both.returncode == 0, both.stderr
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("one", "two"))
    assert [record["matching_loss"] for record in one] == pytest.approx([record["matching_loss"] for record in two], abs=1e-4)
    assert one[-1]["matching_loss"] < one[0]["matching_loss"]
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl", "validation") for name in ("one", "two"))
    for name in ("text_to_image_r_at_1", "text_to_image_r_at_5", "image_to_text_r_at_1"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], abs=0.09)  # one caption of 12
    best = max(record["text_to_image_r_at_1"] for record in one)
    model, pairs, store = tmp_path / "one" / "model", *start[1:]
    options = {"split": "val", "captions_per_image": 1, "processes": 1, "precision": "fp32"}
    report = evaluate(model, pairs, store, output=tmp_path / "scores.json", **options)
    assert report.text_to_image.r_at_1 == best  # of the averaged weights
    state = json.loads(next((tmp_path / "one" / "best").glob("step_*/trainer.json")).read_text())
    assert state["validation"]["text_to_image_r_at_1"] == best


def test_a_stopped_run_goes_on_bit_equal(start: Data, tmp_path: Path) -> None:
    changes = {"validation__every_steps": 0, "training__ema_decay": 0.9999}  # the average's window grows with the run
    whole = finetune(arguments(start, tmp_path / "whole", **changes))
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_0000024")
    shutil.rmtree(tmp_path / "part" / "best")
    again = finetune(arguments(start, tmp_path / "part", **changes))
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    for name in ("weights", "exp_avg", "ema"):
        last = [tmp_path / run / "checkpoints" / "step_0000024" for run in ("whole", "part")]
        first, second = (next(folder.glob(f"{name}-*")).read_bytes() for folder in last)
        assert first == second, name


@pytest.fixture(scope="module")
def seeing_start(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A model that was pretrained with contrast."""
    folder = tmp_path_factory.mktemp("seeing")
    pairs, store = write_data(folder, images=48)
    return pretrained(folder, pairs, store, **CONTRAST)


@pytest.fixture(scope="module")
def featured_start(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """The same, its vectors of images those of the whole image's feature, standardized, as in flickr8k-contrastive."""
    folder = tmp_path_factory.mktemp("featured")
    pairs, store = write_data(folder, images=48)
    of_features = {"model__itc_regions": "first_feature", "model__standardize_regions": "true"}
    return pretrained(folder, pairs, store, **CONTRAST, **of_features)


@pytest.mark.slow
def test_vectors_are_trained_further_alike_over_processes_and_stages(seeing_start: Data, tmp_path: Path) -> None:
    runs = {"one": (1, 1), "two": (2, 3), "three": (3, 2)}
    for name, (processes, stage) in runs.items():
        given = {"engine__zero_stage": stage, "training__micro_batch": 2, "training__global_batch": 12, "training__log_every": 1}
        done = finetune(arguments(seeing_start, tmp_path / name, **given), processes)
        assert done.returncode == 0, done.stderr
    one, *others = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in runs)
    for other in others:
        for name in ("matching_loss", "itc_loss", "itc_accuracy"):
            assert [record[name] for record in one] == pytest.approx([record[name] for record in other], abs=1e-4), name
    falls = [record["itc_loss"] for record in one]
    assert np.mean(falls[-6:]) < np.mean(falls[:6])
    assert one[0]["loss"] == pytest.approx(one[0]["matching_loss"] + one[0]["itc_loss"], rel=1e-6)


@pytest.mark.slow
def test_the_tuned_folder_is_its_own_first_stage(seeing_start: Data, tmp_path: Path) -> None:
    before = InterBertForRetrieval.from_pretrained(seeing_start[0]).itc_head
    for name, weight in (("kept", "none"), ("left", 0)):
        done = finetune(arguments(seeing_start, tmp_path / name, training__itc_weight=weight))
        assert done.returncode == 0, done.stderr
    model = InterBertForRetrieval.from_pretrained(tmp_path / "kept" / "model")
    assert model.config.itc_size == 12
    assert not torch.equal(model.itc_head.text.weight, before.text.weight)
    report = evaluate(tmp_path / "kept" / "model", *seeing_start[1:], output=tmp_path / "s.json", split="val", prefilter=10, processes=1)
    assert report.prefilter is not None
    assert report.prefilter.model_digest == report.model_digest
    assert InterBertForRetrieval.from_pretrained(tmp_path / "left" / "model").itc_head is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "begun"), [("itm_similarity", "seeing_start"), ("itm_vectors", "seeing_start"), ("itm_vectors", "featured_start")]
)
def test_nearness_is_added_to_a_start_with_vectors_alike_over_processes(
    part: str, begun: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seeing_start: Data = request.getfixturevalue(begun)
    for name, processes, stage in (("one", 1, 1), ("two", 2, 3)):
        given = {f"model__{part}": "true", "engine__zero_stage": stage, "training__micro_batch": 2, "training__log_every": 1}
        done = finetune(arguments(seeing_start, tmp_path / name, **given), processes)
        assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl", "train") for name in ("one", "two"))
    for name in ("matching_loss", "itc_loss"):
        assert [record[name] for record in one] == pytest.approx([record[name] for record in two], abs=1e-4), name
    model = InterBertForRetrieval.from_pretrained(tmp_path / "two" / "model")
    assert getattr(model, part).margin.item() != pytest.approx(0.3, abs=1e-6), "it was not trained"

    refused = finetune(arguments((tmp_path / "one" / "model", *seeing_start[1:]), tmp_path / "left", training__itc_weight=0))
    assert refused.returncode == 2
    assert f"model.{part} false" in refused.stderr
    again = {"training__itc_weight": 0, f"model__{part}": "false"}
    done = finetune(arguments((tmp_path / "one" / "model", *seeing_start[1:]), tmp_path / "left", **again))
    assert done.returncode == 0, done.stderr
    assert getattr(InterBertForRetrieval.from_pretrained(tmp_path / "left" / "model"), part) is None


@pytest.mark.slow
def test_a_start_without_vectors_gets_fresh_ones_where_they_are_asked_for(start: Data, tmp_path: Path) -> None:
    done = finetune(arguments(start, tmp_path / "run", training__itc_weight=0.5, model__itc_size=8, training__log_every=1))
    assert done.returncode == 0, done.stderr
    record = read_metrics(tmp_path / "run" / "metrics.jsonl", "train")[0]
    assert record["loss"] == pytest.approx(record["matching_loss"] + 0.5 * record["itc_loss"], rel=1e-6)
    assert InterBertForRetrieval.from_pretrained(tmp_path / "run" / "model").itc_head.text.weight.shape[0] == 8


def test_mistakes_end_in_one_line(start: Data, tmp_path: Path) -> None:
    nothing = {"data__random_captions": 0, "data__random_images": 0, "data__hard_captions": 0}
    for changes, words in (
        (nothing, "its own pair alone"),
        ({"data__objective": "pairwise"}, "objective"),
        ({"data__random_imags": 1}, "did you mean data.random_images"),
    ):
        with pytest.raises(UsageError, match=words):
            run_retrieval(read_settings(RetrievalConfig, None, list(map(str, arguments(start, tmp_path / "run", **changes)))))
    done = finetune(arguments(start, tmp_path / "run", model__start_from=tmp_path))
    assert done.returncode == 2, done.stderr
    assert "config.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()
