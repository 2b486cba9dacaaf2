"""The stream of packed micro-batches: the same samples at every world size, each once per epoch, resumable at any step."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.matching import drop_missing
from megainter.data.stream.loader import make_loader
from megainter.data.stream.negatives import HardNegatives
from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.data.text.token_table import TokenTable, build_token_table
from megainter.data.text.vocabulary import VocabularyFacts, load_vocabulary, train_vocabulary
from megainter.errors import DamagedError, UsageError
from megainter.tasks.pretraining.batches import PretrainBatch, PretrainStream, collate, combined_digest, validation_batches
from megainter.tasks.pretraining.sampling import Sampler, Samples, StreamSettings
from tests.places import ROOT

IMAGES, CAPTIONS_EACH, FEATURES, CLASSES = 31, 2, 24, 7
WORDS = ["red", "black", "small", "apple", "cat", "dog", "house", "tree", "above", "below", "left", "of", "the", "a", "two", "three"]
SETTINGS = StreamSettings(seed=5, global_batch=24, micro_batch=2, max_regions=6)


@dataclass(frozen=True)
class Data:
    folder: Path
    pairs: Pairs
    store: FeatureStore
    tokens: TokenTable
    facts: VocabularyFacts

    def stream(self, settings: StreamSettings = SETTINGS, rank: int = 0, world_size: int = 1) -> PretrainStream:
        return PretrainStream(Sampler(self.pairs, self.store, self.tokens, self.facts, settings), rank, world_size)


def region_record(rng: np.random.Generator) -> RegionRecord:
    count = int(rng.integers(1, 10))
    corners, sizes = rng.uniform(0, 150, (count, 2)), rng.uniform(10, 150, (count, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    features = rng.uniform(0.5, 3, (count, FEATURES)).astype(np.float16)
    return RegionRecord(boxes, features, rng.dirichlet(np.ones(CLASSES), count).astype(np.float32), 320, 300)


def build(folder: Path, images: int = IMAGES) -> Data:
    rng = np.random.default_rng(0)
    names = ("__background__", *(f"class {i}" for i in range(1, CLASSES)))
    with FeatureStoreWriter(folder / "store", StoreSchema(FEATURES, CLASSES, names, "test")) as writer:
        for i in range(images):
            writer.add(f"image {i}", region_record(rng))
    seal_store(folder / "store")
    captions = [" ".join(rng.choice(WORDS, rng.integers(3, 14))) for _ in range(images * CAPTIONS_EACH)]
    rows = [Pair(f"pair {i}", f"image {i % images}", f"{i % images}.jpg", caption) for i, caption in enumerate(captions)]
    write_pairs(folder / "pairs.parquet", rows)
    pairs = read_pairs(folder / "pairs.parquet")
    vocabulary = load_vocabulary(train_vocabulary(captions, 80, folder / "vocab.txt"))
    tokens = build_token_table(pairs, vocabulary, 12, folder / "tokens.arrow", progress=False)
    return Data(folder, pairs, FeatureStore(folder / "store"), tokens, vocabulary.facts)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return build(tmp_path_factory.mktemp("stream"))


def together(stream: PretrainStream, places: list[tuple[int, int]]) -> Samples:
    """Samples of the stream by (epoch, number)."""
    epochs, numbers = np.array(places).T
    return stream.sampler.samples(stream.sampler.draws(epochs, numbers), np.arange(len(places)))


def flat(batch: PretrainBatch) -> list[torch.Tensor]:
    inputs = batch.inputs
    return [
        inputs.input_ids, inputs.token_type_ids, inputs.text_lengths, inputs.region_features, inputs.region_locations,
        inputs.region_lengths, batch.msm_positions, batch.msm_labels, batch.mrm_positions, batch.mrm_targets, batch.itm_labels,
    ]  # fmt: skip


def equal(one: list[PretrainBatch], other: list[PretrainBatch]) -> bool:
    pairs = zip(itertools.chain(*map(flat, one)), itertools.chain(*map(flat, other)), strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def contents(batches: list[PretrainBatch]) -> Counter[bytes]:
    """Every sample of the batches, cut out again, as bytes of all that the model and the losses see of it."""
    found: Counter[bytes] = Counter()
    for batch in batches:
        t = r = 0
        for s, (text, regions) in enumerate(zip(batch.inputs.text_lengths.tolist(), batch.inputs.region_lengths.tolist(), strict=True)):
            spoken = (batch.msm_positions >= t) & (batch.msm_positions < t + text)
            seen = (batch.mrm_positions >= r) & (batch.mrm_positions < r + regions)
            parts = [
                batch.inputs.input_ids[t : t + text], batch.msm_positions[spoken] - t, batch.msm_labels[spoken],
                batch.inputs.region_features[r : r + regions], batch.inputs.region_locations[r : r + regions],
                batch.mrm_positions[seen] - r, batch.mrm_targets[seen], batch.itm_labels[s],
            ]  # fmt: skip
            found[b"|".join(part.numpy().tobytes() for part in parts)] += 1
            t, r = t + text, r + regions
        assert t == len(batch.inputs.input_ids)
        assert r == len(batch.inputs.region_features)
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_stream_is_the_same_at_every_world_size(data: Data, world_size: int) -> None:
    alone = data.stream()
    ranks = [data.stream(rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 2, 7):  # step 2 crosses into the second epoch: 62 samples an epoch, 24 a step
        shares = [stream[step] for stream in ranks]
        assert [len(share) for share in shares] == [12 // world_size] * world_size
        assert all(len(batch.itm_labels) == 2 for share in shares for batch in share)
        assert contents(list(itertools.chain(*shares))) == contents(alone[step])
        digests = list(itertools.chain(*(stream.sample_digests(step) for stream in ranks)))
        assert combined_digest(digests) == ranks[-1].digest(step) == alone.digest(step) == combined_digest(alone.sample_digests(step))
    assert len({alone.digest(step) for step in range(8)}) == 8


def test_ranks_carry_nearly_equal_loads(data: Data) -> None:
    ranks = [data.stream(replace(SETTINGS, global_batch=48, micro_batch=8), rank, 3) for rank in range(3)]
    loads = np.array([[batch.tokens() for batch in stream[0]] for stream in ranks])
    assert np.ptp(loads.sum(axis=1)) <= 0.06 * loads.sum(axis=1).mean()


def test_each_caption_once_per_epoch_in_a_new_order(data: Data) -> None:
    stream = data.stream()
    size = len(data.pairs)
    steps = [stream.draws(step) for step in range(2 * size // 24 + 1)]
    epochs, rows = (np.concatenate([getattr(draws, name) for draws in steps])[: 2 * size] for name in ("epochs", "rows"))
    assert epochs.tolist() == [0] * size + [1] * size
    assert sorted(rows[:size].tolist()) == sorted(rows[size:].tolist()) == list(range(size))
    assert (rows[:size] == rows[size:]).mean() < 0.2
    assert (rows[:size] != np.arange(size)).any()


def test_a_step_may_hold_several_epochs(data: Data) -> None:
    draws = data.stream(replace(SETTINGS, global_batch=200, micro_batch=10)).draws(1)
    assert draws.epochs.tolist() == [(200 + i) // 62 for i in range(200)]
    single = data.stream()
    for i in (0, 60, 199):
        sample = single.sample(int(draws.epochs[i]), int(draws.numbers[i]))
        assert (sample.row, sample.caption_row, sample.itm_label) == (draws.rows[i], draws.caption_rows[i], draws.itm_labels[i])


def test_a_batch_says_what_its_samples_are(data: Data) -> None:
    """Rebuilt sample by sample from the store and the captions, in the plainest way."""
    stream = data.stream()
    for n in range(40):
        sample = stream.sample(1, n)
        batch = collate(together(stream, [(0, 3), (1, n)]), SETTINGS)
        t, r = int(batch.inputs.text_lengths[0]), int(batch.inputs.region_lengths[0])
        record = data.store[data.pairs.image_id(sample.row)]
        count = min(len(record.boxes), 6)
        assert int(batch.inputs.region_lengths[1]) == count + 1
        features = torch.tensor(record.features[:count].astype(np.float32))
        features[torch.from_numpy(sample.masked)] = 0
        packed = batch.inputs.region_features[r:].float()
        assert torch.equal(packed[1:], features)
        assert torch.allclose(packed[0], features.sum(0) / count, rtol=1e-3, atol=1e-6)  # mean after masking, in half precision
        x1, y1, x2, y2 = torch.tensor(record.boxes[:count]).T
        places = torch.stack([x1 / 320, y1 / 300, x2 / 320, y2 / 300, (x2 - x1) * (y2 - y1) / (320 * 300)], dim=1)
        assert torch.allclose(batch.inputs.region_locations[r + 1 :], places, atol=1e-6)
        assert batch.inputs.region_locations[r].tolist() == [0, 0, 1, 1, 1]
        ids = batch.inputs.input_ids[t:].clone()
        assert ids[0] == data.facts.cls_id
        assert ids[-1] == data.facts.sep_id
        spoken = batch.msm_positions >= t
        ids[batch.msm_positions[spoken] - t] = batch.msm_labels[spoken]
        assert ids[1:-1].tolist() == data.tokens[sample.caption_row].tolist()
        assert (data.pairs.image_id(sample.caption_row) == data.pairs.image_id(sample.row)) == (sample.itm_label == 0)
        seen = batch.mrm_positions >= r
        if sample.itm_label:
            assert not seen.any()
        else:
            assert (batch.mrm_positions[seen] - r - 1).tolist() == np.flatnonzero(sample.masked).tolist()
            assert torch.equal(batch.mrm_targets[seen], torch.from_numpy(record.class_probs[:count][sample.masked]))
        assert int(batch.itm_labels[1]) == sample.itm_label
        assert not batch.inputs.token_type_ids.any()


def test_dtypes_and_counts(data: Data) -> None:
    batch = data.stream()[0][0]
    dtypes = [tensor.dtype for tensor in flat(batch)]
    long, half, single = torch.int64, torch.float16, torch.float32
    assert dtypes == [long, long, long, half, single, long, long, long, long, single, long]
    assert batch.counts() == (len(batch.msm_labels), len(batch.mrm_targets), 2)
    assert batch.tokens() == int(batch.inputs.text_lengths.sum() + batch.inputs.region_lengths.sum())
    assert equal([batch.to("cpu")], [batch])


def test_a_step_is_pinned_tensor_by_tensor(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch's loader does with a step where CUDA is there; page-locking itself needs the device, so it is noted and not done."""
    pinned: list[int] = []

    def noted(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", noted)
    step = data.stream()[0]
    result = torch_pin_memory(step)
    lengths = {id(length) for batch in step for length in (batch.inputs.text_lengths, batch.inputs.region_lengths)}
    assert equal(result, step)
    assert set(pinned) == {id(tensor) for batch in step for tensor in flat(batch)} - lengths
    error = DamagedError("a record is damaged")
    assert torch_pin_memory(error) is error


def test_feature_objective_targets_are_unmasked_features(data: Data) -> None:
    settings = replace(SETTINGS, region_objective="feature", masking="paper")
    stream = data.stream(settings)
    samples = [stream.sample(0, n) for n in range(20)]
    batch = collate(together(stream, [(0, n) for n in range(20)]), settings)
    expected = [s.features[s.masked] for s in samples if not s.itm_label]
    assert np.array_equal(batch.mrm_targets.numpy(), np.concatenate(expected).astype(np.float32))
    assert len(batch.mrm_targets) > 0
    assert (batch.inputs.region_features[batch.mrm_positions] == 0).all()


def test_gate_leaves_mismatched_captions_unscored(data: Data) -> None:
    samples = together(data.stream(), [(0, n) for n in range(40)])
    open_batch, gated = (collate(samples, replace(SETTINGS, gate_msm=gate)) for gate in (False, True))
    assert torch.equal(open_batch.inputs.input_ids, gated.inputs.input_ids)
    starts = open_batch.inputs.text_lengths.cumsum(0) - open_batch.inputs.text_lengths
    owner = torch.searchsorted(starts, open_batch.msm_positions, right=True) - 1
    matched = open_batch.itm_labels[owner] == 0
    assert torch.equal(gated.msm_positions, open_batch.msm_positions[matched])
    assert not matched.all()


@pytest.mark.parametrize("masking", ["official", "paper", "bert"])
def test_conditional_masking_masks_one_side_of_a_sample(data: Data, masking: str) -> None:
    """The side that is masked is masked as ever, the other is what was read; each has its turn half of the time."""
    settings = replace(SETTINGS, masking=masking)
    both, one = data.stream(settings), data.stream(replace(settings, conditional_masking=True))
    turns = []
    for n in range(1200):
        usual, sample = both.sample(n // 62, n % 62), one.sample(n // 62, n % 62)
        same_text, same_regions = np.array_equal(sample.ids, usual.ids), np.array_equal(sample.zeroed, usual.zeroed)
        assert (sample.row, sample.caption_row, sample.itm_label) == (usual.row, usual.caption_row, usual.itm_label)
        assert (same_text and not sample.masked.any()) or (same_regions and not len(sample.msm_positions))
        if not len(sample.msm_positions):
            assert sample.ids[1:-1].tolist() == data.tokens[sample.caption_row].tolist()
        if usual.masked.any() and len(usual.msm_positions):
            turns.append(bool(sample.masked.any()))
    assert abs(np.mean(turns) - 0.5) < 5 * 0.5 / np.sqrt(len(turns))


@pytest.mark.parametrize("side", ["text", "regions"])
def test_a_side_that_is_not_masked_leaves_everything_else_as_it_was(data: Data, side: str) -> None:
    usual, other = data.stream(), data.stream(replace(SETTINGS, **{f"mask_{side}": False}))
    for n in range(124):
        before, sample = usual.sample(n // 62, n % 62), other.sample(n // 62, n % 62)
        assert (sample.row, sample.caption_row, sample.itm_label) == (before.row, before.caption_row, before.itm_label)
        if side == "text":
            assert sample.ids[1:-1].tolist() == data.tokens[sample.caption_row].tolist()
            assert len(sample.msm_positions) == 0
            assert np.array_equal(sample.masked, before.masked)
            assert np.array_equal(sample.zeroed, before.zeroed)
        else:
            assert not sample.masked.any()
            assert not sample.zeroed.any()
            assert np.array_equal(sample.ids, before.ids)


@pytest.mark.parametrize("masking", ["official", "paper", "bert"])
@pytest.mark.parametrize("conditional", [False, True])
def test_samples_made_together_are_those_made_alone(data: Data, masking: str, conditional: bool) -> None:
    sampler = data.stream(replace(SETTINGS, masking=masking, conditional_masking=conditional)).sampler
    draws = sampler.draws(np.arange(100) // 62, np.arange(100) % 62)
    places = np.random.default_rng(0).permutation(100)
    assert list(sampler.samples(draws, places[:0])) == []
    for first, end in ((0, 1), (1, 3), (3, 40), (40, 100)):
        made = sampler.samples(draws, places[first:end])
        assert len(made) == end - first
        for i, sample in zip(places[first:end].tolist(), made, strict=True):
            alone = sampler.sample(draws, i)
            for name, value in vars(alone).items():
                other = getattr(sample, name)
                assert np.array_equal(value, other), name
                assert getattr(value, "dtype", None) == getattr(other, "dtype", None), name
            assert sampler.digest(sample) == sampler.digest(alone)


def test_a_step_of_conditional_masking_has_counts_and_targets_that_fit(data: Data) -> None:
    for batch in data.stream(replace(SETTINGS, conditional_masking=True))[0]:
        assert len(batch.msm_positions) == len(batch.msm_labels)
        assert len(batch.mrm_positions) == len(batch.mrm_targets)
        assert batch.counts()[2] == 2


def test_hard_negatives_enter_the_stream_by_their_share(data: Data) -> None:
    size = len(data.pairs)
    lists = [[(row + 1) % size] for row in range(size)]  # the next image's caption
    hard = HardNegatives(np.arange(size + 1), np.array(lists, np.int32).ravel(), {})
    settings = replace(SETTINGS, global_batch=2400, hard_negative_share=0.5)
    plain, mixed = (PretrainStream(Sampler(data.pairs, data.store, data.tokens, data.facts, settings, one)) for one in (None, hard))
    usual, draws = plain.draws(0), mixed.draws(0)
    assert (usual.itm_labels == draws.itm_labels).all()
    changed = usual.caption_rows != draws.caption_rows
    assert (draws.caption_rows[changed] == (draws.rows[changed] + 1) % size).all()
    mismatched = draws.itm_labels.sum()
    assert abs(changed.sum() / mismatched - 0.5) < 5 * 0.5 / np.sqrt(mismatched) + 2 / size
    short = HardNegatives(np.arange(3), np.array([1, 0], np.int32), {})
    with pytest.raises(UsageError, match="hard negatives are for 2 captions, the pairs are 62"):
        PretrainStream(Sampler(data.pairs, data.store, data.tokens, data.facts, SETTINGS, short))


@pytest.mark.parametrize("counts", [[0], [0, 3, 0], [2, 0, 0, 1]])
def test_an_image_without_regions_gives_no_nan(data: Data, counts: list[int]) -> None:
    """No store holds such a record; what is read of these is cut to so many regions."""
    samples = together(data.stream(), [(0, n) for n in range(len(counts))])
    regions, kept = samples.regions, np.zeros(len(samples.masked), np.bool_)
    begins = np.cumsum(regions.counts) - regions.counts
    cuts = np.minimum(counts, regions.counts)
    for begin, cut in zip(begins.tolist(), cuts.tolist(), strict=True):
        kept[begin : begin + cut] = True
    regions.counts, regions.boxes = cuts, regions.boxes[kept]
    batch = collate(replace(samples, masked=samples.masked[kept], zeroed=samples.zeroed[kept], scored=samples.scored[kept]), SETTINGS)
    starts, ends = np.cumsum(cuts + 1) - (cuts + 1), np.cumsum(cuts)
    assert batch.inputs.region_lengths.tolist() == (cuts + 1).tolist()
    assert torch.isfinite(batch.inputs.region_features).all()
    for start, end, cut in zip(starts.tolist(), ends.tolist(), cuts.tolist(), strict=True):
        assert (batch.inputs.region_features[start] == 0).all() == samples.zeroed[kept][end - cut : end].all()  # also where there is none
        assert batch.inputs.region_locations[start].tolist() == [0, 0, 1, 1, 1]
    assert batch.mrm_targets.shape[1] == CLASSES


def test_reading_does_not_change_the_store(data: Data) -> None:
    before = [data.store[f"image {i}"] for i in range(IMAGES)]
    stream = data.stream(replace(SETTINGS, masking="paper"))
    first = [stream[step] for step in range(4)]
    assert all(equal(a, stream[step]) for step, a in enumerate(first))
    assert all(np.array_equal(a.features, data.store[f"image {i}"].features) for i, a in enumerate(before))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_loader_equals_indexing_and_resumes_anywhere(data: Data, workers: int) -> None:
    stream = data.stream(replace(SETTINGS, global_batch=8, micro_batch=4))
    direct = [stream[step] for step in range(10)]
    with make_loader(stream, 0, 10, workers) as loader:
        assert len(loader) == 10
        whole = list(loader)
    tail = list(make_loader(stream, 6, 10, workers))
    assert len(whole) == 10
    assert all(equal(a, b) for a, b in zip(whole, direct, strict=True))
    assert len(tail) == 4
    assert all(equal(a, b) for a, b in zip(tail, direct[6:], strict=True))
    assert list(make_loader(stream, 10, 10, workers)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_error_in_a_worker_arrives_as_one_line(tmp_path: Path, workers: int) -> None:
    data = build(tmp_path, images=4)
    stream = data.stream(replace(SETTINGS, global_batch=4))
    shard = next((tmp_path / "store").glob("shard-*.lmdb"))
    target = shard / "data.mdb" if shard.is_dir() else shard
    content = bytearray(target.read_bytes())
    for i in range(IMAGES):
        at = content.find(data.store[f"image {i}"].features.tobytes()) if i < 4 else -1
        if at >= 0:
            content[at] ^= 0xFF
    target.write_bytes(bytes(content))
    with pytest.raises(DamagedError) as raised:
        list(make_loader(stream, 0, 3, workers))
    assert "\n" not in str(raised.value)
    assert "image" in str(raised.value)


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from tests.tasks.pretraining.test_batches import SETTINGS, Data
from megainter.data.stream.loader import make_loader
from megainter.tasks.pretraining.batches import PretrainStream
from megainter.tasks.pretraining.sampling import Sampler
from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import read_pairs
from megainter.data.text.token_table import open_token_table
from megainter.data.text.vocabulary import load_vocabulary
folder, key = Path(sys.argv[1]), sys.argv[2]
pairs, facts = read_pairs(folder / "pairs.parquet"), load_vocabulary(folder / "vocab.txt").facts
stream = PretrainStream(Sampler(pairs, FeatureStore(folder / "store"), open_token_table(folder / "tokens.arrow", key), facts, SETTINGS))
signal.signal(signal.SIGTERM, lambda *_: None)
loader = make_loader(stream, 0, 1000, 2)
next(loader)
import multiprocessing
print(*(p.pid for p in multiprocessing.active_children()), flush=True)
"""


def start(data: Data, ending: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A trainer with two loader workers; returns it and the workers' process ids."""
    command = [sys.executable, "-c", SCRIPT + ending, str(data.folder), data.tokens.key]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_workers_ignore_sigterm_and_die_with_a_killed_trainer(data: Data) -> None:
    process, workers = start(data, "time.sleep(60)")
    try:
        assert len(workers) == 2
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        assert all(alive(pid) for pid in workers)
        process.kill()
        assert gone(workers, 5)
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("inside", ["next(loader)", pytest.param("time.sleep(0.01)", marks=pytest.mark.slow)])
def test_a_killed_worker_is_told_in_one_line_wherever_the_trainer_is(data: Data, inside: str) -> None:
    """By SIGKILL, as where memory runs out; the other worker, which ignores SIGTERM, does not keep the trainer from its end."""
    ending = f"""
from megainter.errors import MegainterError
try:
    with loader:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        while True:
            {inside}
except MegainterError as error:
    print(error, flush=True)
"""
    process, workers = start(data, ending)
    try:
        told, _ = process.communicate(timeout=30)
        assert told.startswith("a loader process was killed by SIGKILL, as the system does where memory is short: give data.workers fewer")
        assert told.count("\n") == 1
        assert process.returncode == 0
        assert not any(map(alive, workers))
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_an_unforeseen_error_in_a_worker_ends_the_trainer(data: Data) -> None:
    """The traceback holds torch's iterator and with it the workers, for whom the interpreter would wait at its end."""
    ending = """
class Broken:
    def __getitem__(self, step):
        raise KeyError("nobody foresaw this")
for item in make_loader(Broken(), 0, 1000, 2):
    pass
"""
    process, workers = start(data, ending)
    try:
        assert process.wait(timeout=30) == 1
        assert gone(workers, 5)
    finally:
        process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_trainer_that_leaves_the_loader_open_still_ends(data: Data) -> None:
    process, workers = start(data, "raise SystemExit(7)")
    try:
        assert process.wait(timeout=60) == 7
        assert gone(workers, 5)
    finally:
        process.kill()


@pytest.mark.parametrize(("world_size", "count"), [(1, 20), (2, 21), (3, 23), (4, 2), (4, 500)])
def test_validation_counts_every_sample_once(data: Data, world_size: int, count: int) -> None:
    settings = replace(SETTINGS, shuffle=False, micro_batch=2)
    parts = [validation_batches(data.stream(settings, rank, world_size), count) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    batches = [part[i] for part in parts for i in range(len(part))]
    counted = [batch for batch in batches if batch.counted]
    assert all(len(batch.itm_labels) <= 2 for batch in counted)
    assert all(batch.counts() == (0, 0, 0) for batch in batches if not batch.counted)
    stream = data.stream(settings)
    expected = [stream.sample(0, n) for n in range(min(count, 62))]
    assert contents(counted) == contents([collate(together(stream, [(0, n) for n in range(min(count, 62))]), settings)])
    assert [sample.row for sample in expected] == list(range(len(expected)))
    loaded = list(make_loader(parts[0], 0, len(parts[0]), 1))
    assert equal(loaded, [parts[0][i] for i in range(len(parts[0]))])


def test_validation_refuses_an_empty_set(data: Data) -> None:
    with pytest.raises(UsageError, match="at least one sample"):
        validation_batches(data.stream(), 0)
    with pytest.raises(IndexError):
        validation_batches(data.stream(), 4)[99]


def test_captions_without_images_are_counted(data: Data, tmp_path: Path) -> None:
    rows = [Pair(f"p{i}", f"image {i}", f"{i}.jpg", "a red cat") for i in range(40)] + [Pair("q", "image 35", "35.jpg", "a dog")]
    write_pairs(tmp_path / "pairs.parquet", rows)
    pairs = read_pairs(tmp_path / "pairs.parquet")
    vocabulary = load_vocabulary(data.folder)
    tokens = build_token_table(pairs, vocabulary, 12, tmp_path / "t.arrow", progress=False)
    with pytest.raises(UsageError, match=r"captions without images in .*: 10 of 41, first image 31, image 32, image 33: run"):
        PretrainStream(Sampler(pairs, data.store, tokens, data.facts, SETTINGS))
    kept = drop_missing(pairs, data.store)
    assert len(kept) == 31
    assert kept.image_ids == [f"image {i}" for i in range(31)]
    assert kept.digest != pairs.digest
    assert [kept.image_id(row) for row in range(31)] == kept.table.column("image_id").to_pylist()
    PretrainStream(
        Sampler(kept, data.store, build_token_table(kept, vocabulary, 12, tmp_path / "k.arrow", progress=False), data.facts, SETTINGS)
    )


def test_settings_that_do_not_fit_are_one_line(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"global_batch 24 is not a multiple of training.micro_batch 2 x 5 processes = 10"):
        data.stream(rank=0, world_size=5)
    with pytest.raises(UsageError, match="global_batch 24 is not a multiple"):
        data.stream(replace(SETTINGS, micro_batch=48))
    with pytest.raises(UsageError, match="unknown"):
        data.stream(replace(SETTINGS, masking="papers"))
    rows = [Pair(f"p{i}", "image 0", "0.jpg", "a red cat") for i in range(4)]
    write_pairs(tmp_path / "one.parquet", rows)
    pairs = read_pairs(tmp_path / "one.parquet")
    tokens = build_token_table(pairs, load_vocabulary(data.folder), 12, tmp_path / "t.arrow", progress=False)
    with pytest.raises(UsageError, match="at least two images"):
        PretrainStream(Sampler(pairs, data.store, tokens, data.facts, SETTINGS))
    PretrainStream(Sampler(pairs, data.store, tokens, data.facts, replace(SETTINGS, mismatch_probability=0.0)))
    with pytest.raises(UsageError, match="holds 4 captions, the pairs 62"):
        PretrainStream(Sampler(data.pairs, data.store, tokens, data.facts, SETTINGS))
