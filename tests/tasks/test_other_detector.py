"""Every door through which a model meets a store refuses another detector's, and has the option that lets it through."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from megainter import InterBertConfig
from megainter.config.reading import load_config
from megainter.config.settings import DataConfig, StartConfig
from megainter.data.feature_store import FeatureStore
from megainter.errors import UsageError
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.classification.settings import ClassificationData
from megainter.tasks.pretraining.sources import check_store, model_configuration
from megainter.tasks.retrieval.evaluation import evaluate
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.retrieval.search.building import build_index
from megainter.tasks.retrieval.search.options import IndexOptions
from megainter.tasks.retrieval.settings import RetrievalData
from megainter.tasks.starting import open_start
from megainter.tasks.vcr.options import VcrEvaluation
from megainter.tasks.vcr.settings import VcrData
from tests.synthetic import settings, write_data
from tests.tasks.retrieval.test_evaluation import write_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model of another detector, pairs, store)."""
    folder = tmp_path_factory.mktemp("other")
    pairs, store = write_data(folder, images=12)
    model = write_model(folder / "model", pairs, itc_size=8)
    InterBertConfig.from_pretrained(model, detector="another").save_pretrained(model)
    return model, pairs, store


def evaluated(model: Path, pairs: Path, store: Path, folder: Path, other: bool) -> None:
    evaluate(model, RetrievalEvaluation(pairs=pairs, store=store, output=folder / "s.json", split="val", processes=1, other_detector=other))


def indexed(model: Path, pairs: Path, store: Path, folder: Path, other: bool) -> None:
    build_index(model, IndexOptions(pairs=pairs, store=store, output=folder / "index", other_detector=other))


def finetuned(model: Path, pairs: Path, store: Path, folder: Path, other: bool) -> None:
    start = open_start(StartConfig(start_from=model), folder / "run", None, None, FeatureStore(store), other)
    assert start.config.detector == "synthetic"  # what it is trained on from now on


def pretrained(model: Path, pairs: Path, store: Path, folder: Path, other: bool) -> None:
    words = settings(pairs, store, folder / "run", model__start_from=model, data__other_detector=str(other).lower())
    config, opened = load_config(None, words), FeatureStore(store)
    check_store(config, opened)
    assert model_configuration(config, 60, opened).detector == "synthetic"


@pytest.mark.parametrize("through", [evaluated, indexed, finetuned, pretrained])
def test_a_door_is_shut_for_another_detectors_store(through: Callable, data: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"trained on regions of 'another', and .* 'synthetic'.*other.detector"):
        through(*data, tmp_path, other=False)
    through(*data, tmp_path, other=True)


@pytest.mark.parametrize(
    "asked",
    [DataConfig, RetrievalData, VcrData, ClassificationData, RetrievalEvaluation, VcrEvaluation, ClassificationEvaluation, IndexOptions],
)
def test_every_verb_has_the_option(asked: type) -> None:
    assert next(field for field in fields(asked) if field.name == "other_detector").default is False
