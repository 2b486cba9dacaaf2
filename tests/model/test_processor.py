"""Scores from Python: the processor of a model's folder, and the same scores as `evaluate retrieval` and as the padded door."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from megainter import InterBertConfig, InterBertForPreTraining, InterBertForRetrieval, InterBertProcessor
from megainter.data.feature_store import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.tables.pairs import Pair, Pairs, read_pairs, write_pairs
from megainter.data.text.token_table import build_token_table
from megainter.errors import UsageError
from megainter.tasks.retrieval import evaluation
from megainter.tasks.retrieval.gallery import tokenize
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.prefilter.own import OwnVectors
from megainter.tasks.retrieval.report import RetrievalReport
from tests.synthetic import FEATURE_SIZE, write_data
from tests.tasks.retrieval.test_evaluation import write_model


def evaluate(model: Path, pairs: Path, store: Path, **given: Any) -> RetrievalReport:
    return evaluation.evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, **given))


class Data:
    def __init__(self, folder: Path) -> None:
        self.pairs_path, self.store_path = write_data(folder, images=13)
        self.folder = write_model(folder / "model", self.pairs_path)
        self.pairs: Pairs = read_pairs(self.pairs_path)
        store = FeatureStore(self.store_path)
        self.records = [store[image_id] for image_id in self.pairs.image_ids]
        self.texts: list[str] = self.pairs.table.column("caption").to_pylist()
        self.model = InterBertForRetrieval.from_pretrained(self.folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    return Data(tmp_path_factory.mktemp("processor"))


def test_scores_are_those_of_evaluate_retrieval(data: Data, tmp_path: Path) -> None:
    paths = (data.folder, data.pairs_path, data.store_path)
    options = {"split": None, "max_regions": 4, "max_text_tokens": 7, "precision": "fp32"}
    evaluate(*paths, output=tmp_path / "o.json", scores=tmp_path / "s.parquet", **options)
    wanted = np.array(pq.read_table(tmp_path / "s.parquet").column("scores").to_pylist(), dtype=np.float32)
    processor = InterBertProcessor.from_pretrained(data.folder, max_text_tokens=7, max_regions=4)
    texts = [text for text in data.texts for _ in data.records]
    found = data.model.score(texts, data.records * len(data.texts), processor, batch_pairs=50).view(len(data.texts), -1)
    assert found.dtype == torch.float32
    assert wanted.std() > 0.05
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_the_processor_of_the_models_folder_is_the_usual_one(data: Data) -> None:
    texts, records = data.texts[:13], data.records
    processor = InterBertProcessor.from_pretrained(data.folder)
    assert (processor.max_text_tokens, processor.max_regions) == (36, 36)
    assert torch.equal(data.model.score(texts, records), data.model.score(texts, records, processor))


def test_one_text_against_many_images_and_the_other_way_round(data: Data) -> None:
    of_text = data.model.score(data.texts[3], data.records)
    of_image = data.model.score(data.texts, data.records[5])
    assert torch.equal(data.model.score(data.texts, data.records[5:6]), of_image)
    assert torch.equal(data.model.score(data.texts[3:4], data.records), of_text)
    assert of_text.shape == (13,)
    assert of_image.shape == (26,)
    assert float(of_text[5]) == pytest.approx(float(of_image[3]), abs=1e-5)
    assert float(data.model.score(data.texts[3], data.records[5])) == pytest.approx(float(of_text[5]), abs=1e-5)
    assert data.model.score([], []).shape == data.model.score("a text", []).shape == (0,)


@pytest.mark.parametrize("batch_pairs", [1, 4, 1000])
def test_the_batch_size_changes_nothing(data: Data, batch_pairs: int) -> None:
    texts, records = data.texts, data.records * 2
    found = data.model.score(texts, records, batch_pairs=batch_pairs)
    torch.testing.assert_close(found, data.model.score(texts, records), atol=1e-5, rtol=0)


def test_padded_tensors_go_through_forward_and_give_the_same(data: Data) -> None:
    processor = InterBertProcessor.from_pretrained(data.folder)
    texts, records = data.texts[:13], data.records
    inputs = processor(texts, records)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == inputs["token_type_ids"].shape
    assert inputs["region_features"].shape[:2] == inputs["region_mask"].shape
    assert not inputs["region_mask"].all()
    with torch.no_grad():
        logits = data.model(**inputs).logits
    torch.testing.assert_close(logits[:, 0] - logits[:, 1], data.model.score(texts, records), atol=1e-5, rtol=0)


def test_texts_alone_and_regions_alone(data: Data) -> None:
    processor = InterBertProcessor.from_pretrained(data.folder)
    assert set(processor(texts=["red", "green and blue"])) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(processor(records=data.records[:2])) == {"region_features", "region_locations", "region_mask"}
    for inputs in (processor(texts=data.texts[:3]), processor(records=data.records[:3])):
        with torch.no_grad():
            assert torch.isfinite(data.model(**inputs).logits).all()
    packed = processor.pack(None, data.records[:3])
    assert packed.text_lengths.tolist() == [0, 0, 0]
    assert len(packed.region_features) == int(packed.region_lengths.sum())


def test_a_long_text_and_an_image_without_regions(data: Data) -> None:
    processor = InterBertProcessor.from_pretrained(data.folder, max_text_tokens=6)
    assert int(processor.pack(["red " * 500, ""], None).text_lengths.max()) == 6
    none = RegionRecord(np.zeros((0, 4), np.float32), np.zeros((0, FEATURE_SIZE), np.float16), np.zeros((0, 8), np.float32), 10, 10)
    assert torch.isfinite(data.model.score(["red " * 500, ""], [none, data.records[0]], processor)).all()


def test_saved_beside_a_model_and_read_again(data: Data, tmp_path: Path) -> None:
    processor = InterBertProcessor.from_pretrained(data.folder, max_text_tokens=9, max_regions=5)
    data.model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text('{"model_max_length": 40}')
    processor.save_pretrained(tmp_path / "m")
    again = InterBertProcessor.from_pretrained(tmp_path / "m")
    assert (again.max_text_tokens, again.max_regions, again.vocabulary.digest) == (9, 5, processor.vocabulary.digest)
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())["model_max_length"] == 40
    model = InterBertForRetrieval.from_pretrained(tmp_path / "m")
    assert torch.equal(model.score(data.texts[:13], data.records), data.model.score(data.texts[:13], data.records, processor))


SPELT = ["a red [MASK] and blue", "[MASK]red[SEP] x [UNK]", "[mask] red [Mask]", "[PAD][CLS]", "Red, GREEN"]


def test_special_tokens_are_what_transformers_makes_of_them(data: Data, tmp_path: Path) -> None:
    InterBertProcessor.from_pretrained(data.folder).save_pretrained(tmp_path)
    data.model.config.save_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for split in (False, True):
        processor = InterBertProcessor.from_pretrained(tmp_path, split_special_tokens=split)
        packed = processor.pack(SPELT, None)
        found = [ids.tolist() for ids in packed.input_ids.split(packed.text_lengths.tolist())]
        assert found == reference(SPELT, split_special_tokens=split)["input_ids"]
        assert (processor.vocabulary.facts.mask_id in found[0]) == (not split)

        processor.save_pretrained(tmp_path / "saved")
        data.model.config.save_pretrained(tmp_path / "saved")
        assert InterBertProcessor.from_pretrained(tmp_path / "saved").split_special_tokens == split


def test_captions_and_queries_spell_no_special_tokens(data: Data, tmp_path: Path) -> None:
    """The doors that read texts of others: the table of training, the grid of scoring, the vectors of searching."""
    vocabulary = InterBertProcessor.from_pretrained(data.folder).vocabulary
    facts = vocabulary.facts
    write_pairs(tmp_path / "p.parquet", [Pair(f"p{n}", f"i{n}", f"i{n}.jpg", text, "train") for n, text in enumerate(SPELT)])
    table = build_token_table(read_pairs(tmp_path / "p.parquet"), vocabulary, 12, tmp_path / "t.arrow", progress=False)
    grid = tokenize(SPELT, vocabulary, 12)
    of_grid = [ids[1:-1] for ids in np.split(grid.ids, np.cumsum(grid.lengths)[:-1])]
    for tokens in (*(table[row] for row in range(len(SPELT))), *of_grid):
        assert not {facts.mask_id, facts.sep_id, facts.cls_id, facts.pad_id} & set(tokens.tolist())

    torch.manual_seed(0)
    config = InterBertConfig.from_pretrained(data.folder, itc_size=8)
    InterBertForPreTraining(config).save_pretrained(tmp_path / "m")
    own = OwnVectors(tmp_path / "m", vocabulary, 12, 4, torch.device("cpu"))
    assert own.processor.split_special_tokens


def test_what_does_not_fit_is_one_line(data: Data, tmp_path: Path) -> None:
    processor = InterBertProcessor.from_pretrained(data.folder)
    with pytest.raises(UsageError, match="records are RegionRecord, not str"):
        data.model.score("red", ["x.jpg"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="texts are str, not NoneType"):
        data.model.score([None], data.records)  # type: ignore[list-item]
    with pytest.raises(UsageError, match="2 texts and 13 records"):
        data.model.score(data.texts[:2], data.records)
    wide = RegionRecord(np.zeros((1, 4), np.float32), np.zeros((1, 9), np.float16), np.zeros((1, 8), np.float32), 10, 10)
    with pytest.raises(UsageError, match="has 9-d features, and the model takes 16-d"):
        data.model.score("red", [data.records[0], wide])
    with pytest.raises(UsageError, match="batch_pairs is 0"):
        data.model.score("red", data.records[0], batch_pairs=0)
    with pytest.raises(UsageError, match="give texts, records, or both"):
        processor()
    with pytest.raises(UsageError, match="max_text_tokens is 41; this model takes 3 to 40"):
        InterBertProcessor.from_pretrained(data.folder, max_text_tokens=41)
    with pytest.raises(UsageError, match="max_regions is 0"):
        InterBertProcessor.from_pretrained(data.folder, max_regions=0)
    with pytest.raises(UsageError, match="is no Hugging Face folder"):
        InterBertProcessor.from_pretrained(tmp_path)
    fresh = InterBertForRetrieval(data.model.config)
    fresh.name_or_path = ""
    with pytest.raises(UsageError, match="did not come from a folder"):
        fresh.eval().score("red", data.records[0])
    with pytest.raises(UsageError, match="training mode"):
        fresh.train().score("red", data.records[0], processor)
