"""`megainter evaluate`: a model measured on a task."""

from pathlib import Path
from typing import Literal

from cyclopts import App

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
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    device: str = "auto",
    scores: Path | None = None,
) -> None:
    """Image-text retrieval both ways: every caption against every image of the gallery.

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
        Arithmetic of the model.
    device
        Torch device; "auto" takes CUDA where there is one.
    scores
        Also write the whole score matrix to this file.
    """
    from megainter.tasks.retrieval import evaluate

    evaluate(
        model, pairs, store, split=split, images=images, captions_per_image=captions_per_image, max_regions=max_regions,
        max_text_tokens=max_text_tokens, batch_pairs=batch_pairs, processes=processes, precision=precision, device=device,
        output=output, scores=scores,
    )  # fmt: skip
