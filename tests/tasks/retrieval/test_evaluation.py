"""Retrieval end to end with a tiny random model on a tiny store, against the padded door of the model."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from megainter import InterBertConfig, InterBertForPreTraining, InterBertForRetrieval
from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import Pair, read_pairs, write_pairs
from megainter.data.text.vocabulary import load_vocabulary, train_vocabulary
from megainter.errors import NumericsError, TooManyBadInputsError, UsageError
from megainter.precision import Units, cpu_units
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.pairs import ChunkScorer
from megainter.tasks.retrieval.ranking import mean_over_folds, rank_scores
from megainter.tasks.retrieval.report import RetrievalReport
from megainter.tasks.scoring import running
from tests.synthetic import CLASSES, FEATURE_SIZE, TINY, environment, write_data

IMAGES, CAPTIONS = 19, 2  # not a multiple of the chunk
OLD_CPU, NEW_CPU = cpu_units("flags : avx2 avx512f"), cpu_units("flags : avx2 avx512f avx512_bf16")


def evaluate(model: Path, pairs: Path, store: Path, **given: Any) -> RetrievalReport:
    return evaluation.evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, **given))


def write_model(folder: Path, pairs: Path, **sizes: Any) -> Path:
    """A random model wide enough that scores differ, as a Hugging Face folder with its vocabulary."""
    table = read_pairs(pairs).table
    folder.mkdir()
    train_vocabulary(table.column("caption").to_pylist(), 60, folder / "vocab.txt")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    torch.manual_seed(0)
    sizes = {"region_feature_size": FEATURE_SIZE, "num_region_classes": len(CLASSES), **TINY} | sizes
    config = InterBertConfig(vocab_size=60, max_position_embeddings=40, initializer_range=0.3, **sizes)
    InterBertForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, pairs, store): 19 images with two captions each, in no split but train and val."""
    folder = tmp_path_factory.mktemp("retrieval")
    pairs, store = write_data(folder, images=IMAGES, captions=CAPTIONS)
    return write_model(folder / "model", pairs), pairs, store


def matrix(path: Path) -> np.ndarray:
    """Written scores as [captions, images]."""
    return np.array(pq.read_table(path).column("scores").to_pylist(), dtype=np.float32)


def padded_scores(model_folder: Path, pairs_path: Path, store_path: Path, max_regions: int, max_tokens: int) -> np.ndarray:
    """Every pair through the padded door, one at a time, from the raw data: [captions, images]."""
    model = InterBertForRetrieval.from_pretrained(model_folder).eval()
    vocabulary, pairs = load_vocabulary(model_folder), read_pairs(pairs_path)
    scores = np.empty((len(pairs), len(pairs.image_ids)))
    with FeatureStore(store_path) as store, torch.no_grad():
        for i, image_id in enumerate(pairs.image_ids):
            record = store[image_id]
            features = torch.from_numpy(record.features[:max_regions].astype(np.float32))
            features = torch.cat([features.mean(0, keepdim=True).half().float(), features])
            x1, y1, x2, y2 = (record.boxes[:max_regions] / [record.width, record.height, record.width, record.height]).T
            locations = np.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)], axis=1)
            locations = torch.tensor(np.concatenate([[[0, 0, 1, 1, 1]], locations]), dtype=torch.float32)
            for c in range(len(pairs)):
                ids = vocabulary.with_specials(vocabulary.encode([pairs.caption(c)], max_tokens - 2)[0])
                out = model(input_ids=torch.from_numpy(ids)[None], region_features=features[None], region_locations=locations[None])
                scores[c, i] = out.logits[0, 0] - out.logits[0, 1]
    return scores


