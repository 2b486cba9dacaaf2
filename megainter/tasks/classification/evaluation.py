"""Measuring a classifier: accuracy and its kin on labelled examples, and predictions for those whose labels are not public.

`classification_training` makes the model. The figures are those of GLUE, VQA and NLVR2 (`classification_metrics`).
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
from megainter.files import require_file_place, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import model_digest, read_config, read_vocabulary
from megainter.model.interbert import InterBertForSequenceClassification
from megainter.precision import AskedPrecision
from megainter.tasks.classification.batches import EncodedExamples, encode_examples, fixed_batches, with_regions
from megainter.tasks.classification.head import PROBLEM_TYPES, outcome
from megainter.tasks.classification.metrics import by_kind, figures
from megainter.tasks.classification.report import ClassificationReport, named_predictions, summary, write_predictions
from megainter.tasks.classification.submission import submission_ids, write_submission
from megainter.tasks.scoring.file import open_score_file
from megainter.tasks.scoring.models import DTYPES, USUAL_LENGTH, choose_devices, choose_precision, load_model
from megainter.tasks.scoring.running import run

KEPT = ("prediction", "score", "loss")  # of each example, in this order
EXAMPLES_WORTH_A_PROCESS = 20  # times its cost, beside that of a pair of caption and image
USUAL_TOKENS = 128


def evaluate(
    model: Path,
    examples: Path,
    store: Path | None = None,
    *,
    output: Path,
    split: str | None = "val",
    max_text_tokens: int | None = None,
    max_regions: int | None = None,
    max_missing: float = 0.0,
    batch: int = 64,
    processes: int | None = None,
    precision: AskedPrecision = "auto",
    device: str = "auto",
    submission: Path | None = None,
) -> ClassificationReport:
    """Predict every example of ``split``, write the figures to ``output`` (JSON) and the predictions to ``<output>.predictions.parquet``.

    ``model`` is a Hugging Face folder of a classifier with its vocabulary; labels are compared with its classes by name. ``store`` has the
    regions of the images, where there are some; examples without regions may be a share of ``max_missing``. Lengths that are None are
    those of training. ``submission``: also the file that the task's benchmark takes, of all examples or not at all. The figures are equal
    to the last digit for any number of ``processes``. Started again after a kill, the same call goes on where it was.

    Raises ``UsageError`` for inputs that do not fit each other, ``NumericsError`` naming an example whose score is not a number.
    """
    if batch < 1 or (processes is not None and processes < 1):
        raise UsageError(f"--batch {batch} and --processes {processes} must be at least 1")
    predictions = output.with_name(f"{output.stem}.predictions.parquet")
    for option, path in (("--output", output), ("--output's predictions", predictions), ("--submission", submission)):
        if path is not None:
            require_file_place(path, option)
    config = read_config(model)
    vocabulary = check_classifier(model, config)
    tokens, regions = max_text_tokens or config.max_text_tokens or USUAL_TOKENS, max_regions or config.max_regions or USUAL_LENGTH
    if not 5 <= tokens <= config.max_position_embeddings:
        raise UsageError(f"--max-text-tokens is {tokens}; give 5 to {config.max_position_embeddings}, what {model} has positions for")
    read = read_examples(examples, split)
    feature_store = _open_store(model, config, read, examples, store)
    kept = with_regions(read, feature_store, max_missing, examples, "--max-missing") if feature_store is not None else read
    ids = submission_ids(examples, read) if submission is not None else []
    if submission is not None and len(kept) < len(read):
        raise UsageError(
            f"--submission needs all {len(read):,} examples, and {len(read) - len(kept):,} have no regions: extract their images"
        )
    encoded = encode_examples(kept, class_names(config), vocabulary, tokens, feature_store, regions, config.region_feature_size)
    arithmetic = choose_precision(precision, device)
    work = ExamplesToScore(model, encoded, tuple(fixed_batches(encoded, batch)), arithmetic)
    cost = len(kept) * EXAMPLES_WORTH_A_PROCESS * max(kept.images, 1)
    devices = choose_devices(device, arithmetic, processes, cost, len(work.batches))
    facts: dict[str, Any] = {
        "task": kept.task.name, "split": split, "count": len(kept), "missing_examples": len(read) - len(kept), "max_regions": regions,
        "max_text_tokens": tokens, "precision": arithmetic, "model": str(model), "model_digest": model_digest(model),
        "examples": str(examples), "examples_digest": kept.digest, "store": str(store) if store is not None else None,
        "store_digest": feature_store.digest if feature_store is not None else None, "device": devices[0].type,
    }  # fmt: skip
    plan = facts | {"vocabulary": vocabulary.digest, "batch": batch, "torch": str(torch.__version__)}
    with open_score_file(output, plan, len(kept), len(KEPT), len(work.batches)) as file:
        seconds, _ = run(work, file, devices, "examples", lambda chunk, scores: _require_numbers(scores, kept, work.places(chunk)))
        found = np.array(file.scores)
        write_predictions(predictions, kept, encoded, found)
        if submission is not None:
            write_submission(submission, kept.task.name, ids, named_predictions(encoded, found))
        measured = _measured(kept, encoded, found)
        files: dict[str, Any] = {"predictions": predictions.name, "submission": str(submission) if submission is not None else None}
        report = ClassificationReport(**facts, **measured, processes=len(devices), seconds=seconds, **files)
        write_json(output, asdict(report))
    print(summary(report), flush=True)
    return report


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


def _open_store(model: Path, config: InterBertConfig, examples: Examples, path: Path, store: Path | None) -> FeatureStore | None:
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
    size = opened.schema.feature_size
    if size != config.region_feature_size:
        raise UsageError(f"{model} takes {config.region_feature_size}-d region features, and {store} has {size}-d ones")
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
