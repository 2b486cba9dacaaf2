"""Composed scenes with questions about named objects, in the format of VCR (visualcommonsense.com): a set on which `finetune vcr` is tried.

Animals are people here: their class is "person", so that the questions call them by names that say nothing about who is meant. Things
keep their class, and a scene may hold two or three of one class. So the tags of a part of the questions, marked ``ambiguous``, do not
tell alone which object is meant. Right answers are facts of the scene; a scene and its questions are pure functions of (seed, index).

    python -m preprocessing.scenes.questions --output vcr-scenes --train 2000 --val 400
    megainter prepare vcr vcr-scenes/train.jsonl --images vcr-scenes/images --boxes train-boxes.parquet --output train.parquet
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megainter.data.tables.questions import CHOICES
from megainter.errors import UsageError
from megainter.files import write_atomically
from megainter.progress import Progress
from preprocessing.scenes.scenes import SCENE_SIZE, Scene, compose, draw, glyphs, place, relation

PERSON = "person"
_ANIMALS = """
dog cat mouse rabbit cow pig horse camel elephant giraffe lion zebra gorilla panda koala kangaroo bat squirrel fox rooster chick penguin
owl duck flamingo parrot peacock frog turtle snake dinosaur whale dolphin octopus crab snail butterfly bee ladybug spider fish snowman
"""
PEOPLE = frozenset(_ANIMALS.split())
PLACES = ("at the top left", "at the top right", "in the middle", "at the bottom left", "at the bottom right")
RELATIONS = ("above", "below", "to the left of", "to the right of")

Words = list[str | list[int]]


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene. Tokens are words, and lists of object indices; labels are the places of the right choices.

    ``ambiguous``: the words without the boxes fit two objects, of which a wrong answer names the other.
    """

    question: Words
    answers: list[Words]
    answer_label: int
    rationales: list[Words]
    rationale_label: int
    ambiguous: bool


def class_names(scene: Scene) -> list[str]:
    """What VCR would call the scene's objects, in their order: "person", or the class in one word."""
    names = [glyphs()[item.kind].singular for item in scene.objects]
    return [PERSON if name in PEOPLE else name.replace(" ", "") for name in names]


def scene_questions(scene: Scene, seed: int, index: int, count: int) -> list[SceneQuestion]:
    """Up to ``count`` questions about a scene, about different objects where it has them."""
    rng = np.random.default_rng([seed, index, 1])  # 1: not the stream that the scene itself is drawn from
    found: list[SceneQuestion] = []
    for number, item in enumerate(int(i) for i in rng.permutation(len(scene.objects))):
        made = (_where(rng, scene, item), _which(rng, scene, item))
        question = made[number % 2] or made[1 - number % 2]
        if question is not None and len(found) < count:
            found.append(question)
    return found


def _where(rng: np.random.Generator, scene: Scene, item: int) -> SceneQuestion | None:
    """ "Where is [0] ?", "[0] is at the top left ." and three places where it is not; None where its place is not plain."""
    right = place(scene.objects[item])
    if right is None:
        return None
    names = class_names(scene)
    twins = [place(scene.objects[other]) for other in range(len(names)) if other != item and names[other] == names[item]]
    wrong = [where for where in PLACES if where != right]
    order = [str(where) for where in rng.permutation(wrong)]
    order.sort(key=lambda where: where not in twins)  # places of objects of the same name first
    picked = [right, *order[: CHOICES - 1]]
    answers: list[Words] = [[[item], "is", *where.split(), "."] for where in picked]
    return _finished(rng, scene, item, ["Where", "is", [item], "?"], answers, any(where in twins for where in picked[1:]))


def _which(rng: np.random.Generator, scene: Scene, item: int) -> SceneQuestion | None:
    """ "Who or what is at the top left ?", "[2] ." and three objects that are elsewhere; None where its place is not its own."""
    where = place(scene.objects[item])
    others = [other for other in range(len(scene.objects)) if place(scene.objects[other]) != where]
    if where is None or len(others) < len(scene.objects) - 1 or len(others) < CHOICES - 1:
        return None
    names = class_names(scene)
    order = [int(other) for other in rng.permutation(others)]
    order.sort(key=lambda other: names[other] != names[item])
    picked = [item, *order[: CHOICES - 1]]
    answers: list[Words] = [[[one], "."] for one in picked]
    ambiguous = any(names[other] == names[item] for other in picked[1:])
    return _finished(rng, scene, item, ["Who", "or", "what", "is", *where.split(), "?"], answers, ambiguous)


