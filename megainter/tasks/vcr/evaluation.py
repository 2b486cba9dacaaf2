"""Visual commonsense reasoning (VCR): a question about an image, four answers, four rationales.

`training.finetune` trains a model, ``evaluate`` measures one: answers (Q->A), rationales given the right answer (QA->R), and both right
(Q->AR), joined by question id. Where labels are not public it writes the file that the leaderboard takes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.tables.questions import Questions
from megainter.errors import NumericsError, UsageError
from megainter.files import require_file_place, write_json
from megainter.model.folder import model_digest, read_config
from megainter.tasks.scoring.file import open_score_file
from megainter.tasks.scoring.models import check_model, choose_devices, choose_precision, keep_reports, scored_model
from megainter.tasks.scoring.running import run
from megainter.tasks.vcr.batches import ChoiceSource, ChoiceToMake, all_items, right_choices
from megainter.tasks.vcr.inputs import MODES, Stores, WordPieces, open_questions, open_stores, read_facts
from megainter.tasks.vcr.options import VcrEvaluation
from megainter.tasks.vcr.report import BOTH, CHANCE, Judged, VcrReport, accuracies, is_right, summary, write_probabilities, write_submission
from megainter.tasks.vcr.scoring import ChoicesToScore
from megainter.weights import Located

ASKED = {BOTH: MODES["joint"], "answer": MODES["answer"], "rationale": MODES["rationale"]}


def evaluate(model: Path, options: VcrEvaluation) -> VcrReport:
    """Score the choices of all questions and write the accuracies to ``options.output`` (JSON).

    ``model`` is a folder that ``finetune`` made; text lengths, regions and tied names are as in its training. ``split``: None takes all
    questions of the file. Beside the JSON, ``<output>.probabilities.parquet`` has the probabilities of every question. ``submission``
    writes the leaderboard's CSV, for which rationales are scored given each of the four answers, as they always are where the right
    answer is not known. ``processes``: None takes one per GPU, or as many cores as the work is worth; the figures are bit-equal for any
    number. An interrupted run goes on where it was.

    Raises ``UsageError`` for what cannot be used as given, ``TooManyBadInputsError`` where more than ``max_bad`` of the images have no
    regions (any, for a ``submission``), ``LockedError`` where another process writes the same output, ``NumericsError`` where a probability
    is not a number.
    """
    probabilities = options.output.with_name(f"{options.output.stem}.probabilities.parquet")
    _check(options, probabilities)
    found = scored_model(model)
    keep_reports(options.output, found.path, options.replace, options.submission)
    model = found.path
    examples, facts = _open_inputs(found, options)
    asked = examples.questions

    # What is asked, and who answers.
    precision = choose_precision(options.precision, options.device)
    items = all_items(asked, ASKED[options.mode], options.submission is not None)
    work = ChoicesToScore(model, examples, items, options.batch_questions, precision)
    devices = choose_devices(options.device, precision, options.processes, 4 * len(items), len(work))
    facts |= {"precision": precision, "device": devices[0].type}

    # Scores, kept on the disk until the report is written.
    plan = facts | {"items": len(items), "batch_questions": options.batch_questions, "torch": str(torch.__version__)}
    with open_score_file(options.output, plan, len(items), 4, len(work)) as file:
        seconds, pace = run(work, file, devices, "choices", lambda chunk, scores: _require_numbers(scores, work, chunk))
        scores = np.array(file.scores)
        write_probabilities(probabilities, asked, items, scores)
        if options.submission is not None:
            write_submission(options.submission, asked, items, scores)
        shares, labelled = _measure(examples, items, scores)
        del facts["vocabulary"]  # of the plan alone
        report = VcrReport(
            **facts,
            answer=shares.get("answer"),
            rationale=shares.get("rationale"),
            both=shares.get("both"),
            labelled=labelled,
            chance=CHANCE,
            processes=len(devices),
            seconds=seconds,
            choices_per_second=round(4 * pace, 1),
            probabilities=probabilities.name,
            submission=str(options.submission) if options.submission is not None else None,
        )
        write_json(options.output, asdict(report))
    print(summary(report), flush=True)
    return report


def _open_inputs(found: Located, options: VcrEvaluation) -> tuple[ChoiceSource, dict[str, Any]]:
    """What is scored, opened and known to fit together, and what the report says of it."""
    model, config = found.path, read_config(found.path)
    settings, trained_for, with_objects = read_facts(config, model)
    _check_objects(model, with_objects, options.objects_store)
    stores = open_stores(options.store, options.objects_store)
    longest = max(settings.max_answer_tokens, settings.max_rationale_tokens)
    vocabulary = check_model(model, config, stores.detected, longest, options.other_detector)
    asked, digest = _questions(options, stores)
    if trained_for not in ("joint", options.mode):
        print(f"{model} was fine-tuned for {trained_for}s alone; what it makes of {options.mode} is no more than a guess", flush=True)
    facts: dict[str, Any] = {
        "mode": options.mode, "trained_for": trained_for, "tie_objects": settings.tie_objects, "split": options.split, "model": found.name,
        "questions_file": str(options.questions), "store": str(options.store), "model_digest": model_digest(model),
        "objects_store": str(options.objects_store) if options.objects_store is not None else None, "questions_digest": digest,
        "store_digest": stores.detected.digest, "objects_store_digest": stores.given.digest if stores.given is not None else None,
        "questions": len(asked), "vocabulary": vocabulary.digest,
    }  # fmt: skip
    return ChoiceSource(asked, stores, WordPieces.of(asked, vocabulary), settings, ASKED[options.mode]), facts


def _questions(options: VcrEvaluation, stores: Stores) -> tuple[Questions, str]:
    """As ``open_questions``; the leaderboard's file is of all questions or none."""
    limit, option = (options.max_bad, "--max-bad") if options.submission is None else (0.0, "--max-bad, and no --submission:")
    return open_questions(options.questions, options.split, stores, limit, option)