def test_scores_and_figures_equal_one_pair_at_a_time(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = evaluate(
        *data, output=tmp_path / "out.json", split=None, max_regions=4, max_text_tokens=8, batch_pairs=24, precision="fp32",
        scores=tmp_path / "s.parquet",
    )  # fmt: skip
    wanted = padded_scores(*data, max_regions=4, max_tokens=8)
    found = matrix(tmp_path / "s.parquet")
    assert wanted.std() > 0.05
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    own = read_pairs(data[1]).image_numbers
    ranks = rank_scores(found.T, own)
    assert report.text_to_image.r_at_5 == pytest.approx(np.mean(ranks.caption_ranks <= 5))
    assert report.image_to_text.mean_rank == pytest.approx(ranks.image_ranks.mean())
    top = pq.read_table(tmp_path / "out.top.parquet").to_pylist()
    assert [row["rank"] for row in top] == ranks.caption_ranks.tolist()
    assert all(row["images"][row["rank"] - 1] == row["image_id"] for row in top if row["rank"] <= 10)
    stored = json.loads((tmp_path / "out.json").read_text())
    assert stored["text_to_image"]["r_at_1"] == report.text_to_image.r_at_1
    assert (stored["images"], stored["captions"], stored["missing_images"]) == (IMAGES, IMAGES * CAPTIONS, 0)
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


def test_folds_are_galleries_of_their_own() -> None:
    """Against counting wrong candidates one by one, with ties and captions in no order."""
    rng = np.random.default_rng(3)
    images, count = 12, 3
    owner = rng.permutation(np.concatenate([np.arange(images), rng.integers(0, images, 20)]))
    scores = rng.integers(0, 6, (images, len(owner))).astype(np.float32)
    found = mean_over_folds(scores, owner, count)
    for k in (1, 5, 10):
        to_image, to_text = [], []
        for fold in np.split(np.arange(images), count):
            captions = [c for c in range(len(owner)) if owner[c] in fold]
            hits = [sum(scores[i, c] >= scores[owner[c], c] for i in fold if i != owner[c]) < k for c in captions]
            best = {i: max(scores[i, c] for c in captions if owner[c] == i) for i in fold}
            backward = [sum(scores[i, c] >= best[i] for c in captions if owner[c] != i) < k for i in fold]
            to_image.append(np.mean(hits))
            to_text.append(np.mean(backward))
        assert found.text_to_image[f"r_at_{k}"] == pytest.approx(np.mean(to_image), abs=1e-12)
        assert found.image_to_text[f"r_at_{k}"] == pytest.approx(np.mean(to_text), abs=1e-12)


def test_folds_stand_in_the_report(data: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = evaluate(*data, output=tmp_path / "out.json", split=None, images=4, folds=1)
    assert whole.folds is not None
    assert whole.folds.text_to_image["r_at_1"] == pytest.approx(whole.text_to_image.r_at_1)
    assert whole.folds.image_to_text["r_at_5"] == pytest.approx(whole.image_to_text.r_at_5)
    evaluate(*data, output=tmp_path / "two.json", split=None, images=4, folds=2)
    assert json.loads((tmp_path / "two.json").read_text())["folds"]["count"] == 2
    assert "mean of 2 folds of 2 images" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--folds is 3; give a number that divides the gallery's 4 images"):
        evaluate(*data, output=tmp_path / "three.json", split=None, images=4, folds=3)
    with pytest.raises(UsageError, match="--folds needs every score"):
        evaluate(*data, output=tmp_path / "four.json", split=None, images=4, folds=2, prefilter=10, prefilter_model=tmp_path)


def test_two_processes_give_the_same_bits_as_one(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for processes in (1, 2):
        evaluate(*data, output=tmp_path / f"{processes}.json", split=None, processes=processes, scores=tmp_path / f"{processes}.parquet")
    one, two = (matrix(tmp_path / f"{processes}.parquet") for processes in (1, 2))
    assert one.tobytes() == two.tobytes()
    assert json.loads((tmp_path / "2.json").read_text())["processes"] == 2


def test_split_and_limits_choose_the_first_of_the_manifest(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = evaluate(*data, output=tmp_path / "out.json", split="train", images=5, captions_per_image=1, scores=tmp_path / "s.parquet")
    assert (report.images, report.captions) == (5, 5)
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.column("pair_id").to_pylist() == [f"image-{i:03d}#0" for i in range(5)]
    assert json.loads(table.schema.metadata[b"images"]) == [f"image-{i:03d}" for i in range(5)]


def test_bf16_is_close_to_fp32(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        evaluate(*data, output=tmp_path / "o.json", split=None, precision=precision, scores=tmp_path / f"{precision}.parquet")
    full, half = matrix(tmp_path / "fp32.parquet"), matrix(tmp_path / "bf16.parquet")
    assert np.abs(full - half).mean() < 0.1 * full.std()


@pytest.mark.parametrize(("units", "expected"), [(OLD_CPU, "fp32"), (NEW_CPU, "bf16")], ids=["without units", "with units"])
def test_auto_takes_what_the_device_computes(
    units: Units, expected: str, data: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The report says which, the output which and why, and the scores are those of the precision asked for by its name."""
    monkeypatch.setattr("megainter.tasks.scoring.models.units_of", lambda device: units)
    report = evaluate(*data, output=tmp_path / "auto.json", split=None, device="cpu", scores=tmp_path / "auto.parquet")
    assert report.precision == expected == json.loads((tmp_path / "auto.json").read_text())["precision"]
    assert capsys.readouterr().out.count(f"precision {expected} (auto), on {units.name}\n") == 1
    evaluate(*data, output=tmp_path / "o.json", split=None, device="cpu", precision=expected, scores=tmp_path / "o.parquet")
    assert "auto" not in capsys.readouterr().out
    assert matrix(tmp_path / "auto.parquet").tobytes() == matrix(tmp_path / "o.parquet").tobytes()


def test_an_interrupted_evaluation_goes_on(data: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended within the second of three chunks; the next call scores the other two only, and gives the same scores."""
    evaluate(*data, output=tmp_path / "whole.json", split=None, scores=tmp_path / "whole.parquet")
    calls: list[int] = []
    score = ChunkScorer.score

    def failing(self: ChunkScorer, chunk: int) -> np.ndarray:
        calls.append(chunk)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(self, chunk)

    monkeypatch.setattr(ChunkScorer, "score", failing)
    arguments = {"output": tmp_path / "out.json", "split": None, "scores": tmp_path / "s.parquet", "processes": 1}
    with pytest.raises(KeyboardInterrupt):
        evaluate(*data, **arguments)
    assert not (tmp_path / "out.json").exists()
    evaluate(*data, **arguments)
    assert calls == [0, 1, 1, 2]
    assert matrix(tmp_path / "s.parquet").tobytes() == matrix(tmp_path / "whole.parquet").tobytes()


def test_another_plan_does_not_reuse_scores(data: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores left by a run with other settings are thrown away."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "rank_scores", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(*data, output=tmp_path / "out.json", split=None, max_regions=2)
    evaluate(*data, output=tmp_path / "out.json", split=None, scores=tmp_path / "s.parquet")
    evaluate(*data, output=tmp_path / "fresh.json", split=None, scores=tmp_path / "fresh.parquet")
    assert matrix(tmp_path / "s.parquet").tobytes() == matrix(tmp_path / "fresh.parquet").tobytes()


@pytest.fixture
def broken(data: tuple[Path, Path, Path], tmp_path: Path) -> tuple[Path, Path, Path]:
    """A model whose word embeddings have one NaN row, that of "amber"."""
    folder = write_model(tmp_path / "broken", data[1])
    model = InterBertForPreTraining.from_pretrained(folder)
    with torch.no_grad():
        model.interbert.text_embeddings.word.weight[load_vocabulary(folder).ids["amber"]] = float("nan")
    model.save_pretrained(folder)
    return folder, data[1], data[2]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_score_that_is_not_a_number_names_the_pair(broken: tuple[Path, Path, Path], tmp_path: Path, processes: int) -> None:
    with pytest.raises(NumericsError, match=r"caption 'image-\d+#\d' and image 'image-\d+' is nan"):
        evaluate(*broken, output=tmp_path / "out.json", split=None, processes=processes)


def test_images_without_regions_are_left_out_and_counted(
    data: tuple[Path, Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [Pair(f"{image}#0", image, f"{image}.jpg", "red and blue") for image in ("image-001", "elsewhere", "image-002", "nowhere")]
    write_pairs(tmp_path / "pairs.parquet", rows)
    with pytest.raises(TooManyBadInputsError, match=r"2 of 4 images .* --images 2 or --max-bad 0.5$"):
        evaluate(data[0], tmp_path / "pairs.parquet", data[2], output=tmp_path / "out.json", split=None, max_bad=0.3)
    report = evaluate(data[0], tmp_path / "pairs.parquet", data[2], output=tmp_path / "out.json", split=None, max_bad=0.5)
    assert (report.images, report.captions, report.missing_images) == (2, 2, 2)
    assert "2 of 4 images are of images without regions" in caplog.text
    assert caplog.text.rstrip().endswith("first 'elsewhere': left out")


def test_what_does_not_fit_is_one_clear_line(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, pairs, store = data
    write_pairs(tmp_path / "alien.parquet", [Pair("a", "elsewhere", "a.jpg", "red")])
    with pytest.raises(TooManyBadInputsError, match=r"1 of 1 images .* they meet in no form of their names"):
        evaluate(model, tmp_path / "alien.parquet", store, output=tmp_path / "out.json", split=None)
    cases = [
        ("no config.json", (tmp_path, pairs, store), {}),
        ("does not exist", (model, tmp_path / "no.parquet", store), {}),
        ("no rows of split 'test'", (model, pairs, store), {"split": "test"}),
        ("asks for 50", (model, pairs, store), {"images": 50}),
        ("--images is 0", (model, pairs, store), {"images": 0}),
        ("give 3 to 40", (model, pairs, store), {"max_text_tokens": 41}),
        ("fp16 is not possible on cpu", (model, pairs, store), {"precision": "fp16", "device": "cpu"}),
        ("--device gpu: PyTorch finds no such device", (model, pairs, store), {"device": "gpu"}),
        ("--processes is 0", (model, pairs, store), {"processes": 0}),
    ]
    for text, arguments, options in cases:
        with pytest.raises(UsageError) as caught:
            evaluate(*arguments, output=tmp_path / "out.json", **{"split": None, **options})
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_training_run_is_told_to_be_converted_first(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run1"
    (run / "checkpoints" / "step_0000001").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "checkpoints" / "step_0000001" / "config.json").write_text('{"model_type": "interbert"}')
    (run / "checkpoints" / "step_0000001" / "weights-00000-of-00001.safetensors").touch()
    for folder in (run, run / "checkpoints" / "step_0000001"):
        with pytest.raises(UsageError, match=rf"`megainter convert zero {folder} MODEL` writes"):
            evaluate(folder, *data[1:], output=tmp_path / "out.json", split=None)


@pytest.mark.parametrize("option", ["output", "scores"])
def test_a_place_that_cannot_be_written_is_found_before_scoring(
    data: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(running, "score_chunks", lambda *_: pytest.fail("scoring began"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "file").touch()
    for path, text in ((tmp_path / "photos", "is a folder"), (tmp_path / "file" / "x", "cannot be written")):
        with pytest.raises(UsageError, match=rf"--{option} .*{text}"):
            evaluate(*data, **{"output": tmp_path / "out.json", "split": None, option: path})


def test_lengths_are_those_of_training_unless_given(
    data: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate(*data, output=tmp_path / "unknown.json", split="val")
    assert (report.max_regions, report.max_text_tokens) == (36, 36)
    assert "does not say what it was trained with: --max-regions 36 is taken" in capsys.readouterr().out
    folder = write_model(tmp_path / "model", data[1])
    config = InterBertConfig.from_pretrained(folder)
    config.max_regions, config.max_text_tokens = 3, 8
    config.save_pretrained(folder)
    report = evaluate(folder, *data[1:], output=tmp_path / "known.json", split="val")
    assert (report.max_regions, report.max_text_tokens) == (3, 8)
    assert "does not say" not in capsys.readouterr().out
    report = evaluate(folder, *data[1:], output=tmp_path / "given.json", split="val", max_regions=2)
    assert (report.max_regions, report.max_text_tokens) == (2, 8)


@pytest.mark.parametrize("fault", ["bare encoder", "no casing", "other model", "wide features"])
def test_a_folder_that_cannot_score_is_refused(data: tuple[Path, Path, Path], tmp_path: Path, fault: str) -> None:
    """A random matching head or a guessed casing would give scores, and nobody would see that they mean nothing."""
    folder = write_model(tmp_path / "model", data[1])
    if fault == "bare encoder":
        InterBertForPreTraining.from_pretrained(folder).interbert.save_pretrained(folder)
    elif fault == "no casing":
        (folder / "tokenizer_config.json").write_text("{}")
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "bert"} if fault == "other model" else {"region_feature_size": 99}
        (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UsageError, match={"bare encoder": "itm_head", "no casing": "do_lower_case", "other model": "'bert'"}.get(fault, "features of 99")
    ):
        evaluate(folder, *data[1:], output=tmp_path / "out.json", split=None)


def test_a_dead_scoring_process_is_reported(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A child is killed as the kernel kills one that wants too much memory; the parent ends with one line and leaves no process."""
    code = f"""
import os, signal, multiprocessing, threading, time
from pathlib import Path
from megainter.errors import MegainterError
from megainter.tasks.retrieval.evaluation import evaluate
from megainter.tasks.retrieval.options import RetrievalEvaluation
def kill():
    while not multiprocessing.active_children(): time.sleep(0.01)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
if __name__ == "__main__":
    threading.Thread(target=kill, daemon=True).start()
    try:
        model, pairs, store = map(Path, {[str(path) for path in data]!r})
        evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, output=Path({str(tmp_path / "out.json")!r}),
                                            split=None, processes=2))
    except MegainterError as error:
        print(error, len(multiprocessing.active_children()))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert "ended without a word" in done.stdout, done.stderr
    assert done.stdout.strip().endswith(" 0")


@pytest.mark.slow
def test_scoring_processes_end_with_their_parent(data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """SIGKILL to the parent leaves nobody working."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing, threading, time, os, signal
from pathlib import Path
from megainter.tasks.retrieval.evaluation import evaluate
from megainter.tasks.retrieval.options import RetrievalEvaluation
def kill():
    while len(multiprocessing.active_children()) < 2: time.sleep(0.01)
    time.sleep(1)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    threading.Thread(target=kill, daemon=True).start()
    model, pairs, store = map(Path, {[str(path) for path in data]!r})
    evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, output=Path({str(tmp_path / "out.json")!r}),
                                            split=None, processes=2))
""")
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment(), timeout=120, check=False)
    pids = [int(word) for word in done.stdout.split() if word.isdigit()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
