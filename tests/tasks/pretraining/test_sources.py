"""What a run reads: its vocabulary, and captions whose images have no regions."""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megainter.config.settings import DataConfig
from megainter.data.feature_store import FeatureStore
from megainter.data.matching import with_regions
from megainter.data.tables.pairs import Pair, has_split, read_pairs, write_pairs
from megainter.errors import TooManyBadInputsError, UsageError
from megainter.tasks.pretraining.sources import place_vocabulary, verify_together, word_boundaries
from tests.synthetic import open_store, write_data


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    return write_data(tmp_path / "data")


def settings(data: tuple[Path, Path], vocabulary: Path | None = None) -> DataConfig:
    return DataConfig(pairs=data[0], store=data[1], vocabulary=vocabulary, vocabulary_size=60)


def test_a_vocabulary_left_by_a_failed_start_is_made_anew(data: tuple[Path, Path], tmp_path: Path) -> None:
    run, pairs = tmp_path / "run", read_pairs(data[0])
    fresh = place_vocabulary(settings(data), pairs, run).read_text()
    (run / "vocab.txt").write_text("of other captions")
    assert place_vocabulary(settings(data), pairs, run).read_text() == fresh


def test_a_run_with_checkpoints_keeps_its_vocabulary(data: tuple[Path, Path], tmp_path: Path) -> None:
    run, pairs, other = tmp_path / "run", read_pairs(data[0]), tmp_path / "other.txt"
    saved = run / "checkpoints" / "step_0000001" / "vocab.txt"
    saved.parent.mkdir(parents=True)
    saved.write_text("of the run")
    other.write_text("another")
    with pytest.raises(UsageError, match="another vocabulary"):
        place_vocabulary(settings(data, other), pairs, run)
    assert not (run / "vocab.txt").exists()
    assert place_vocabulary(settings(data), pairs, run).read_text() == "of the run"
    assert place_vocabulary(settings(data, run / "vocab.txt"), pairs, run).read_text() == "of the run"


def test_captions_without_regions_are_left_out_up_to_the_limit(data: tuple[Path, Path], tmp_path: Path) -> None:
    pairs = read_pairs(data[0])
    with open_store(data[1]) as store:
        assert with_regions(pairs, store, 0.0, data[0]) is pairs
    fewer = write_data(tmp_path / "fewer", images=38)
    with open_store(fewer[1]) as store:
        kept = with_regions(pairs, store, 0.1, data[0])
        assert 0 < len(kept) < len(pairs)
        assert set(kept.image_ids) == set(pairs.image_ids) & set(store.ids)
        with pytest.raises(TooManyBadInputsError, match=r"--data.max_bad 0\.\d+"):
            with_regions(pairs, store, 0.01, data[0])


def test_whether_a_split_is_there(data: tuple[Path, Path]) -> None:
    assert has_split(data[0], "train")
    assert not has_split(data[0], "test")


def test_words_of_chinese_captions_are_asked_for_where_whole_words_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jieba", reason="words of Chinese need jieba, extra `chinese`")
    write_pairs(tmp_path / "zh.parquet", [Pair("a", "x", "x.jpg", "一只黑猫", "train"), Pair("b", "y", "y.jpg", "两只黑狗", "train")])
    pairs, masking = read_pairs(tmp_path / "zh.parquet"), {"pairs": tmp_path / "zh.parquet", "store": tmp_path, "masking": "paper"}
    assert word_boundaries(DataConfig(**masking), pairs).startswith("jieba 0.")
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UsageError, match=r"megainter\[chinese\]"):
        word_boundaries(DataConfig(**masking), pairs)
    assert word_boundaries(DataConfig(**masking | {"masking": "official"}), pairs) == "wordpiece"
    assert word_boundaries(DataConfig(**masking, word_segmentation="wordpiece"), pairs) == "wordpiece"


def verified_by_rank(rank: int, stores: list[Path], folder: Path, answers: Any) -> None:
    """One rank: it verifies its record, and says what is verified before and after the other's turn."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    store = FeatureStore(stores[rank])
    store.at(4)
    verify_together([store, store])
    store.at(rank)
    dist.barrier()
    answers.put((rank, np.flatnonzero(store._seen.of(np.arange(6))).tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("same", [True, False])
def test_ranks_of_a_host_take_each_others_word_for_a_record_of_the_same_store(tmp_path: Path, same: bool) -> None:
    one, other = (write_data(tmp_path / name)[1] for name in ("one", "other"))
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    stores = [one, one if same else other]
    processes = [context.Process(target=verified_by_rank, args=(rank, stores, tmp_path, answers)) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert found == ({0: [0, 1, 4], 1: [0, 1, 4]} if same else {0: [0, 4], 1: [1, 4]})
