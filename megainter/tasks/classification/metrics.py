"""What a classifier's answers are worth: the figures of GLUE, VQA and NLVR2. Pure numpy, scipy and scikit-learn; no model.

N examples. A prediction is the number of a class, or a value; so figures need no logits, and do not depend on who computed which.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

from megainter.data.tables.labelled import Examples, Problem, answer_accuracy
from megainter.errors import UsageError

LARGER_IS_BETTER = ("accuracy", "f1", "matthews", "consistency", "pearson", "spearman", "vqa_accuracy", "soft_accuracy")


@dataclass(frozen=True, eq=False)
class Labels:
    """What is right, with classes by their numbers among ``classes``.

    ``values`` float64 [N]: class (single_label), value (regression), NaN where it is not public; unused for multi_label. There
    ``scores`` has a dict for each example, {class: (soft target, annotators who gave it)}, without answers that are no class, and
    ``annotators`` int64 [N] says how many there were (0: nobody counted). ``kinds`` and ``groups`` as in ``Example``.
    """

    problem: Problem
    classes: tuple[str, ...]
    values: NDArray[np.float64]
    scores: tuple[dict[int, tuple[float, int]], ...]
    annotators: NDArray[np.int64]
    kinds: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    known: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.groups)


def labels_of(examples: Examples, classes: tuple[str, ...]) -> Labels:
    """The labels of examples, where ``classes`` are a model's. ``UsageError`` where one of them is none of the model's classes."""
    numbers = {name: number for number, name in enumerate(classes)}
    problem, names, targets = examples.task.problem, examples.column("labels"), examples.column("targets")
    values, scores = np.full(len(examples), np.nan), tuple[dict[int, tuple[float, int]], ...]()
    counts = [count or [0] * len(label) for count, label in zip(examples.column("counts"), names, strict=True)]
    if problem == "regression":
        values = np.array([target[0] if target else np.nan for target in targets], dtype=np.float64)
    elif problem == "single_label":
        _refuse_unknown(examples, names, numbers)
        values = np.array([numbers[label[0]] if label else np.nan for label in names], dtype=np.float64)
    else:
        rows = zip(names, targets, counts, strict=True)
        scores = tuple(
            {numbers[name]: (target, count) for name, target, count in zip(*row, strict=True) if name in numbers} for row in rows
        )
    known = np.array([bool(target) for target in targets], dtype=bool)
    annotators = np.array([sum(count) for count in counts], dtype=np.int64)
    kinds = tuple(tuple(kind) for kind in examples.column("kinds"))
    return Labels(
        problem=problem,
        classes=classes,
        values=values,
        scores=scores,
        annotators=annotators,
        kinds=kinds,
        groups=tuple(examples.column("group")),
        known=known,
    )


def _refuse_unknown(examples: Examples, names: list[list[str]], numbers: dict[str, int]) -> None:
    unknown = sorted({label for row in names for label in row} - set(numbers))
    if unknown:
        raise UsageError(f"{examples.task.name}: label {unknown[0]!r} is none of the model's classes, {', '.join(list(numbers)[:10])}")


def right(labels: Labels, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
    """How right each prediction is, [N]: 1 or 0; multi_label: the soft target; regression: 1 where it is off by less than a half."""
    if labels.problem == "multi_label":
        return np.array([score.get(int(given), (0.0, 0))[0] for score, given in zip(labels.scores, predictions, strict=True)])
    if labels.problem == "regression":
        return (np.abs(predictions - labels.values) < 0.5).astype(np.float64)
    return (predictions == labels.values).astype(np.float64)


def figures(labels: Labels, predictions: NDArray[np.float64]) -> dict[str, float]:
    """The figures of a task, from predictions [N] of examples that all have labels.

    single_label: accuracy, f1 (of class 1 where there are two, else the mean over classes), matthews, and consistency where examples have
    groups: the share of groups that are right throughout (NLVR2). regression: pearson, spearman (0 where one side is constant),
    mean_squared_error. multi_label: soft_accuracy, and vqa_accuracy where annotators were counted.
    """
    if labels.problem == "regression":
        return _correlations(labels.values, predictions)
    found = right(labels, predictions)
    if labels.problem == "multi_label":
        both = {"soft_accuracy": float(found.mean())}
        return both | ({"vqa_accuracy": float(_vqa(labels, predictions).mean())} if labels.annotators.any() else {})
    truth, given = labels.values.astype(np.int64), predictions.astype(np.int64)
    average = "binary" if len(labels.classes) == 2 else "macro"
    result = {
        "accuracy": float(found.mean()),
        "f1": float(metrics.f1_score(truth, given, average=average, zero_division=0.0)),
        "matthews": float(metrics.matthews_corrcoef(truth, given)),
    }
    return result | ({"consistency": consistency(labels.groups, found)} if any(labels.groups) else {})


def _correlations(truth: NDArray[np.float64], given: NDArray[np.float64]) -> dict[str, float]:
    constant = np.ptp(truth) == 0 or np.ptp(given) == 0
    both = (0.0, 0.0) if constant else (float(stats.pearsonr(truth, given).statistic), float(stats.spearmanr(truth, given).statistic))
    return {"pearson": both[0], "spearman": both[1], "mean_squared_error": float(np.square(truth - given).mean())}


def _vqa(labels: Labels, predictions: NDArray[np.float64]) -> NDArray[np.float64]:
    """VQA's accuracy of each answer, [N]; annotators whose answer is no class count like the others."""
    rows = zip(labels.scores, predictions, labels.annotators, strict=True)
    return np.array([answer_accuracy(score.get(int(given), (0.0, 0))[1], max(int(total), 1)) for score, given, total in rows])


def consistency(groups: tuple[str, ...], found: NDArray[np.float64]) -> float:
    """Share of the groups in which every prediction is right."""
    _, numbers = np.unique(np.array(groups), return_inverse=True)
    wrong = np.bincount(numbers, weights=1 - found)
    return float((wrong == 0).mean())


def by_kind(labels: Labels, predictions: NDArray[np.float64], figure: str) -> dict[str, dict[str, float]]:
    """For each kind of example how many there are, and how right they are: the mean of ``vqa_accuracy`` or of being right."""
    scores = _vqa(labels, predictions) if figure == "vqa_accuracy" else right(labels, predictions)
    members: dict[str, list[int]] = {}
    for row, kinds in enumerate(labels.kinds):
        for kind in kinds:
            members.setdefault(kind, []).append(row)
    name = "vqa_accuracy" if figure == "vqa_accuracy" else "accuracy"
    return {kind: {"examples": len(rows), name: float(scores[rows].mean())} for kind, rows in sorted(members.items())}
