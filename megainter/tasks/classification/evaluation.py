"""Measuring a classifier: accuracy and its kin on labelled examples, and predictions for those whose labels are not public.

`training` makes the model. The figures are those of GLUE, VQA and NLVR2 (`metrics`).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.integers import Int64s
from megainter.data.tables.labelled import Examples, read_examples
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import NumericsError, UsageError
from megainter.files import require_file_place, sha256_of, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import model_digest, read_config, read_vocabulary
from megainter.model.interbert import InterBertForSequenceClassification
from megainter.tasks.classification.batches import EncodedExamples, encode_examples, fixed_batches, with_regions
from megainter.tasks.classification.head import PROBLEM_TYPES, outcome
from megainter.tasks.classification.metrics import by_kind, figures
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.classification.report import ClassificationReport, named_predictions, summary, write_predictions
from megainter.tasks.classification.submission import submission_ids, write_submission
from megainter.tasks.scoring.file import open_score_file
from megainter.tasks.scoring.models import (
    DTYPES,
    USUAL_LENGTH,
    check_store,
    choose_devices,
    choose_precision,
    keep_reports,
    load_model,
    scored_model,
)
from megainter.tasks.scoring.running import run
from megainter.weights import Located

KEPT = ("prediction", "score", "loss")  # of each example, in this order
EXAMPLES_WORTH_A_PROCESS = 20  # times its cost, beside that of a pair of caption and image
USUAL_TOKENS = 128


def evaluate(model: Path, options: ClassificationEvaluation) -> ClassificationReport:
    """Predict every example of ``split``; figures go to ``options.output`` (JSON), predictions to ``<output>.predictions.parquet``.

    ``model`` is a Hugging Face folder of a classifier with its vocabulary; labels are compared with its classes by name. ``store`` has the
    regions of the images, where there are some; a share ``max_bad`` of the images may lack them. Lengths that are None are
    those of training. ``submission``: also the file that the task's benchmark takes, of all examples or not at all. The figures are equal
    to the last digit for any number of ``processes``. Started again after a kill, the same call goes on where it was.

    Raises ``UsageError`` for inputs that do not fit each other, ``NumericsError`` naming an example whose score is not a number.
    """
    predictions = options.output.with_name(f"{options.output.stem}.predictions.parquet")
    _check(options, predictions)
    located = scored_model(model)
    keep_reports(options.output, located.path, options.replace, options.submission)
    model = located.path
    encoded, examples, ids, facts = _open_inputs(located, options)

    # What is predicted, and by whom.
    precision = choose_precision(options.precision, options.device)
    work = ExamplesToScore(model, encoded, tuple(fixed_batches(encoded, options.batch)), precision)
    cost = len(examples) * EXAMPLES_WORTH_A_PROCESS * max(examples.images, 1)
    devices = choose_devices(options.device, precision, options.processes, cost, len(work.batches))
    vocabulary = facts.pop("vocabulary")
    facts |= {"precision": precision, "device": devices[0].type}

    # Scores, kept on the disk until the report is written.
    plan = facts | {"vocabulary": vocabulary, "batch": options.batch, "torch": str(torch.__version__)}
    with open_score_file(options.output, plan, len(examples), len(KEPT), len(work.batches)) as file:
        seconds, _ = run(work, file, devices, "examples", lambda chunk, scores: _require_numbers(scores, examples, work.places(chunk)))
        found = np.array(file.scores)
        write_predictions(predictions, examples, encoded, found)
        if options.submission is not None:
            write_submission(options.submission, examples.task.name, ids, named_predictions(encoded, found))
        measured = _measured(examples, encoded, found)
        report = ClassificationReport(
            **facts,
            **measured,
            processes=len(devices),
            seconds=seconds,
            predictions=predictions.name,
            predictions_sha256=sha256_of(predictions),
            submission=str(options.submission) if options.submission is not None else None,
        )
        write_json(options.output, asdict(report))
    print(summary(report), flush=True)
    return report


def _open_inputs(found: Located, options: ClassificationEvaluation) -> tuple[EncodedExamples, Examples, list[str], dict[str, Any]]:
    """What is predicted, encoded and as it was read; the ids a benchmark's file needs; and what the report says of it."""
    model, config = found.path, read_config(found.path)
    vocabulary = check_classifier(model, config)
    tokens = options.max_text_tokens or config.max_text_tokens or USUAL_TOKENS
    regions = options.max_regions or config.max_regions or USUAL_LENGTH
    if not 5 <= tokens <= config.max_position_embeddings:
        raise UsageError(f"--max-text-tokens is {tokens}; give 5 to {config.max_position_embeddings}, what {model} has positions for")

    everything = read_examples(options.examples, options.split)
    store = _open_store(model, config, everything, options.examples, options.store, options.other_detector)
    examples = everything if store is None else with_regions(everything, store, options.max_bad, options.examples, "--max-bad")
    missing = len(everything) - len(examples)
    ids = submission_ids(options.examples, everything) if options.submission is not None else []
    if options.submission is not None and missing:
        raise UsageError(f"--submission needs all {len(everything):,} examples, and {missing:,} have no regions: extract their images")

    encoded = encode_examples(examples, class_names(config), vocabulary, tokens, store, regions, config.region_feature_size)
    facts: dict[str, Any] = {
        "task": examples.task.name, "split": options.split, "count": len(examples), "missing_examples": missing, "max_regions": regions,
        "max_text_tokens": tokens, "model": found.name, "model_digest": model_digest(model), "examples": str(options.examples),
        "examples_digest": examples.digest, "store": str(options.store) if options.store is not None else None,
        "store_digest": store.digest if store is not None else None, "vocabulary": vocabulary.digest,
    }  # fmt: skip
    return encoded, examples, ids, facts


