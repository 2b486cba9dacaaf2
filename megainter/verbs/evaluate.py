"""`megainter evaluate`: a model measured on a task."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from megainter.precision import AskedPrecision

evaluate_app = App(name="evaluate", help="Measure a model on a task.")


@evaluate_app.command(name="retrieval")
def evaluate_retrieval(
    model: Path,
    /,
    *,
    pairs: Path,
    store: Path,
    output: Path,
    split: str = "test",
    images: int | None = None,
    captions_per_image: int | None = None,
    max_regions: int | None = None,
    max_text_tokens: int | None = None,
    batch_pairs: int = 256,
    processes: int | None = None,
    precision: AskedPrecision = "auto",
    device: str = "auto",
    scores: Path | None = None,
    prefilter: int | None = None,
    prefilter_model: Path | None = None,
    max_missing: float = 0.01,
    folds: int | None = None,
) -> None:
    """Image-text retrieval both ways: every caption against every image of the gallery, or against chosen ones.

    Parameters
    ----------
    model
        Hugging Face folder with its vocabulary.
    pairs
        Pairs manifest.
    store
        Feature store of its images.
    output
        JSON file for the scores.
    split
        Split of the manifest that makes the gallery.
    images
        Gallery size: the first so many images; default all.
    captions_per_image
        Use at most so many captions of each image; default all.
    max_regions
        Regions per image; default as in training, which the model's config.json says (36 where it does not).
    max_text_tokens
        Tokens per caption; default likewise.
    batch_pairs
        Caption-image pairs per forward.
    processes
        Processes that share the work; default one per GPU, or one per core.
    precision
        Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32.
    device
        Torch device; "auto" takes CUDA where there is one.
    scores
        Also write the whole score matrix to this file; with --prefilter the pairs that were scored.
    prefilter
        For a large gallery: score only so many images of each caption and captions of each image, the nearest by --prefilter-model.
    prefilter_model
        Folder that `megainter finetune prefilter` made.
    max_missing
        Share of the split's images that may be left out because they have no regions; with --images it does not matter.
    folds
        Also give the mean recalls of so many equal parts of the gallery: 5 for COCO's "1K" figures beside its "5K" ones.
    """
    from megainter.tasks.retrieval.evaluation import evaluate

    evaluate(
        model, pairs, store, split=split, images=images, captions_per_image=captions_per_image, max_regions=max_regions,
        max_text_tokens=max_text_tokens, batch_pairs=batch_pairs, processes=processes, precision=precision, device=device,
        output=output, scores=scores, prefilter=prefilter, prefilter_model=prefilter_model, max_missing=max_missing, folds=folds,
    )  # fmt: skip


@evaluate_app.command(name="vcr")
def evaluate_vcr(
    model: Path,
    /,
    *,
    questions: Path,
    store: Path,
    output: Path,
    objects_store: Path | None = None,
    mode: Literal["both", "answer", "rationale"] = "both",
    split: str | None = None,
    max_missing: float = 0.0,
    batch_questions: int = 16,
    processes: int | None = None,
    precision: AskedPrecision = "auto",
    device: str = "auto",
    submission: Path | None = None,
) -> None:
    """VCR: answers, rationales given the right answer, and both right.

    Parameters
    ----------
    model
        Folder that `megainter finetune vcr` made.
    questions
        Questions: what `megainter prepare vcr` wrote.
    store
        Feature store of the detector's boxes.
    output
        JSON file for the accuracies; the probabilities of every question go beside it.
    objects_store
        Feature store of the annotated boxes, for a model that was trained with one.
    mode
        What is asked: answers, rationales, or both.
    split
        Questions of this split alone; default all of the file.
    max_missing
        Share of questions that may be left out because their image has no regions.
    batch_questions
        Choices to make per forward: each is four texts with an image.
    processes
        Processes that share the work; default one per GPU, or one per core.
    precision
        Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32.
    device
        Torch device; "auto" takes CUDA where there is one.
    submission
        Also write the CSV that VCR's leaderboard takes.
    """
    from megainter.tasks.vcr.evaluation import evaluate

    evaluate(
        model, questions, store, output=output, objects_store=objects_store, mode=mode, split=split, max_missing=max_missing,
        batch_questions=batch_questions, processes=processes, precision=precision, device=device, submission=submission,
    )  # fmt: skip


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
    """
    from megainter.tasks.classification.evaluation import evaluate

    evaluate(
        model, examples, store, output=output, split=split, max_text_tokens=max_text_tokens, max_regions=max_regions,
        max_missing=max_missing, batch=batch, processes=processes, precision=precision, device=device,
    )  # fmt: skip