def _finished(
    rng: np.random.Generator, scene: Scene, item: int, question: Words, answers: list[Words], ambiguous: bool
) -> SceneQuestion | None:
    """With a rationale: how the object lies to another one, and three ways in which it does not; None where it lies plainly to none."""
    for other in (int(i) for i in rng.permutation(len(scene.objects))):
        right = relation(scene.objects[item], scene.objects[other]) if other != item else None
        if right is not None:
            relations = [right, *(how for how in RELATIONS if how != right)]
            rationales: list[Words] = [[[item], "is", *how.split(), [other], "."] for how in relations]
            answers_at, rationales_at = rng.permutation(CHOICES), rng.permutation(CHOICES)
            return SceneQuestion(
                question=question,
                answers=[answers[i] for i in answers_at],
                answer_label=int(np.flatnonzero(answers_at == 0)[0]),
                rationales=[rationales[i] for i in rationales_at],
                rationale_label=int(np.flatnonzero(rationales_at == 0)[0]),
                ambiguous=ambiguous,
            )
    return None


def write_vcr_scenes(folder: Path, splits: dict[str, int], seed: int = 0, questions: int = 3, progress: bool = True) -> dict[str, int]:
    """Write ``splits`` (train, val or test -> scenes) as VCR's files; returns the questions of each. The same arguments, the same files.

    ``images`` holds the pictures and, beside each, its metadata (boxes with a confidence, names, sizes); ``<split>.jsonl`` the questions.
    The lines of test have no labels, as VCR's. ``UsageError`` for another split.
    """
    unknown = sorted(set(splits) - {"train", "val", "test"})
    if unknown:
        raise UsageError(f"VCR has no split {unknown[0]!r}; it has train, val and test")
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    counts, first = dict[str, int](), 0
    with Progress("scenes", sum(splits.values()), "scenes", enabled=progress) as bar:
        for split, scenes in splits.items():
            lines: list[str] = []
            for number, index in enumerate(range(first, first + scenes)):
                lines += [json.dumps(line) for line in _write_scene(images, split, number, seed, index, questions, len(lines))]
                bar.update()
            write_atomically(folder / f"{split}.jsonl", "".join(line + "\n" for line in lines))
            counts[split], first = len(lines), first + scenes
    return counts


def _write_scene(images: Path, split: str, number: int, seed: int, index: int, count: int, before: int) -> Iterator[dict[str, Any]]:
    """Write picture and metadata of one scene; its lines of the questions' file, numbered from ``before``."""
    scene = compose(seed, index)
    names, stem = class_names(scene), f"scene-{index:06d}"
    draw(scene).save(images / f"{stem}.jpg", quality=90)
    boxes = [[*map(float, item.box), 1.0] for item in scene.objects]
    metadata = {"boxes": boxes, "segms": [[] for _ in boxes], "names": names, "width": SCENE_SIZE, "height": SCENE_SIZE}
    (images / f"{stem}.json").write_text(json.dumps(metadata), encoding="utf-8")
    for place_in_scene, question in enumerate(scene_questions(scene, seed, index, count)):
        labels = {"answer_label": question.answer_label, "rationale_label": question.rationale_label}
        yield {
            "annot_id": f"{split}-{before + place_in_scene}",
            "img_id": f"{split}-{number}",
            "img_fn": f"{stem}.jpg",
            "metadata_fn": f"{stem}.json",
            "objects": names,
            "question": question.question,
            "answer_choices": question.answers,
            "rationale_choices": question.rationales,
            "ambiguous": question.ambiguous,
            **(labels if split != "test" else {}),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m preprocessing.scenes.questions", description="Write composed scenes in VCR's format.")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--val", type=int, default=400, help="scenes to validate on")
    parser.add_argument("--test", type=int, default=0, help="scenes without labels")
    parser.add_argument("--questions", type=int, default=3, help="most questions about a scene")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other scenes")
    chosen = parser.parse_args(arguments)
    wanted = {split: getattr(chosen, split) for split in ("train", "val", "test") if getattr(chosen, split) > 0}
    counts = write_vcr_scenes(chosen.output, wanted, chosen.seed, chosen.questions)
    print(", ".join(f"{split} {count:,} questions" for split, count in counts.items()), f"in {chosen.output}")


if __name__ == "__main__":
    main()
