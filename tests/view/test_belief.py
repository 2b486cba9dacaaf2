"""What a model believes: the page's numbers are the model's own, found again by hand, and other people's texts are inert on it."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megainter import InterBertForRetrieval, InterBertProcessor
from megainter.data.feature_store.record import RegionRecord, StoreSchema
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from megainter.data.text.vocabulary import load_vocabulary
from megainter.errors import UsageError
from megainter.view.belief import Belief, believe, hidden_with, tokens_of, words_of
from megainter.view.belief_page import attention_style, shown_words, write_belief_page
from megainter.view.pictures import badge_places, region_boxes
from tests.model.test_attentions import run_alone
from tests.model.tiny import tiny_config, tiny_model
from tests.view.test_view import HOSTILE, Tags

ENTRIES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "##s", "dog", "and", "<", ">", "script", "&"]
NAMES = ("__background__", "cat", "<b>dog</b>", "tree", "sky", "sun", "road")
CAPTION = "red cats and a dog"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, a store with one image of five regions (the first two overlap), and its photo."""
    folder = tmp_path_factory.mktemp("belief")
    tiny_model().save_pretrained(folder / "model")
    (folder / "vocab.txt").write_text("\n".join(ENTRIES) + "\n")
    InterBertProcessor(load_vocabulary(folder / "vocab.txt"), 10, 12, 4).save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    boxes = np.array([[0, 0, 20, 20], [2, 0, 22, 20], [30, 0, 50, 20], [0, 10, 60, 30], [55, 25, 60, 30]], np.float32)
    record = RegionRecord(boxes, rng.standard_normal((5, 10)).astype(np.float16), rng.dirichlet(np.ones(7), 5).astype(np.float32), 60, 30)
    with FeatureStoreWriter(folder / "store", StoreSchema(10, len(NAMES), NAMES, "tiny")) as writer:
        writer.add("photo", record)
    seal_store(folder / "store")
    Image.fromarray(rng.integers(0, 255, (30, 60, 3), dtype=np.uint8)).save(folder / "photo.png")
    return folder


@pytest.fixture(scope="module")
def record(place: Path) -> RegionRecord:
    from megainter.data.feature_store import FeatureStore

    with FeatureStore(place / "store") as store:
        return store["photo"]


@pytest.fixture(scope="module")
def processor(place: Path) -> InterBertProcessor:
    return InterBertProcessor.from_pretrained(place / "model")


@pytest.fixture(scope="module")
def belief(record: RegionRecord, processor: InterBertProcessor) -> Belief:
    return believe(tiny_model(), processor, record, CAPTION, NAMES)


def rules(style: str) -> Iterator[tuple[int, int, int, dict[str, int]]]:
    """(layer, head with 0 for the mean, what is pointed at, the variables that then hold) of a page's style sheet.

    What is nested stands over what it is nested in, one variable at a time.
    """
    for layer, head, body in re.findall(r"^\.see:has\(#l(\d+):checked\):has\(#h(\d+):checked\)\{(.*)\}$", style, flags=re.MULTILINE):
        at_rest = variables(body.partition("&")[0])
        for query, values in re.findall(r"&:is\(:has\(#q(\d+):hover\)[^{]*\{([^}]*)\}", body):
            yield int(layer), int(head), int(query), at_rest | variables(values)


def variables(declarations: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"--(\w+):(\d+);", declarations)}


@torch.no_grad()
def test_the_attention_of_the_page_is_what_loops_find(belief: Belief, record: RegionRecord, processor: InterBertProcessor) -> None:
    """Every layer, head and row: what is lit up is the share that a loop over heads and rows computes, rounded to thousandths."""
    model, inputs = tiny_model(), processor.pack([CAPTION], [record])
    t, r = len(inputs.input_ids), len(inputs.region_features)
    words = model.interbert.text_embeddings(inputs.input_ids, torch.arange(t), inputs.token_type_ids)
    regions = model.interbert.region_embeddings(inputs.region_features, inputs.region_locations)
    encoder = model.interbert.encoder
    joint, states = run_alone(encoder.interaction, torch.cat([regions, words]))
    layers = [(0, shares) for shares in joint]
    layers += [(r, shares) for shares in run_alone(encoder.text, states[r:])[0]]
    layers += [(0, shares) for shares in run_alone(encoder.region, states[:r])[0]]

    seen = set()
    for layer, head, query, values in rules(attention_style(belief)):
        first, shares = layers[layer]
        row = (shares.mean(0) if head == 0 else shares[head - 1])[query - first]
        shown = [values.get(f"a{first + place}", 0) for place in range(len(row))]
        np.testing.assert_allclose(shown, 1000 * row.numpy(), atol=0.501)
        assert values["r"] == max([1, *shown[: max(r - first, 0)]])
        told = {place for place in range(r) if values.get(f"k{place}")}
        least = min((values.get(f"a{place}", 0) for place in told), default=0)
        assert len(told) == (0 if first else min(3, r - 1))
        assert 0 not in told
        assert all(values.get(f"a{place}", 0) <= least for place in range(1, r) if not first and place not in told)
        seen.add((layer, head, query))
    assert len(seen) == 2 * 5 * (t + r) + 1 * 5 * t + 2 * 4 * r


