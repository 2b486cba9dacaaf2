"""How much each stage counts: the learned weight and temperature against brute force, and wherever pairs are scored by both."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from megainter.errors import UsageError
from megainter.tasks.retrieval.both import FILE, PULL, Sum, fit, sum_of
from megainter.tasks.retrieval.prefilter.candidates import Candidates, choose_candidates

CAPTIONS = np.repeat(np.arange(30), 2).astype(np.int32)


def task(seed: int = 0, noise: float = 2.0) -> tuple[Candidates, np.ndarray]:
    """Candidates of 60 captions and 30 images by noisy vectors, and log-odds of their pairs that are right more often than not."""
    rng = np.random.default_rng(seed)
    images = rng.standard_normal((30, 8))
    captions = images[CAPTIONS] + 1.2 * rng.standard_normal((60, 8))
    sides = (torch.nn.functional.normalize(torch.from_numpy(side).float(), dim=-1) for side in (captions, images))
    found = choose_candidates(*sides, 6)
    image, caption = np.divmod(found.keys, 60)
    return found, (2.0 * (CAPTIONS[caption] == image) + noise * rng.standard_normal(len(image))).astype(np.float32)


def brute_force(found: Candidates, scores: np.ndarray, scale: float, factors: tuple[float, float]) -> float:
    """The mean loss of both ways, question by question, and what pulls the factors to 1."""
    by_pair = dict(zip(found.keys.tolist(), scores.tolist(), strict=True))
    second, first = factors
    ways: tuple[list[float], list[float]] = ([], [])
    for way, near in enumerate((found.images, found.captions)):
        for query, (numbers, dots) in enumerate(zip(near.numbers.tolist(), near.scores.tolist(), strict=True)):
            pairs = [(number, query) if way == 0 else (query, number) for number in numbers]  # image, caption
            values = [
                second * by_pair[image * 60 + caption] + first * scale * dot for (image, caption), dot in zip(pairs, dots, strict=True)
            ]
            right = [CAPTIONS[caption] == image for image, caption in pairs]
            for place in np.flatnonzero(right):
                rivals = [value for i, value in enumerate(values) if i == place or not right[i]]
                ways[way].append(math.log(sum(map(math.exp, rivals))) - values[place])
    return sum(np.mean(way) for way in ways) / 2 + PULL * ((second - 1) ** 2 + (first - 1) ** 2)


def test_the_learned_sum_is_the_minimum_of_a_loss_written_out() -> None:
    found, scores = task()
    learned = fit(found, CAPTIONS, scores, scale=9.0)
    assert learned is not None
    factors = 1 / learned.temperature, learned.weight / learned.temperature
    expected = minimize(
        lambda x: brute_force(found, scores, 9.0, x), [0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-5, "fatol": 1e-10}
    )
    assert factors == pytest.approx(expected.x, rel=1e-2)
    assert brute_force(found, scores, 9.0, factors) == pytest.approx(expected.fun, abs=1e-6)


def test_a_stage_that_knows_nothing_counts_little() -> None:
    found, scores = task(noise=0.5)
    noise = np.random.default_rng(1).standard_normal(len(scores)).astype(np.float32)
    blind = fit(found, CAPTIONS, 5 * noise, 9.0)
    seeing = fit(found, CAPTIONS, scores, 9.0)
    assert blind is not None
    assert seeing is not None
    assert blind.weight > 5 * seeing.weight


def test_nothing_is_learned_where_nothing_is_right() -> None:
    found, scores = task()
    elsewhere = np.full(60, 99, np.int32)  # an image that is nobody's candidate
    assert fit(found, elsewhere, scores, 9.0) is None


def test_scores_add_up_as_learned_and_as_they_are() -> None:
    second, first = np.array([[1.0, -2.0]], np.float32), np.array([[4.0, 8.0]], np.float32)
    assert Sum().of(second, first).tolist() == (second + first).tolist()
    assert Sum(weight=0.5, temperature=2.0).of(second, first).tolist() == [[1.5, 1.0]]


def test_what_was_learned_holds_for_its_first_stage_alone(tmp_path: Path) -> None:
    assert sum_of(tmp_path, "a") == (Sum(), None)
    facts = {"weight": 0.5, "temperature": 2.0, "first_stage": "a", "pairs_digest": "p", "split": "val", "images": 10, "captions": 10,
             "candidates": 5, "format": 1}  # fmt: skip
    (tmp_path / FILE).write_text(json.dumps(facts))
    assert sum_of(tmp_path, "a") == (Sum(0.5, 2.0), None)
    both, told = sum_of(tmp_path, "b")
    assert both == Sum()
    assert told is not None
    assert "another first stage" in told
    for wrong in ({"temperature": 0}, {"weight": "nan"}, {"weight": -1}, {"more": 1}):
        (tmp_path / FILE).write_text(json.dumps(facts | wrong))
        with pytest.raises(UsageError, match=FILE):
            sum_of(tmp_path, "a")
