"""Wrong pairs out of a first stage's candidates: against brute force, over ranks and stages, and in runs that are stopped."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megainter.config.reading import read_settings
from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import read_pairs
from megainter.data.text.token_table import build_token_table
from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.tasks.retrieval.batches import GroupSettings, RetrievalStream, WrongCandidates
from megainter.tasks.retrieval.negatives import open_towers, wrong_candidates
from megainter.tasks.retrieval.prefilter.training import PrefilterTraining
from megainter.tasks.retrieval.prefilter.training import finetune as train_prefilter
from megainter.tasks.retrieval.settings import RetrievalConfig
from megainter.training.metrics import read_metrics
from megainter.training.world import World
from tests.synthetic import write_data
from tests.tasks.retrieval.tuning import CONTRAST, Data, arguments, finetune, pretrained


def vectors(count: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(count, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("keep", [4, 100])
def test_candidates_are_the_nearest_wrong_ones_of_a_full_sort(keep: int) -> None:
    numbers = np.repeat(np.arange(20), np.arange(20) % 3 + 1).astype(np.int32)
    captions, images = vectors(len(numbers), 1), vectors(20, 2)
    found = wrong_candidates(captions, images, numbers, keep)
    scores = (captions @ images.T).numpy()
    assert found.images.shape == (len(numbers), min(keep, 19))
    assert found.captions.shape == (20, min(keep, len(numbers) - 3))
    for caption, near in enumerate(found.images):
        assert near.tolist() == [i for i in np.argsort(-scores[caption], kind="stable") if i != numbers[caption]][:keep]
    for image, near in enumerate(found.captions):
        expected = [c for c in np.argsort(-scores[:, image], kind="stable") if numbers[c] != image]
        assert near.tolist() == expected[: found.captions.shape[1]]


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> RetrievalStream:
    """Two random and two hard pairs beside each caption's own, the hard ones so for three in four."""
    folder = tmp_path_factory.mktemp("negatives")
    path, store = write_data(folder, images=40, captions=3)
    pairs = read_pairs(path, split="train")
    vocabulary = load_vocabulary(train_vocabulary(pairs.table.column("caption").to_pylist(), 60, folder / "vocab.txt"))
    tokens = build_token_table(pairs, vocabulary, 12, folder / "tokens.arrow", progress=False)
    settings = GroupSettings(3, 24, 24, 1, 1, 1, 1, hard_share=0.75, from_candidates=True)
    return RetrievalStream(pairs, FeatureStore(store), tokens, vocabulary.facts, settings, 5, False)


def test_hard_pairs_are_candidates_and_the_rest_is_random(stream: RetrievalStream) -> None:
    numbers, texts = stream.pairs.image_numbers, stream.pairs.table.column("caption").to_pylist()
    stream.candidates = wrong_candidates(vectors(len(numbers), 3), vectors(len(stream.pairs.image_ids), 4), numbers, 3)
    hits = []
    for step in range(30):
        groups = stream.groups(step)
        own, image = groups.captions[:, 0], groups.images[:, 0]
        assert (groups.images[:, 3] == image).all()
        assert (groups.captions[:, 4] == own).all()
        assert (numbers[groups.captions[:, 3]] != image).all()
        assert (groups.images[:, 4] != image).all()
        assert not any(texts[a] == texts[b] for a, b in zip(own, groups.captions[:, 3], strict=True))
        hits.append([(groups.captions[:, [3]] == stream.candidates.captions[image]).any(1),
                     (groups.images[:, [4]] == stream.candidates.images[own]).any(1)])  # fmt: skip
    shares = np.concatenate(hits, axis=1).mean(1)
    assert shares[0] == pytest.approx(0.75, abs=0.08)
    assert shares[1] == pytest.approx(0.75 + 0.25 * 3 / 29, abs=0.08), "a random image is one of the three now and then"


def test_the_cut_of_a_step_does_not_hang_on_candidates(stream: RetrievalStream) -> None:
    """So that steps and their shares are known before there are any, and the same for whatever the vectors say."""
    before, ids = [place.tolist() for place in stream.places(5)], stream.sample_ids(5)
    images, captions = len(stream.pairs.image_ids), len(stream.pairs)
    stream.candidates = WrongCandidates(np.zeros((images, 1), np.int32), np.zeros((captions, 1), np.int32))
    assert [place.tolist() for place in stream.places(5)] == before
    assert stream.sample_ids(5) == ids == [stream.pairs.pair_id(row) for row in stream.groups(5).captions[:, 0]]


HARD = {"data__hard_from": "first_stage", "data__hard_captions": 1, "data__hard_images": 1, "data__candidates": 5, "data__hard_share": 0.8,
        "data__renew_steps": 7, "training__log_every": 1}  # fmt: skip


