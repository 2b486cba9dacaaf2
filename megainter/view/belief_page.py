"""The page of what a model believes of a photo and a caption: static, the attention of all layers and heads in its style sheet."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.devices import torch_device
from megainter.errors import UsageError
from megainter.files import require_page_place
from megainter.model.folder import read_config
from megainter.model.processor import InterBertProcessor
from megainter.tasks.retrieval.search.photo import PhotoReader
from megainter.tasks.scoring.models import check_store, scored_model
from megainter.view.belief import Belief, Guess, HiddenRegion, HiddenToken, believe, open_model
from megainter.view.pages import plain, write_template
from megainter.view.pictures import RegionBox, badge_places, region_boxes, smallest_last, thumbnail

TOLD = 3  # regions whose share stands beside them
PHOTO = 720  # pixels of the photo's longer side
MEAN = "mean"  # of all heads
BACKGROUND = "__background__"  # class 0 of every store


def write_belief_page(
    output: Path,
    title: str,
    *,
    model: Path,
    photo: Path,
    caption: str,
    store: Path,
    image_id: str | None = None,
    weights: Path | None = None,
    other_detector: bool = False,
    device: str = "auto",
) -> Path:
    """Write the page to ``output`` and return it.

    Regions are those that ``store`` has under ``image_id``; without one its detector finds them in the photo. ``UsageError`` for files
    that are missing or do not fit each other.
    """
    require_page_place(output, "--output")
    folder = scored_model(model).path
    config = read_config(folder)
    with FeatureStore(store) as features:
        check_store(folder, config, features, other_detector)
        names = features.schema.class_names
        if config.num_region_classes != len(names):
            raise UsageError(f"{folder} knows {config.num_region_classes:,} classes, and {store} has {len(names):,}: another detector's")
        if image_id is not None:
            record = features[image_id]
        else:
            record = PhotoReader(features, weights, torch_device(device)).read(photo)
    processor = InterBertProcessor.from_pretrained(folder, split_special_tokens=False)
    asked, heads = open_model(folder, torch_device(device))
    belief = believe(asked, processor, record, caption, names, heads)
    facts = f"{plain(str(model))} on {plain(photo.name)}: {plain(caption)}"
    write_template(output, "belief.html", {"title": plain(title), "facts": facts} | shown_belief(belief, record, names, photo))
    return output


def shown_belief(belief: Belief, record: RegionRecord, names: tuple[str, ...], photo: Path) -> dict[str, Any]:
    """What the template shows."""
    boxes = [box for box in region_boxes(record, tuple(plain(name) for name in names)) if box.row < belief.regions - 1]
    return {  # "attention" and "lights" are made of numbers alone, and go into the style sheet as they are
        "picture": thumbnail(photo, PHOTO),
        "matching": belief.matching,
        "boxes": smallest_last(boxes),
        "badges": badge_places(boxes, record.width / record.height),
        "regions": belief.regions,
        "words": [plain(token) for token in belief.tokens],
        "layers": [name for name, _ in layers_of(belief)],
        "heads": [MEAN, *range(1, most_heads(belief) + 1)],
        "attention": attention_style(belief),
        "words_right": _first(belief.hidden_tokens),
        "regions_right": _agreeing(belief.hidden_regions),
        "pieces": len(belief.hidden_tokens),
        "hidden_words": shown_words(belief),
        "hidden_regions": [_shown_region(region, {box.row: box for box in boxes}) for region in belief.hidden_regions],
        "lights": "\n".join(_lights(region) for region in belief.hidden_regions),
    }


def layers_of(belief: Belief) -> list[tuple[str, NDArray[np.float32]]]:
    """Every layer by what it is called, from the first on: [h, L, L]."""
    streams = (("interaction", belief.interaction), ("text", belief.text), ("region", belief.region))
    return [(f"{kind} {number}", shares) for kind, layers in streams for number, shares in enumerate(layers, start=1)]


def most_heads(belief: Belief) -> int:
    """Heads of the layer that has most."""
    return max((len(shares) for _, shares in layers_of(belief)), default=0)


def attention_style(belief: Belief) -> str:
    """The rules by which the page lights up: variables --a0, --a1 and so on, of regions and then words, in thousandths of the attention
    of what is pointed at; --r and --w are the largest of regions and of words, and --k3 is 1 where region 3 is among those whose share is
    written. Made of numbers alone."""
    rules = [rule for layer, (name, shares) in enumerate(layers_of(belief)) for rule in _layer_rules(belief, layer, name, shares)]
    return "\n".join(rules)


def _layer_rules(belief: Belief, layer: int, name: str, shares: NDArray[np.float32]) -> Iterator[str]:
    """One rule for each head: what all look at on the average, and nested in it for each row what that one looks at."""
    first = belief.regions if name.startswith("text") else 0
    regions = max(belief.regions - first, 0)
    for head, matrix in enumerate([shares.mean(0), *shares]):
        whole = _thousandths(matrix.mean(0))
        rows = [f"&{_pointed(first + place)}{{{_variables(_thousandths(row), first, regions, whole)}}}" for place, row in enumerate(matrix)]
        yield f".see:has(#l{layer}:checked):has(#h{head}:checked){{{_variables(whole, first, regions)}{''.join(rows)}}}"
    if len(shares) < most_heads(belief):
        lacking = ",".join(f".h{head}" for head in range(len(shares) + 1, most_heads(belief) + 1))
        yield f".see:has(#l{layer}:checked) :is({lacking}){{opacity:.35}}"


def _thousandths(shares: NDArray[np.float32]) -> list[int]:
    return np.rint(1000 * shares.astype(np.float64)).astype(int).tolist()


def _pointed(place: int) -> str:
    """What the pointer is on comes before what has the keyboard's focus."""
    return f":is(:has(#q{place}:hover),:not(:has(.q:hover)):has(#q{place}:focus))"


