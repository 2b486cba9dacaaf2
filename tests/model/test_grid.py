"""The grid gives the numbers of the packed door over all pairs, for every depth of the three stacks."""

import pytest
import torch

from megainter.data.packed import PackedInputs
from megainter.model.grid import EmbeddedRows, embed_captions, embed_images, score_grid, score_pairs
from megainter.model.interbert import InterBertForRetrieval
from tests.model.tiny import tiny_config

TEXTS, REGIONS = (5, 9, 3, 5, 7), (4, 2, 6)


def model_of(interaction: int, text: int, region: int, **changes: object) -> InterBertForRetrieval:
    torch.manual_seed(1)
    config = tiny_config(
        num_interaction_layers=interaction, num_text_layers=text, num_region_layers=region, initializer_range=0.3, pooler_size=24, **changes
    )
    return InterBertForRetrieval(config).eval()


def expected(model: InterBertForRetrieval, ids: torch.Tensor, features: torch.Tensor, locations: torch.Tensor) -> torch.Tensor:
    """Every pair packed by itself and scored by the ordinary door, [I, C]."""
    scores = torch.empty(len(REGIONS), len(TEXTS))
    for i, (f, b) in enumerate(zip(features.split(REGIONS), locations.split(REGIONS), strict=True)):
        for c, t in enumerate(ids.split(TEXTS)):
            inputs = PackedInputs(t, torch.zeros_like(t), torch.tensor([len(t)]), f, b, torch.tensor([len(f)]))
            scores[i, c] = model.score_packed(inputs)
    return scores


def embedded(model: InterBertForRetrieval) -> tuple[EmbeddedRows, EmbeddedRows, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, 50, (sum(TEXTS),), generator=generator)
    features = torch.randn(sum(REGIONS), 10, generator=generator)
    locations = torch.rand(sum(REGIONS), 5, generator=generator)
    with torch.no_grad():
        captions = embed_captions(model, ids, torch.tensor(TEXTS))
        return captions, embed_images(model, features, locations, torch.tensor(REGIONS)), expected(model, ids, features, locations)


@pytest.mark.parametrize("depths", [(2, 2, 1), (1, 1, 2), (0, 2, 2), (2, 0, 0), (0, 0, 0), (3, 0, 1)])
@pytest.mark.parametrize("fusion", ["mul", "sum"])
def test_scores_equal_those_of_the_packed_door(depths: tuple[int, int, int], fusion: str) -> None:
    model = model_of(*depths, fusion=fusion)
    captions, images, wanted = embedded(model)
    found = score_grid(model, captions, images)
    assert wanted.std() > 1e-2
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("depths", [(2, 2, 1), (2, 0, 0)])
@pytest.mark.parametrize("regions", ["states", "mean_feature", "first_feature"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("name", ["itm_similarity", "itm_vectors"])
def test_nearness_is_that_of_the_packed_door(depths: tuple[int, int, int], pooling: str, regions: str, name: str) -> None:
    model = model_of(*depths, itc_size=6, itc_pooling=pooling, itc_regions=regions, **{name: True})
    captions, images, wanted = embedded(model)
    torch.testing.assert_close(score_grid(model, captions, images), wanted, atol=1e-5, rtol=2e-5)
    setattr(model, name, None)
    assert (score_grid(model, captions, images) - wanted).abs().median() > 0.1


def test_a_pair_does_not_see_its_neighbours() -> None:
    """One caption against one image, alone, scores as it does inside the grid."""
    model = model_of(2, 2, 2)
    captions, images, _ = embedded(model)
    whole = score_grid(model, captions, images)
    first = (
        EmbeddedRows(captions.rows_NH[: TEXTS[0]], captions.lengths[:1]),
        EmbeddedRows(images.rows_NH[-REGIONS[-1] :], images.lengths[-1:]),
    )
    torch.testing.assert_close(score_grid(model, *first), whole[-1:, :1], atol=2e-6, rtol=2e-5)


def test_some_pairs_score_as_in_the_grid() -> None:
    """Any pairs in any order, some images and captions in none; all pairs in the grid's order give its very bits."""
    model = model_of(2, 2, 2)
    captions, images, _ = embedded(model)
    whole = score_grid(model, captions, images)
    caption_S, image_S = torch.tensor([4, 0, 2, 0, 4]), torch.tensor([2, 0, 2, 2, 0])
    torch.testing.assert_close(score_pairs(model, captions, images, caption_S, image_S), whole[image_S, caption_S], atol=2e-6, rtol=2e-5)
    image_S, caption_S = (numbers.flatten() for numbers in torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij"))
    assert torch.equal(score_pairs(model, captions, images, caption_S, image_S), whole.flatten())