@pytest.fixture(scope="module")
def seeing_start(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A model that was pretrained with contrast."""
    folder = tmp_path_factory.mktemp("seeing")
    return pretrained(folder, *write_data(folder, images=48), **CONTRAST)


@pytest.mark.slow
def test_candidates_are_alike_over_processes_and_stages(seeing_start: Data, tmp_path: Path) -> None:
    """And so are the losses; renewed at steps 7, 14 and 21 from other weights than before."""
    runs = {"one": (1, 1), "two": (2, 3), "three": (3, 2)}
    for name, (processes, stage) in runs.items():
        given = HARD | {
            "engine__zero_stage": stage,
            "training__micro_batch": 2,
            "training__global_batch": 12,
            "checkpoint__every_steps": 24,
        }
        done = finetune(arguments(seeing_start, tmp_path / name, **given), processes)
        assert done.returncode == 0, done.stderr
        made = sorted(path.name for path in (tmp_path / name / "candidates").iterdir())
        assert made == [f"step_{step:07d}" for step in (0, 7, 14, 21)]
    lists = {name: [np.load(tmp_path / name / f"candidates/step_{step:07d}/captions.npy") for step in (0, 7, 21)] for name in runs}
    assert all(np.array_equal(lists["one"][0], lists[name][0]) for name in runs)
    assert (lists["one"][0] != lists["one"][2]).any()
    losses = {name: [record["matching_loss"] for record in read_metrics(tmp_path / name / "metrics.jsonl", "train")] for name in runs}
    for name in runs:
        assert losses[name] == pytest.approx(losses["one"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "precision", "stage"), [(1, "bf16", 2), (2, "fp32", 3)])
def test_a_stopped_run_goes_on_with_its_candidates_bit_equal(
    processes: int, precision: str, stage: int, seeing_start: Data, tmp_path: Path
) -> None:
    """With dropout and loader processes; stopped at step 16 of 24, between two renewals."""
    given = HARD | {"engine__precision": precision, "engine__zero_stage": stage, "data__workers": 1, "validation__every_steps": 0,
                    "model__hidden_dropout_prob": 0.1}  # fmt: skip
    whole = finetune(arguments(seeing_start, tmp_path / "whole", **given), processes)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "step_0000024")
    shutil.rmtree(tmp_path / "part" / "candidates" / "step_0000021")
    again = finetune(arguments(seeing_start, tmp_path / "part", **given), processes)
    assert again.returncode == 0, again.stderr
    assert "resuming" in again.stdout
    assert "is gone" not in again.stdout
    last = [tmp_path / run / "checkpoints" / "step_0000024" for run in ("whole", "part")]
    for name in ("weights", "exp_avg", "ema"):
        first, second = (next(folder.glob(f"{name}-*")).read_bytes() for folder in last)
        assert first == second, name


@pytest.mark.slow
def test_a_step_is_done_again_with_the_candidates_it_had(seeing_start: Data, tmp_path: Path) -> None:
    """From step 16 on, between two renewals, over the one at 21; the run's folder stays as it is."""
    run = tmp_path / "run"
    done = finetune(arguments(seeing_start, run, **HARD, validation__every_steps=0, training__ema_decay=0))
    assert done.returncode == 0, done.stderr
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    command = [sys.executable, "-m", "megainter", "replay", run, "--step", "23", "--against", "metrics"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "the losses are the recorded ones, to the bit" in again.stdout, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.slow
def test_candidates_that_are_gone_are_made_anew_and_said(seeing_start: Data, tmp_path: Path) -> None:
    given = HARD | {"validation__every_steps": 0, "checkpoint__keep": 1}
    done = finetune(arguments(seeing_start, tmp_path / "run", **given))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in sorted((tmp_path / "run" / "candidates").iterdir())] == ["step_0000014", "step_0000021"]
    shutil.rmtree(tmp_path / "run" / "candidates")
    again = finetune(arguments(seeing_start, tmp_path / "run", **given, training__steps=30))
    assert again.returncode == 0, again.stderr
    assert "step_0000021 is gone: candidates are made of step 24" in again.stdout


@pytest.mark.slow
def test_a_light_first_stage_gives_candidates_that_stay(seeing_start: Data, tmp_path: Path) -> None:
    model, pairs, store = seeing_start
    training = PrefilterTraining(epochs=2, batch=16)
    folder = train_prefilter(model, pairs, store, output=tmp_path / "prefilter", max_regions=6, max_text_tokens=12, training=training)
    done = finetune(arguments(seeing_start, tmp_path / "run", **HARD, data__prefilter_model=folder))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "run" / "candidates").iterdir()] == ["step_0000000"]
    assert "prefilter" in json.loads((tmp_path / "run" / "config.json").read_text())["digests"]


def test_candidates_without_vectors_are_refused(stream: RetrievalStream, tmp_path: Path) -> None:
    given = arguments((tmp_path, tmp_path, tmp_path), tmp_path / "run", **HARD)
    start = SimpleNamespace(config=InterBertConfig(itc_size=0))
    with pytest.raises(UsageError, match=r"give data\.prefilter_model, .* or training\.itc_weight above 0"):
        open_towers(read_settings(RetrievalConfig, None, list(map(str, given))), start, stream.store, World(0, 1, torch.device("cpu")))