def _variables(values: list[int], first: int, regions: int, over: list[int] | None = None) -> str:
    """Values from place ``first`` on, ``regions`` of them of regions: zeros left out, but for those that stand over another number."""
    under = over or [0] * len(values)
    shown = [f"--a{first + place}:{value}" for place, (value, other) in enumerate(zip(values, under, strict=True)) if value or other]
    largest = [f"--r:{max([1, *values[:regions]])}", f"--w:{max([1, *values[regions:]])}"]
    told, before = _told(values[:regions]), _told(under[:regions]) if over else set()
    written = [f"--k{first + place}:{int(place in told)}" for place in sorted(told ^ before)]
    return ";".join([*largest, *shown, *written, ""])


def _told(shares: list[int]) -> set[int]:
    """The places of the regions that most is looked at, without the whole photo's, which stands first and beside the photo."""
    order = sorted(range(1, len(shares)), key=lambda place: -shares[place])
    return {place for place in order[:TOLD] if shares[place]}


def shown_words(belief: Belief) -> list[dict[str, Any]]:
    """A row for each word that was hidden, with what stood and was guessed in the place of each of its pieces; one for each [MASK]."""
    rows = [list(tokens) for _, tokens in groupby(belief.hidden_tokens, key=lambda token: token.word if token.truth else -token.position)]
    return [{"word": _joined(belief, row), "pieces": [_shown_token(belief, token) for token in row]} for row in rows]


def _joined(belief: Belief, word: list[HiddenToken]) -> str:
    """The pieces of a word as one, of those after the first without the "##" that marks them."""
    first, *rest = (belief.tokens[token.position] for token in word)
    return plain(first + "".join(piece.removeprefix("##") for piece in rest))


def _shown_token(belief: Belief, hidden: HiddenToken) -> dict[str, Any]:
    guesses = [_shown_guess(guess) | {"right": hidden.truth is not None and guess.name == hidden.truth.name} for guess in hidden.guesses]
    truth = _shown_guess(hidden.truth) if hidden.truth is not None else None
    return {"word": plain(belief.tokens[hidden.position]), "truth": truth, "rank": hidden.rank, "guesses": guesses}


def _first(hidden: list[HiddenToken]) -> int:
    """Tokens that are the model's first guess."""
    return sum(token.rank == 1 for token in hidden)


def _agreeing(hidden: list[HiddenRegion]) -> int:
    """Regions of which model and detector name the same class first."""
    return sum(bool(region.guesses) and region.guesses[0].name == region.detected[0].name for region in hidden)


def _shown_region(hidden: HiddenRegion, boxes: dict[int, RegionBox]) -> dict[str, Any]:
    likeliest = hidden.detected[0].name
    guesses = [_shown_guess(guess) | {"right": guess.name == likeliest} for guess in hidden.guesses]
    detected = [_shown_guess(guess) for guess in hidden.detected[:3]]
    return {"row": hidden.row, "with_it": hidden.with_it, "detected": detected, "guesses": guesses, "cosine": hidden.cosine}


def _shown_guess(guess: Guess) -> dict[str, Any]:
    return {"name": "background" if guess.name == BACKGROUND else plain(guess.name), "probability": guess.probability}


def _lights(hidden: HiddenRegion) -> str:
    """The region of the row that is pointed at is lit up on the photo, and those that were hidden with it."""
    here = f".hid:has(#g{hidden.row}:is(:hover,:focus))"
    others = ",".join(f".n{row}" for row in hidden.with_it)
    return f"{here} .n{hidden.row}{{--on:1}}" + (f"{here} :is({others}){{--on:1;border-style:dashed}}" if others else "")