def _check(options: ClassificationEvaluation, predictions: Path) -> None:
    for option, number in (("--batch", options.batch), ("--processes", options.processes)):
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}; give at least 1")
    if not 0 <= options.max_bad <= 1:
        raise UsageError(f"--max-bad is {options.max_bad}; give a share, 0 to 1")
    for option, path in (("--output", options.output), ("--output's predictions", predictions), ("--submission", options.submission)):
        if path is not None:
            require_file_place(path, option)


def check_classifier(folder: Path, config: InterBertConfig) -> Vocabulary:
    """The vocabulary of a classifier's folder; ``UsageError`` where it is another model, or does not say what its logits mean."""
    if config.problem_type not in PROBLEM_TYPES.values() or "InterBertForSequenceClassification" not in (config.architectures or ()):
        raise UsageError(f"{folder} is no classifier; `megainter finetune classification` makes one, in the folder `model` of its run")
    return read_vocabulary(folder, config)


def class_names(config: InterBertConfig) -> tuple[str, ...]:
    """A classifier's classes in the order of its logits; none for regression."""
    if config.problem_type == PROBLEM_TYPES["regression"]:
        return ()
    names: dict[int, str] = config.id2label  # type: ignore[assignment]
    return tuple(names[number] for number in sorted(names))


def _open_store(
    model: Path, config: InterBertConfig, examples: Examples, path: Path, store: Path | None, other_detector: bool
) -> FeatureStore | None:
    """The store of the examples' images; ``UsageError`` where task, model, images and store do not fit each other."""
    if PROBLEM_TYPES[examples.task.problem] != config.problem_type:
        raise UsageError(f"{path} is for {examples.task.problem}, and {model} was trained for {config.problem_type}")
    trained = getattr(config, "num_images", examples.images)
    if examples.images != trained:
        raise UsageError(f"the examples of {path} have {examples.images} images each, and {model} was trained with {trained}")
    if (store is None) != (examples.images == 0):
        which = "have images; give their regions as --store" if examples.images else "have no images; leave --store out"
        raise UsageError(f"the examples of {path} {which}")
    if store is None:
        return None
    opened = FeatureStore(store)
    check_store(model, config, opened, other_detector)
    return opened


@dataclass(frozen=True, eq=False)
class ExamplesToScore:
    """Everything a process needs to score any batch."""

    model: Path
    examples: EncodedExamples
    batches: tuple[Int64s, ...]
    precision: str

    def __len__(self) -> int:
        return len(self.batches)

    def places(self, chunk: int) -> Int64s:
        """Numbers of the examples of a batch."""
        return self.batches[chunk]

    def units(self, chunk: int) -> int:
        """Examples of a batch."""
        return len(self.batches[chunk])

    def scorer(self, device: torch.device) -> "BatchScorer":
        return BatchScorer(self, device)


class BatchScorer:
    """The classifier on one device, and the batches it scores."""

    def __init__(self, work: ExamplesToScore, device: torch.device) -> None:
        self.work, self.device = work, device
        self.model = load_model(work.model, InterBertForSequenceClassification)
        torch.nn.Module.to(self.model, device=device, dtype=DTYPES[work.precision])

    @torch.inference_mode()
    def score(self, chunk: int) -> NDArray[np.float32]:
        """What is kept of each example of a batch, [examples, 3] (``KEPT``)."""
        batch = self.work.examples.batch(self.work.batches[chunk]).to(self.device)
        kept = outcome(self.model.score_packed(batch.inputs), batch.labels, self.model.config)
        return kept.T.astype(np.float32)


def _require_numbers(kept: NDArray[np.float32], examples: Examples, rows: Int64s) -> None:
    bad = ~np.isfinite(kept[:, :2]).all(1)
    if bad.any():
        example = examples[int(rows[bad.argmax()])].example_id
        raise NumericsError(f"the score of example {example!r} is no number: weights are not finite, or --precision is too narrow")


def _measured(examples: Examples, encoded: EncodedExamples, found_N3: NDArray[np.float32]) -> dict[str, Any]:
    """Figures where all labels are public; none where none is. ``UsageError`` where some are."""
    labels, given = encoded.labels, found_N3[:, 0].astype(np.float64)
    if not labels.known.any():
        return {"figures": {}, "by_kind": {}}
    if not labels.known.all():
        unknown = int((~labels.known).sum())
        raise UsageError(f"{unknown:,} of {len(labels):,} examples have no label, the others have: evaluate them apart")
    loss = {"loss": float(found_N3[:, 2].astype(np.float64).mean())}
    return {"figures": figures(labels, given) | loss, "by_kind": by_kind(labels, given, examples.task.figure)}
