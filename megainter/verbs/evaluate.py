"""`megainter evaluate`: a model measured on a task."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from megainter.precision import AskedPrecision
from megainter.tasks.retrieval.options import RetrievalEvaluation
from megainter.tasks.vcr.options import VcrEvaluation

evaluate_app = App(name="evaluate", help="Measure a model on a task.")


@evaluate_app.command(name="retrieval")
def evaluate_retrieval(model: Path, /, *, options: Annotated[RetrievalEvaluation, Parameter(name="*")]) -> None:
    """Image-text retrieval both ways: every caption against every image of the gallery, or against chosen ones.

    Parameters
    ----------
    model
        Hugging Face folder with its vocabulary.
    """
    from megainter.tasks.retrieval.evaluation import evaluate

    evaluate(model, options)


@evaluate_app.command(name="vcr")
def evaluate_vcr(model: Path, /, *, options: Annotated[VcrEvaluation, Parameter(name="*")]) -> None:
    """VCR: answers, rationales given the right answer, and both right.

    Parameters
    ----------
    model
        Folder that `megainter finetune vcr` made.
    """
    from megainter.tasks.vcr.evaluation import evaluate

    evaluate(model, options)


@evaluate_app.command(name="classification")
def evaluate_classification(
    model: Path,
    /,
    *,
    examples: Path,
    output: Path,
    store: Path | None = None,
    split: str = "val",
    max_text_tokens: int | None = None,
    max_regions: int | None = None,
    max_missing: float = 0.0,
    batch: int = 64,
    processes: int | None = None,
    precision: AskedPrecision = "auto",
    device: str = "auto",
    submission: Path | None = None,
) -> None:
    """Classification and regression of texts, alone or about images: figures where labels are public, predictions in any case.

    Parameters
    ----------
    model
        Folder that `megainter finetune classification` made.
    examples
        Labelled examples: what `megainter prepare examples` wrote.
    output
        JSON file for the figures; the predictions go beside it.
    store
        Feature store of the images, for examples that have some.
    split
        Examples of this split.
    max_text_tokens
        Tokens of a text or pair of texts; default as in training.
    max_regions
        Regions per image; default as in training.
    max_missing
        Share of examples that may be left out because an image of theirs has no regions.
    batch
        Examples per forward.
    processes
        Processes that share the work; default one per GPU, or one per core.
    precision
        Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32.
    device
        Torch device; "auto" takes CUDA where there is one.
    submission
        Also write the file that the task's benchmark takes: vqa (JSON), nlvr2 (CSV), GLUE (TSV).
    """
    from megainter.tasks.classification.evaluation import evaluate

    evaluate(
        model, examples, store, output=output, split=split, max_text_tokens=max_text_tokens, max_regions=max_regions,
        max_missing=max_missing, batch=batch, processes=processes, precision=precision, device=device, submission=submission,
    )  # fmt: skip
