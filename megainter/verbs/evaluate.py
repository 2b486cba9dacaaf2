"""`megainter evaluate`: a model measured on a task."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from megainter.paths import require_there
from megainter.tasks.classification.options import ClassificationEvaluation
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.vcr.options import VcrEvaluation
from megainter.verbs.as_json import lines_aside, print_object
from megainter.weights import check_name

evaluate_app = App(name="evaluate", help="Measure a model on a task, and compare what was measured.")


def require_inputs(model: Path, *paths: tuple[str, Path | None]) -> None:
    """``UsageError`` where the model is neither there nor a name of the Hub, or a path that an option names is not there."""
    check_name(model, option="MODEL")
    for option, path in paths:
        require_there(path, option)


@evaluate_app.command(name="retrieval")
def evaluate_retrieval(model: Path, /, *, options: Annotated[RetrievalEvaluation, Parameter(name="*")], json: bool = False) -> None:
    """Image-text retrieval both ways: every caption against every image of the gallery, or against chosen ones.

    Parameters
    ----------
    model
        Hugging Face folder with its vocabulary, or hf:OWNER/NAME[@REVISION] of the Hub.
    json
        Print the report, as it is written to --output, on standard output in place of the summary.
    """
    require_inputs(model, ("--pairs", options.pairs), ("--store", options.store), ("--prefilter-model", options.prefilter_model))
    from megainter.tasks.retrieval.evaluation import evaluate

    with lines_aside(json):
        report = evaluate(model, options)
    if json:
        print_object(report)


@evaluate_app.command(name="vcr")
def evaluate_vcr(model: Path, /, *, options: Annotated[VcrEvaluation, Parameter(name="*")], json: bool = False) -> None:
    """VCR: answers, rationales given the right answer, and both right.

    Parameters
    ----------
    model
        Folder that `megainter finetune vcr` made, or hf:OWNER/NAME[@REVISION] of the Hub.
    json
        Print the report, as it is written to --output, on standard output in place of the summary.
    """
    require_inputs(model, ("--questions", options.questions), ("--store", options.store), ("--objects-store", options.objects_store))
    from megainter.tasks.vcr.evaluation import evaluate

    with lines_aside(json):
        report = evaluate(model, options)
    if json:
        print_object(report)


@evaluate_app.command(name="classification")
def evaluate_classification(
    model: Path, /, *, options: Annotated[ClassificationEvaluation, Parameter(name="*")], json: bool = False
) -> None:  # fmt: skip
    """Classification and regression of texts, alone or about images: figures where labels are public, predictions in any case.

    Parameters
    ----------
    model
        Folder that `megainter finetune classification` made, or hf:OWNER/NAME[@REVISION] of the Hub.
    json
        Print the report, as it is written to --output, on standard output in place of the summary.
    """
    require_inputs(model, ("--examples", options.examples), ("--store", options.store))
    from megainter.tasks.classification.evaluation import evaluate

    with lines_aside(json):
        report = evaluate(model, options)
    if json:
        print_object(report)


@evaluate_app.command(name="compare")
def compare_evaluations(*reports: Path, json: bool = False) -> None:
    """Reports of one task side by side: every figure, and of two whether their queries tell the models apart.

    megainter evaluate compare before.json after.json

    Parameters
    ----------
    reports
        JSON files that `megainter evaluate` wrote.
    json
        Print one JSON object for scripts.
    """
    for report in reports:
        require_there(report, "REPORTS")
    from megainter.tasks.comparing import compare, told

    compared = compare([*reports])
    if json:
        print_object(compared)
    else:
        print(told(compared))