def _check(options: VcrEvaluation, probabilities: Path) -> None:
    for option, number in (("--batch-questions", options.batch_questions), ("--processes", options.processes)):
        if number is not None and number < 1:
            raise UsageError(f"{option} is {number}; give at least 1")
    if not 0 <= options.max_bad <= 1:
        raise UsageError(f"--max-bad is {options.max_bad}; give a share, 0 to 1")
    if options.submission is not None and options.mode != BOTH:
        raise UsageError(f"--submission needs answers and rationales, and --mode is {options.mode}; leave --mode out")
    for option, path in (("--output", options.output), ("--output's table", probabilities), ("--submission", options.submission)):
        if path is not None:
            require_file_place(path, option)


def _check_objects(model: Path, with_objects: bool, objects_store: Path | None) -> None:
    """The model sees at evaluation what it saw in training."""
    if with_objects and objects_store is None:
        raise UsageError(f"{model} was trained with annotated boxes; give --objects-store, what `megainter extract --boxes` wrote")
    if objects_store is not None and not with_objects:
        raise UsageError(f"{model} was trained without annotated boxes; leave --objects-store out")


def _require_numbers(scores: NDArray[np.float32], work: ChoicesToScore, chunk: int) -> None:
    bad = np.argwhere(~np.isfinite(scores))
    if len(bad):
        item = work.items[int(work.places(chunk)[bad[0][0]])]
        raise NumericsError(
            f"a probability of question {work.examples.questions[item.row].question_id!r} is not a number: the model's weights are not "
            "finite, or --precision is too narrow for them"
        )


def _measure(examples: ChoiceSource, items: list[ChoiceToMake], scores: NDArray[np.float32]) -> tuple[dict[str, float], int]:
    """Accuracies over the items that have a right choice, and how many questions those are of."""
    labels = right_choices(examples.questions, items)
    known = np.flatnonzero(labels >= 0)
    right = is_right(scores[known], labels[known])
    ids = examples.questions.table.column("question_id").to_pylist()
    judged = [Judged(ids[items[place].row], items[place].kind, bool(value)) for place, value in zip(known, right, strict=True)]
    return accuracies(judged), len({one.question_id for one in judged})
