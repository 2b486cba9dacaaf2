"""Image-text contrast over the global batch, against a double loop; and the captions drawn by its vectors, against counting."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megainter.config.reading import load_config
from megainter.data.packed import region_rows
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.tasks.contrast import Gathering, Vectors, add_vectors, answered, compare, compare_in_steps
from megainter.tasks.pretraining.batches import PretrainBatch, PretrainStream
from megainter.tasks.pretraining.fresh import choose, with_fresh_captions
from megainter.tasks.pretraining.objective import ObjectiveWeights, PretrainingStep
from megainter.tasks.pretraining.sampling import Draws, Sampler
from megainter.tasks.pretraining.sources import open_sources
from megainter.training.arrival import Arrivals
from megainter.training.world import World
from tests.synthetic import TINY, settings, write_data

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def vectors_of(samples: int, size: int = 6, seed: int = 0, scale: float = 9.0) -> Vectors:
    """Random vectors, of which some share their image (every fifth is followed by another caption of it) or their text."""
    generator = torch.Generator().manual_seed(seed)
    sides = torch.nn.functional.normalize(torch.randn(2, samples, size, generator=generator), dim=-1)
    rows = torch.arange(samples)
    images = torch.where(rows % 5 == 1, rows - 1, rows)
    texts = torch.where(rows % 7 == 3, 3, rows + 1000)
    return Vectors(sides[0], sides[1], torch.tensor([math.log(scale)]), torch.stack([images, texts, rows], dim=1))


def brute_force(texts: torch.Tensor, regions: torch.Tensor, log_scale: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The loss of each sample by a double loop, in the dtype given."""
    losses = []
    for i in range(len(texts)):
        rivals = [j for j in range(len(texts)) if j == i or (keys[j, 0] != keys[i, 0] and keys[j, 1] != keys[i, 1])]
        ways = []
        for asking, answering in ((texts, regions), (regions, texts)):
            logits = torch.stack([log_scale[0].exp() * (asking[i] * answering[j]).sum() for j in rivals])
            ways.append(torch.logsumexp(logits, 0) - logits[rivals.index(i)])
        losses.append((ways[0] + ways[1]) / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("block", [1024, 4])
def test_losses_and_gradients_are_those_of_a_double_loop(block: int) -> None:
    vectors = vectors_of(22)
    found = compare(vectors, block)
    leaves = [tensor.double().requires_grad_() for tensor in (vectors.texts, vectors.regions, vectors.log_scale)]
    losses = brute_force(*leaves, vectors.keys)
    losses.sum().backward()
    assert found.losses.double() == pytest.approx(losses.detach(), abs=1e-5)
    for ours, leaf in zip((found.text_gradient, found.region_gradient, found.scale_gradient), leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(ours.double(), leaf.grad, rtol=1e-4, atol=1e-5)


def test_right_answers_are_counted_both_ways_and_the_scale_is_bounded() -> None:
    vectors = vectors_of(10)
    same = Vectors(vectors.texts, vectors.texts, torch.tensor([50.0]), vectors.keys)
    found = compare(same)
    assert found.right.tolist() == [1.0] * 10
    assert found.losses.isfinite().all()
    assert found.scale_gradient.item() == 0, "beyond 100 it no longer grows"
    turned = compare(Vectors(vectors.texts, vectors.texts.roll(1, 0), vectors.log_scale, torch.arange(30).view(10, 3)))
    assert turned.right.tolist() == [0.0] * 10


def test_comparing_in_steps_adds_up_its_parts() -> None:
    vectors = vectors_of(11)
    parts = [compare(Vectors(*(t[at : at + 4] for t in (vectors.texts, vectors.regions)), vectors.log_scale, vectors.keys[at : at + 4]))
             for at in (0, 4, 8)]  # fmt: skip
    sums = compare_in_steps(vectors, 4)
    assert sums.tolist() == pytest.approx([sum(float(p.losses.sum()) for p in parts), sum(float(p.right.sum()) for p in parts)], rel=1e-6)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PretrainStream]:
    """The training stream of a tiny run with contrast; 24 samples a step, in micro-batches of 8."""
    folder = tmp_path_factory.mktemp("contrast")
    given = settings(*write_data(folder), folder / "run", training__itc_weight=1.0, training__global_batch=24, training__micro_batch=8,
                     data__batch_negatives=0.5)  # fmt: skip
    config = load_config(None, given)
    config.output.mkdir()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield open_sources(config, 0, 1).training
    dist.destroy_process_group()


def model_for(stream: PretrainStream, **changes: float) -> InterBertForPreTraining:
    torch.manual_seed(3)
    schema = stream.sampler.store.schema
    sizes = {"vocab_size": 60, "region_feature_size": schema.feature_size, "num_region_classes": schema.num_classes, "itc_size": 12}
    return InterBertForPreTraining(InterBertConfig(**sizes, **TINY, initializer_range=0.1, **changes)).train()


def gathered(step: PretrainingStep, batches: list[PretrainBatch], seed: Callable[[int], Any]) -> Vectors:
    """The vectors of a step of 24 samples, all of one process."""
    gathering = Gathering(24, ALONE)
    add_vectors(gathering, step, Arrivals(CPU), batches, seed)
    return gathering.all()


def test_sides_are_own_captions_and_regions_without_masks(stream: PretrainStream) -> None:
    sampler = stream.sampler
    for batch in stream[0]:
        assert batch.sides is not None
        with torch.autocast("cpu", torch.bfloat16):
            alone = batch.sides.inputs(batch.inputs)
        assert alone.region_features.dtype == batch.inputs.region_features.dtype, "autocast leaves them as they are"
        rows = batch.sides.draws.rows
        assert batch.sides.keys[:, 2].tolist() == rows.tolist()
        captions = [[sampler.vocabulary.cls_id, *sampler.tokens[int(row)].tolist(), sampler.vocabulary.sep_id] for row in rows]
        assert [ids.tolist() for ids in alone.input_ids.split(batch.sides.text_lengths.tolist())] == captions
        images = [sampler.store[sampler.pairs.image_id(int(row))] for row in rows]
        features, locations, lengths = region_rows(images, 6)
        assert torch.equal(alone.region_locations, locations)
        assert alone.region_lengths.tolist() == [0] * len(rows) + lengths.tolist()
        torch.testing.assert_close(alone.region_features.float(), features.float(), rtol=2e-3, atol=1e-3)
        assert not torch.equal(batch.inputs.region_features, alone.region_features), "the batch itself is masked"


def test_contrast_drops_a_share_of_tokens_and_regions_and_nothing_else(stream: PretrainStream) -> None:
    """Against a search for what is left in what was there, in order; one of each sample stays, and pairs are as they were."""
    settings = replace(stream.settings, contrast_drop=0.4)
    sampler = stream.sampler
    dropping = PretrainStream(Sampler(sampler.pairs, sampler.store, sampler.tokens, sampler.vocabulary, settings), 0, 1)
    left, seen = np.zeros(2), np.zeros(2)
    for step in range(8):
        for usual, batch in zip(stream[step], dropping[step], strict=True):
            assert usual.sides is not None
            assert batch.sides is not None
            assert torch.equal(usual.inputs.region_features, batch.inputs.region_features)
            assert torch.equal(usual.inputs.input_ids, batch.inputs.input_ids)
            whole, alone = usual.sides.inputs(usual.inputs), batch.sides.inputs(batch.inputs)
            samples = len(batch.itm_labels)
            for text, part in zip(whole.input_ids.split(usual.sides.text_lengths.tolist()),
                                  alone.input_ids.split(batch.sides.text_lengths.tolist()), strict=True):  # fmt: skip
                words = iter(text.tolist())
                assert all(word in words for word in part.tolist()), "what is left stands in its order"
                assert (part[0], part[-1]) == (text[0], text[-1])
                assert len(part) > 2
                left[0], seen[0] = left[0] + len(part) - 2, seen[0] + len(text) - 2
            lengths = [each.region_lengths[samples:].tolist() for each in (whole, alone)]
            for image, part in zip(
                *(each.region_features.split(own) for each, own in zip((whole, alone), lengths, strict=True)), strict=True
            ):
                rows = iter(image)
                assert all(any(torch.equal(row, other) for other in rows) for row in part)
                assert torch.equal(part[0], image[0]), "the global region stays"
                left[1], seen[1] = left[1] + len(part) - 1, seen[1] + len(image) - 1
            assert len(alone.region_locations) == len(alone.region_features)
    assert (left / seen) == pytest.approx([0.6, 0.6], abs=0.06)


def test_captions_that_read_the_same_have_the_same_key(stream: PretrainStream) -> None:
    pairs = stream.sampler.pairs
    rows = np.arange(len(pairs))
    keys = stream.sampler.own_captions(Draws(rows * 0, rows, rows, rows, rows * 0)).keys
    texts = ["".join(filter(str.isalnum, caption.casefold())) for caption in pairs.captions(rows)]
    assert len(set(texts)) < len(texts), "there are equal ones"
    for i in range(len(rows)):
        for j in range(i):
            assert (keys[i, 1] == keys[j, 1]) == (texts[i] == texts[j])
    assert keys[:, 0].tolist() == pairs.image_numbers.tolist()


def test_micro_batches_get_the_gradient_of_the_whole_comparison_with_dropout(stream: PretrainStream) -> None:
    """Against one graph over all micro-batches at once and the double loop, by every parameter; the other losses weigh nothing."""
    model = model_for(stream)
    step = PretrainingStep(model, ObjectiveWeights(0.0, 0.0, 0.0, 1.0))
    batches = stream[1]
    seed = torch.manual_seed
    vectors = gathered(step, batches, seed)
    losses = []
    for micro, batch in enumerate(answered(batches, compare(vectors))):
        seed(micro)
        loss, tallies = step(batch, torch.tensor([1.0, 1.0, 1.0, 24.0]))
        loss.backward()
        losses.append(float(loss.detach()))
        assert tallies[0, 3].item() == pytest.approx(24 * losses[-1], rel=1e-5)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    model.zero_grad()
    parts = []
    for micro, batch in enumerate(batches):
        seed(micro)
        assert batch.sides is not None
        parts.append(model.vectors_packed(batch.sides.inputs(batch.inputs)))
    places = torch.cat([batch.sides.places for batch in batches if batch.sides is not None]).argsort()
    texts, regions = (torch.cat([part[side] for part in parts])[places] for side in (0, 1))
    assert torch.equal(vectors.texts, texts), "the pass before is the same pass, to the bit"
    whole = brute_force(texts, regions, parts[0][2], vectors.keys).mean()
    whole.backward()
    assert sum(losses) == pytest.approx(float(whole.detach()), rel=1e-5)
    touched = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
            touched += int(parameter.grad.abs().max() > 1e-4)
    assert touched > 40
    assert float(model.itc_head.log_scale.grad.abs()) > 1e-4


def test_fresh_captions_are_of_the_step_and_wrong_for_their_image(stream: PretrainStream) -> None:
    sampler, batches = stream.sampler, stream[2]
    model = model_for(stream).eval()
    vectors = gathered(PretrainingStep(model, ObjectiveWeights(itc=1.0)), batches, lambda micro: None)
    fresh = with_fresh_captions(batches, vectors, sampler)
    again = with_fresh_captions(batches, vectors, sampler)
    step_rows, shown = set(vectors.keys[:, 2].tolist()), []
    for before, after, same in zip(batches, fresh, again, strict=True):
        assert torch.equal(after.inputs.input_ids, same.inputs.input_ids), "drawn by the sample's own numbers"
        assert torch.equal(before.itm_labels, after.itm_labels)
        assert torch.equal(before.inputs.region_features, after.inputs.region_features)
        assert before.sides is not None
        drawn = sampler.drawn_in_step(before.sides.draws)
        old, new = (batch.inputs.input_ids.split(batch.inputs.text_lengths.tolist()) for batch in (before, after))
        assert all(torch.equal(a, b) for a, b, changed in zip(old, new, drawn, strict=True) if not changed)
        shown += [(int(row), text) for row, text, changed in zip(before.sides.draws.rows, new, drawn, strict=True) if changed]
    assert shown
    for row, text in shown:
        wrong = [other for other in step_rows if sampler.pairs.image_numbers[other] != sampler.pairs.image_numbers[row]]
        assert len(text) in {len(sampler.tokens[other]) + 2 for other in wrong}


def test_draws_are_in_proportion_to_the_softmax_of_the_similarity() -> None:
    vectors = vectors_of(12, scale=4.0)
    place, many = 6, 20_000
    chosen = choose(vectors, torch.full((many,), place), np.random.default_rng(1).random(many))
    allowed = [j for j in range(12) if vectors.keys[j, 0] != vectors.keys[place, 0] and vectors.keys[j, 1] != vectors.keys[place, 1]]
    assert sorted(set(allowed)) != list(range(12))
    logits = 4.0 * (vectors.texts[allowed] @ vectors.regions[place]).double()
    expected = dict(zip(allowed, logits.softmax(0).tolist(), strict=True))
    shares = {j: float((chosen == j).mean()) for j in range(12)}
    assert shares == pytest.approx({j: expected.get(j, 0.0) for j in range(12)}, abs=0.015)
    assert choose(vectors, torch.tensor([place]), np.array([1 - 2.0**-53]))[0] == allowed[-1]


def test_no_caption_is_drawn_where_all_are_right() -> None:
    vectors = vectors_of(4)
    keys = torch.tensor([[0, 1, 0], [0, 2, 1], [0, 3, 2], [5, 1, 3]])
    chosen = choose(Vectors(vectors.texts, vectors.regions, vectors.log_scale, keys), torch.tensor([0, 1]), np.array([0.5, 0.5]))
    assert chosen.tolist() == [-1, 3]


def test_what_needs_the_vectors_is_refused_without_them(tmp_path: Path) -> None:
    for name in ("data__batch_negatives", "model__itc_size"):
        with pytest.raises(UsageError, match=r"training\.itc_weight above 0"):
            load_config(None, settings(tmp_path, tmp_path, tmp_path / "run", **{name: 1}))