def test_what_is_not_looked_at_is_not_lit_by_the_average(belief: Belief) -> None:
    """Attention on single places: all others are dark, whatever stands in the rule around."""
    rng = np.random.default_rng(0)
    size, regions = belief.interaction[0].shape[-1], belief.regions
    sharp = np.eye(size, dtype=np.float32)[rng.integers(0, size, (4, size))]
    found = dataclasses.replace(belief, interaction=[sharp], text=[sharp[:, regions:, regions:]], region=[sharp[:, :regions, :regions]])
    for layer, head, query, values in rules(attention_style(found)):
        first, shares = [(0, sharp), (regions, found.text[0]), (0, found.region[0])][layer]
        row = (shares.mean(0) if head == 0 else shares[head - 1])[query - first]
        assert [values.get(f"a{first + place}", 0) for place in range(len(row))] == (1000 * row).round().astype(int).tolist()
        largest = max(values.get(f"a{place}", 0) for place in range(regions))
        assert values["r"] == max(1, largest if layer != 1 else 0)


@torch.no_grad()
def test_guesses_are_those_of_forward(belief: Belief, record: RegionRecord, processor: InterBertProcessor) -> None:
    model, batch = tiny_model(), processor([CAPTION], [record])
    assert belief.tokens == ["[CLS]", "red", "cat", "##s", "and", "a", "dog", "[SEP]"]
    assert belief.matching == pytest.approx(float(model(**batch).itm_logits.softmax(-1)[0, 0]))

    masked = dict(batch) | {"input_ids": batch["input_ids"].clone()}
    masked["input_ids"][0, [2, 3]] = ENTRIES.index("[MASK]")  # both pieces of "cats"
    shares = model(**masked).text_logits[0].softmax(-1)
    for hidden in belief.hidden_tokens[1:3]:
        expected = shares[hidden.position].topk(5)
        assert [guess.probability for guess in hidden.guesses] == pytest.approx(expected.values.tolist(), rel=1e-4)
        truth = int(batch["input_ids"][0, hidden.position])
        assert hidden.truth is not None
        assert hidden.truth.probability == pytest.approx(float(shares[hidden.position, truth]), rel=1e-4)
        assert hidden.rank == 1 + int((shares[hidden.position] > shares[hidden.position, truth]).sum())

    hidden_region = belief.hidden_regions[0]
    assert hidden_region.with_it == [1]
    features = torch.from_numpy(np.array(record.features[:4])).float()
    features[:2] = 0
    blanked = torch.cat([features.mean(0, keepdim=True), features])[None].half()
    probabilities = model(**dict(batch) | {"region_features": blanked}).region_logits[0, 1].softmax(-1).topk(5)
    assert [guess.probability for guess in hidden_region.guesses] == pytest.approx(probabilities.values.tolist(), rel=1e-4)
    assert [guess.name for guess in hidden_region.guesses] == [NAMES[i] for i in probabilities.indices]
    assert hidden_region.detected[0].name == NAMES[int(record.class_probs[0].argmax())]


def test_numbers_stand_apart_on_their_boxes() -> None:
    """As many as there are places for: 36 boxes of which many share a corner; a number alone stands in its box's upper left one."""
    rng = np.random.default_rng(0)
    corner = np.repeat(rng.uniform(0, 60, (9, 2)), 4, axis=0)
    boxes = np.concatenate([corner, corner + rng.uniform(15, 40, (36, 2))], axis=1).astype(np.float32)
    record = RegionRecord(boxes, np.zeros((36, 1), np.float16), rng.dirichlet(np.ones(3), 36).astype(np.float32), 100, 100)
    drawn = region_boxes(record, ("__background__", "a", "b"))
    places = badge_places(drawn, 1.0)
    assert sorted(places) == list(range(36))
    for box in drawn:
        left, top = places[box.row]
        assert box.left - 0.01 <= left <= box.left + box.width
        assert box.top - 0.01 <= top <= box.top + box.height
    apart = [abs(a[0] - b[0]) > 4.58 or abs(a[1] - b[1]) > 3.2 for a, b in itertools.combinations(places.values(), 2)]
    assert all(apart)
    assert badge_places(drawn[:1], 1.0) == {drawn[0].row: (drawn[0].left, drawn[0].top)}


def test_numbers_of_small_boxes_stand_beside_them() -> None:
    """Four boxes in one place, smaller than their numbers: one inside, the others around it; in a corner none beyond the image."""
    middle, corner = (_places_of_four(start) for start in (45.0, 97.0))
    assert all(abs(a[0] - b[0]) >= 7.99 or abs(a[1] - b[1]) >= 5.59 for a, b in itertools.combinations(middle, 2))
    assert all(0 <= left <= 92 and 0 <= top <= 94.4 for left, top in middle + corner)


