"""How much the first stage's word counts beside the second's: learned on validation captions, kept in the model's folder.

A pair's score by both is ``(log-odds + weight * logit) / temperature``: InterBERT's log-odds that it matches, and the first stage's logit.
Its softmax over a query's candidates then says how likely each is the right one. A model that learned nothing has weight and temperature 1.

Shape letters: Q queries, K candidates of each.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from megainter.config.settings import STRICT, Positive
from megainter.errors import UsageError
from megainter.files import read_json
from megainter.tasks.retrieval.prefilter.candidates import Candidates

FILE = "both_stages.json"  # in the folder of a model
PULL = 1e-3  # nats that a factor of 0 or 2 costs: few captions, or such as are told apart in any case, leave both near 1
SMALLEST = 1e-3  # factor of the second stage: without it there would be no weight


@checked(frozen=True, config=STRICT)
class Learned:
    """What ``both_stages.json`` states. ``first_stage`` is the digest of what computes the vectors, for which alone this holds; the rest
    says what it was learned on."""

    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    first_stage: str
    pairs_digest: str
    split: str | None
    images: Positive
    captions: Positive
    candidates: Positive
    format: Literal[1] = 1


@dataclass(frozen=True)
class Sum:
    """How both stages' scores are added up."""

    weight: float = 1.0
    temperature: float = 1.0

    def of(self, second: NDArray[np.float32], first: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores float32 of pairs, of any shape, from the second stage's log-odds and the first stage's logits."""
        return np.divide(second + np.float32(self.weight) * first, self.temperature, dtype=np.float32)


def sum_of(model: Path, first_stage: str) -> tuple[Sum, str | None]:
    """What the model in a folder learned for the first stage of this digest, else both as they are; and what is to be said of that.

    ``UsageError`` where the file is not as it was written.
    """
    if not (model / FILE).is_file():
        return Sum(), None
    try:
        found = TypeAdapter(Learned).validate_python(read_json(model / FILE))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{model / FILE}: {place}: {first['msg']}; remove it, and both stages count alike") from None
    if found.first_stage != first_stage:
        return Sum(), f"{model / FILE} was learned with another first stage: both stages count alike"
    return Sum(found.weight, found.temperature), None


def fit(candidates: Candidates, image_of_caption: NDArray[np.integer], scores_P: NDArray[np.float32], scale: float) -> Sum | None:
    """The weight and temperature under which the right candidates of all queries, both ways, are likeliest; None where no query has any.

    ``scores_P`` are the log-odds of ``candidates.keys``. Every pair of a query and a right candidate is a question of one among that and
    the query's wrong ones, as in contrast; the minimum is unique.
    """
    numbers_I = np.arange(len(candidates.captions.numbers))
    of_captions = _questions(
        candidates.scores_of_captions(scores_P), scale * candidates.images.scores, candidates.images.numbers == image_of_caption[:, None]
    )
    of_images = _questions(
        candidates.scores_of_images(scores_P),
        scale * candidates.captions.scores,
        image_of_caption[candidates.captions.numbers] == numbers_I[:, None],
    )
    ways = [questions for questions in (of_captions, of_images) if len(questions)]
    return _minimum(ways) if ways else None


def _questions(second_QK: NDArray[np.float32], first_QK: NDArray[np.float32], right_QK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """float64 [questions, K, 2]: what both stages say of each candidate less what they say of the right one; -inf for other right ones."""
    query, right = np.nonzero(right_QK)
    both_QK2 = np.stack([second_QK, first_QK], axis=2).astype(np.float64)
    questions = both_QK2[query] - both_QK2[query, right][:, None]
    others = right_QK[query]
    others[np.arange(len(query)), right] = False
    questions[others] = -np.inf
    return questions


def _minimum(ways: list[NDArray[np.float64]]) -> Sum:
    """Newton's method would do; scipy's bounded quasi-Newton keeps the factors from the wrong side of 0."""
    from scipy.optimize import minimize

    masked = [(np.where(np.isfinite(questions), questions, 0.0), np.isfinite(questions[..., 0])) for questions in ways]

    def loss(factors: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        total, slope = PULL * float(((factors - 1) ** 2).sum()), 2 * PULL * (factors - 1)
        for questions, asked in masked:
            logits = np.where(asked, questions @ factors, -np.inf)
            largest = logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits - largest)
            sums = exponentials.sum(axis=1, keepdims=True)
            total += float((np.log(sums) + largest).mean()) / len(masked)
            slope = slope + np.einsum("qk,qkf->f", exponentials / sums, questions) / (len(questions) * len(masked))
        return total, slope

    found: Any = minimize(loss, np.ones(2), jac=True, method="L-BFGS-B", bounds=[(SMALLEST, None), (0.0, None)], options={"ftol": 1e-12})
    second, first = map(float, found.x)
    return Sum(weight=first / second, temperature=1 / second)
