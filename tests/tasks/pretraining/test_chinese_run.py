"""The Chinese recipes in real processes: titles of products, whole words by jieba, hard negatives, resuming, fine-tuning, scores."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from megainter import InterBertForRetrieval, InterBertProcessor
from megainter.config.reading import load_config
from megainter.data.feature_store import FeatureStore
from megainter.data.stream.negatives import plain_text
from megainter.data.tables.pairs import Pair, write_pairs
from megainter.data.text.vocabulary import train_vocabulary
from megainter.tasks.pretraining.sources import open_sources
from megainter.training.run_folder import differences
from preprocessing.prepare.hard_negatives import mine
from tests.synthetic import TINY, environment, train, write_data

KINDS, COLOURS, MARKS = ["女鞋", "男鞋", "手机壳", "连衣裙", "T恤"], ["黑色", "白色", "红色"], ["", "！", " 包邮", " 新款"]


def run(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def catalogue(folder: Path) -> list[str]:
    """Files of a small catalogue; returns the settings that make `pretrain-chinese` small enough for it."""
    _, store = write_data(folder, images=60)
    rng = np.random.default_rng(0)
    titles = [f"{rng.choice(COLOURS)} {rng.choice(KINDS)}{rng.choice(MARKS)}" for _ in range(60)]
    splits = ["train"] * 48 + ["val"] * 12
    pairs = [Pair(f"p{i}", f"image-{i:03d}", f"{i}.jpg", title, split) for i, (title, split) in enumerate(zip(titles, splits, strict=True))]
    write_pairs(folder / "titles.parquet", pairs)
    mine(folder / "titles.parquet", folder / "negatives.parquet", below=0.95)
    vocabulary = train_vocabulary(titles, 120, folder / "vocab.txt")
    values = {
        "data.pairs": folder / "titles.parquet", "data.store": store, "data.vocabulary": vocabulary,
        "data.hard_negatives": folder / "negatives.parquet", "data.workers": 0, "model.start_from": "none", "model.initializer_range": 0.1,
        "training.steps": 6, "training.global_batch": 16, "training.micro_batch": 8, "training.log_every": 1, "checkpoint.every_steps": 3,
        "validation.every_steps": 0, "validation.samples": 8, "engine.precision": "fp32", "engine.zero_stage": 1, "tensorboard": "false",
    } | {f"model.{name}": size for name, size in TINY.items()}  # fmt: skip
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_run_on_titles_masks_their_words_and_goes_on_with_the_same_jieba_alone(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    arguments = [*catalogue(tmp_path), "--output", str(tmp_path / "run")]
    config = load_config(Path("pretrain-chinese"), arguments)
    sources = open_sources(config, 0, 1)
    assert sources.digests["words"].startswith("jieba ")
    assert "hard_negatives" in sources.digests
    for stream in (sources.training, sources.validation):
        assert stream is not None
        assert stream.sampler.tokens.continues(0) is not None
    names = {number: entry for entry, number in sources.vocabulary.ids.items()}
    cut = 0
    for n in range(300):  # 黑色 and 女鞋 are masked as wholes
        sample = sources.training.sample(n // 48, n % 48)
        words = sources.training.sampler.tokens.continues(sample.caption_row)
        masked = np.isin(np.arange(len(words)), sample.msm_positions - 1)
        assert all(masked[at] == masked[at - 1] for at in np.flatnonzero(words)), [names[int(i)] for i in sample.ids]
        cut += int(masked[np.flatnonzero(words)].any())
    assert cut > 20
    pairs, rows = sources.training.sampler.pairs, sources.training.draws(0)
    shown = [(plain_text(pairs.caption(a)), plain_text(pairs.caption(b))) for a, b in zip(rows.rows, rows.caption_rows, strict=True)]
    assert all((own == other) == (label == 0) for (own, other), label in zip(shown, rows.itm_labels, strict=True))
    other = open_sources(load_config(Path("pretrain-chinese"), [*arguments, "--data.word_segmentation", "wordpiece"]), 0, 1)
    changed = differences({"digests": sources.digests}, {"digests": other.digests})
    assert changed == [f"digests.words: {sources.digests['words']} -> None"]


@pytest.mark.slow
def test_the_road_of_the_chinese_recipes(tmp_path: Path) -> None:
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    small = catalogue(tmp_path)
    done = train(["--config", "pretrain-chinese", *small, "--output", str(tmp_path / "run")])
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["digests"]["words"].startswith("jieba ")
    run("-m", "megainter", "convert", "zero", str(tmp_path / "run"), str(tmp_path / "model"))
    kept = ("data.pairs", "data.store", "data.workers", "training.", "checkpoint.", "validation.every", "engine.", "tensorboard")
    shared = [text for key, value in zip(small[::2], small[1::2], strict=True) if key[2:].startswith(kept) for text in (key, value)]
    tune = ["--config", "retrieval-chinese", *shared, "--model.start_from", str(tmp_path / "model"), "--data.neighbours", "5"]
    run("-m", "megainter.finetune", "retrieval", *tune, "--validation.images", "12", "--output", str(tmp_path / "tuned"))
    tuned = tmp_path / "tuned" / "model"
    told = run(
        "-m", "megainter", "evaluate", "retrieval", str(tuned), "--pairs", str(tmp_path / "titles.parquet"), "--store",
        str(tmp_path / "regions.store"), "--split", "val", "--output", str(tmp_path / "scores.json"),
    )  # fmt: skip
    assert "12" in told
    with FeatureStore(tmp_path / "regions.store") as store:
        records = [store[image_id] for image_id in store.ids[:5]]
    scores = InterBertForRetrieval.from_pretrained(tuned).score("黑色 女鞋", records, InterBertProcessor.from_pretrained(tuned))
    assert scores.shape == (5,)
    assert np.isfinite(scores.numpy()).all()
