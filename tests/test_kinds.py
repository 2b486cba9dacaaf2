"""A verb that is given another verb's folder says what it is, and for a run where its model is."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megainter.conversion.zero import convert
from megainter.data.feature_store import FeatureStore
from megainter.data.tables.pairs import read_pairs
from megainter.errors import UsageError
from megainter.files import write_json
from megainter.kinds import CHECKPOINT, INDEX, MODEL, PREFILTER, RUN, STORE, TABLE, TUNING, kind_of
from megainter.model.folder import read_config
from megainter.tasks.replaying import replay_run
from megainter.tasks.retrieval.search.checks import require_index
from tests.conversion.test_zero import write_checkpoint
from tests.model.tiny import tiny_config, tiny_model
from tests.synthetic import write_data


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One path of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    pairs, store = write_data(folder, images=2)
    for name, data in (("run", {"masking": "paper"}), ("tuned", {"objective": "matching"})):
        write_checkpoint(folder / name, tiny_config())
        write_json(folder / name / "config.json", {"data": data, "training": {}})
    tiny_model().save_pretrained(folder / "model")
    for name, file in (("index", "index.json"), ("prefilter", "prefilter.json")):
        (folder / name).mkdir()
        write_json(folder / name / file, {})
    checkpoint = next((folder / "run/checkpoints").glob("step_*"))
    return {
        TABLE: pairs, STORE: store, RUN: folder / "run", TUNING: folder / "tuned", CHECKPOINT: checkpoint, MODEL: folder / "model",
        INDEX: folder / "index", PREFILTER: folder / "prefilter",
    }  # fmt: skip


def test_each_is_known(things: dict[str, Path], tmp_path: Path) -> None:
    assert {kind: kind_of(path) for kind, path in things.items()} == {kind: kind for kind in things}
    assert kind_of(tmp_path) == kind_of(tmp_path / "nothing") == ""


# What opens a path of one kind, and which it may be.
DOORS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "model": (read_config, {MODEL}),
    "store": (FeatureStore, {STORE}),
    "pairs": (read_pairs, {TABLE}),
    "index": (require_index, {INDEX}),
    "zero": (
        lambda path: convert(path, path.parent / "converted"),
        {RUN, TUNING, CHECKPOINT, MODEL, TABLE},
    ),  # also takes files and folders of weights
    "replay": (lambda path: replay_run(path, 1, 1, compare=False, as_json=False), {RUN, TUNING}),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_was_given_instead_is_said(door: str, things: dict[str, Path]) -> None:
    opens, fitting = DOORS[door]
    for kind, path in things.items():
        if kind in fitting:
            continue
        with pytest.raises(UsageError, match=rf"(; it|{path.name}) is {kind}"):
            opens(path)


def test_of_a_run_it_is_said_where_its_model_is(things: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=rf"is a training run; `megainter convert zero {things[RUN]} MODEL`"):
        read_config(things[RUN])
    with pytest.raises(UsageError, match=rf"is a fine-tuning run; its result, {things[TUNING]}/model, is there when it has ended"):
        read_config(things[TUNING])
    (things[TUNING] / "model").mkdir()
    with pytest.raises(UsageError, match=rf"is a fine-tuning run; its result is {things[TUNING]}/model$"):
        read_config(things[TUNING])