def _places_of_four(start: float) -> list[tuple[float, float]]:
    """Where numbers 8 wide and 5.6 high stand of four boxes of side 3 that begin at (``start``, ``start``) of an image of side 100."""
    boxes = np.repeat(np.array([[start, start, start + 3, start + 3]], np.float32), 4, axis=0)
    record = RegionRecord(boxes, np.zeros((4, 1), np.float16), np.full((4, 3), 1 / 3, np.float32), 100, 100)
    return list(badge_places(region_boxes(record, ("__background__", "a", "b")), 1.0, 8.0).values())


def test_regions_beyond_what_the_model_takes_are_neither_hidden_nor_drawn(belief: Belief, record: RegionRecord) -> None:
    assert [hidden.row for hidden in belief.hidden_regions] == [0, 1, 2, 3]
    assert hidden_with(record, 4).shape == (4, 4)
    assert hidden_with(record, 4).sum() == 4 + 2


def test_a_caption_with_a_gap_is_asked_for_the_gap_alone(record: RegionRecord, processor: InterBertProcessor) -> None:
    found = believe(tiny_model(), processor, record, "a [MASK] cat and [MASK]", NAMES)
    assert [(hidden.position, hidden.truth, hidden.rank) for hidden in found.hidden_tokens] == [(2, None, None), (5, None, None)]
    ids = np.array([2, 6, 7, 8, 8, 9, 3])
    assert words_of(ids, processor.vocabulary) == [[1], [2, 3, 4], [5]]


def test_pieces_of_a_word_share_a_row_and_gaps_do_not(belief: Belief, record: RegionRecord, processor: InterBertProcessor) -> None:
    rows = [(row["word"], [piece["word"] for piece in row["pieces"]]) for row in shown_words(belief)]
    assert rows == [("red", ["red"]), ("cats", ["cat", "##s"]), ("and", ["and"]), ("a", ["a"]), ("dog", ["dog"])]
    gaps = shown_words(believe(tiny_model(), processor, record, "a [MASK] [MASK]", NAMES))
    assert [row["word"] for row in gaps] == ["[MASK]", "[MASK]"]


def test_an_unknown_word_is_shown_with_its_letters(processor: InterBertProcessor) -> None:
    vocabulary = processor.vocabulary
    for caption, told in (("A Zebra and 狗", ["a", "[UNK] for Zebra", "and", "[UNK] for 狗"]), ("zebra [MASK]", ["[UNK]", "[MASK]"])):
        ids = processor([caption])["input_ids"][0].numpy()
        assert tokens_of(caption, ids, vocabulary) == ["[CLS]", *told, "[SEP]"]
    cut = np.array([2, 5, 1, 3])
    assert tokens_of("a zebra and a dog", cut, vocabulary) == ["[CLS]", "a", "[UNK] for zebra", "[SEP]"]


def test_a_model_that_predicts_features_is_judged_by_their_direction(record: RegionRecord, processor: InterBertProcessor) -> None:
    found = believe(tiny_model(region_objective="feature"), processor, record, CAPTION, NAMES)
    assert all(hidden.guesses == [] for hidden in found.hidden_regions)
    assert all(hidden.cosine is not None and -1 <= hidden.cosine <= 1 for hidden in found.hidden_regions)


def page_of(place: Path, output: Path, caption: str = CAPTION, model: str = "model", title: str = "t", image_id: str = "photo") -> str:
    folder, photo = place / model, place / "photo.png"
    page = write_belief_page(output, title, model=folder, photo=photo, caption=caption, store=place / "store", image_id=image_id)
    return page.read_text()


def test_the_page_is_inert_and_names_no_other_place(place: Path, tmp_path: Path) -> None:
    page = page_of(place, tmp_path / "page.html", HOSTILE, title="<i>title</i>")
    tags = Tags(page)
    assert not {"script", "link", "iframe", "object", "form", "i"} & {tag for tag, _ in tags.found}
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "<b>dog" not in page
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"base64,[^\"]*", "", page))
    policy = next(meta for meta in tags.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_a_model_without_a_head_is_not_asked_for_what_it_cannot_say(place: Path, tmp_path: Path) -> None:
    """A folder of retrieval has the matching head alone: fresh weights would guess at random."""
    torch.manual_seed(0)
    InterBertForRetrieval(tiny_config()).save_pretrained(place / "retrieval")
    InterBertProcessor.from_pretrained(place / "model").save_pretrained(place / "retrieval")
    page = page_of(place, tmp_path / "page.html", model="retrieval")
    assert "Do they belong together?" in page
    assert "Where it looks" in page
    assert "guesses" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_what_does_not_fit_is_one_line(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'nobody'"):
        write_belief_page(
            tmp_path / "p.html",
            "t",
            model=place / "model",
            photo=place / "photo.png",
            caption="a",
            store=place / "store",
            image_id="nobody",
        )
    tiny_model(num_region_classes=9).save_pretrained(place / "other")
    InterBertProcessor.from_pretrained(place / "model").save_pretrained(place / "other")
    with pytest.raises(UsageError, match=r"knows 9 classes, and .* has 7"):
        page_of(place, tmp_path / "p.html", model="other")
