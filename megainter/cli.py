"""The command line: one verb table. Heavy imports happen only inside a verb, so that help answers at once."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from megainter.errors import STOPPED_EARLY, MegainterError, UsageError
from megainter.training.process import end_with_launcher

app = App(
    name="megainter",
    help="Pretrain InterBERT, a vision-and-language BERT, on your own images and captions.",
    help_epilogue="Exit codes: 0 done, 2 usage, 3 too many bad inputs, 4 damage, 5 disk full, 6 in use, 7 diverged, 75 stopped early.",
    help_format="plaintext",
    version_flags=["--version"],
)
evaluate_app = App(name="evaluate", help="Measure a model on a task.")
convert_app = App(name="convert", help="Move checkpoints in and out.")
app.command(evaluate_app)
app.command(convert_app)


@app.command
def demo(*, output: Path = Path("demo-run")) -> None:
    """Run everything once on composed scenes: extract, pretrain, evaluate, export, and a page to look at.

    Stages that are finished are not run again; each leaves its files in the output folder.

    Parameters
    ----------
    output
        Folder for everything the demo makes.
    """
    from megainter.demo import run_demo

    run_demo(output)


@app.command
def prepare(
    source: Literal["jsonl", "coco", "flickr30k"],
    src: Path,
    /,
    *,
    output: Path,
    images: Path | None = None,
    split: str | None = None,
    captions: str | None = None,
    max_bad: float = 0.01,
) -> None:
    """Turn captions into a pairs manifest (Parquet).

    Parameters
    ----------
    source
        Format of the captions.
    src
        The caption file.
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    images
        Folder of the images; captions whose image is missing there are dropped and counted.
    split
        Keep captions of this split, and give it to those whose source names none.
    captions
        Field that holds the captions, for JSON Lines with other names than "caption" or "captions".
    max_bad
        Share of unusable captions above which the command ends with exit code 3.
    """
    from preprocessing.captions import prepare as prepare_captions

    prepare_captions(source, src, output, images=images, split=split, captions=captions, max_bad=max_bad)


@app.command
def extract(
    *,
    images: Path,
    output: Path,
    weights: Path,
    manifest: Path | None = None,
    min_boxes: int = 10,
    max_boxes: int = 100,
    selection: Literal["caffe", "d2"] = "caffe",
    workers: int | None = None,
    batch_size: int = 8,
    min_size: int | None = None,
    max_size: int | None = None,
    max_bad: float = 0.01,
    device: str | None = None,
) -> None:
    """Extract region features of images into a feature store. The same command resumes.

    Parameters
    ----------
    images
        Folder of images.
    output
        Feature store to write.
    weights
        Detector weights (safetensors).
    manifest
        Take the images named in this Parquet manifest (pairs or boxes) instead of all in the folder.
    min_boxes
        Keep at least this many regions of an image, where the detector proposes as many.
    max_boxes
        Keep at most this many.
    selection
        Rule that picks regions: bottom-up-attention's ("caffe") or detectron2's ("d2").
    workers
        Processes; default one per core or GPU.
    batch_size
        Images per forward, of equal size.
    min_size
        Shorter image side in pixels for the detector; default the detector's own.
    max_size
        Longer side at most.
    max_bad
        Share of unreadable images above which the command ends with exit code 3.
    device
        Torch device; default CUDA where there is one.
    """
    from preprocessing.extract import extract as extract_regions

    extract_regions(
        images, output, weights, manifest=manifest, min_boxes=min_boxes, max_boxes=max_boxes, selection=selection, workers=workers,
        batch_size=batch_size, min_size=min_size, max_size=max_size, max_bad=max_bad, device=device,
    )  # fmt: skip


@app.command(help_flags=[])
def pretrain(*settings: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Pretrain on a pairs manifest and a feature store: --config RECIPE.toml [--section.key value ...].

    Alone, or on every rank of a launcher: deepspeed --module megainter.pretrain --config RECIPE.toml. The same command resumes.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, such as --training.steps 1000.
    """
    if not settings or settings[0] in ("--help", "-h"):
        _explain_settings()
        return
    from megainter.config import load_config

    recipe, overrides = _split_config(settings)
    config = load_config(recipe, overrides)
    from megainter.training.loop import pretrain as train

    train(config)


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
    max_regions: int = 36,
    max_text_tokens: int = 36,
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
        Regions per image, as in training.
    max_text_tokens
        Tokens per caption, as in training.
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


@convert_app.command(name="zero")
def convert_zero(run: Path, dst: Path, /) -> None:
    """Export a training run to a Hugging Face folder.

    Parameters
    ----------
    run
        Run folder (its newest whole checkpoint is taken) or one checkpoint folder.
    dst
        Folder to write; must not exist.
    """
    from megainter.conversion.zero import convert

    convert(run, dst)


@app.command
def view(
    *,
    images: Path,
    pairs: Path,
    store: Path,
    output: Path,
    run: Path | None = None,
    retrieval: Path | None = None,
    title: str = "megainter",
    count: int = 12,
) -> None:
    """Write one HTML page to look at: images with boxes, loss curves, retrieved images.

    Parameters
    ----------
    images
        Folder of images.
    pairs
        Pairs manifest.
    store
        Feature store.
    output
        HTML file to write.
    run
        Run folder, for its curves.
    retrieval
        JSON written by `evaluate retrieval`.
    title
        Heading of the page.
    count
        How many images and captions to show.
    """
    from megainter.view.page import write_page

    metrics = run / "metrics.jsonl" if run is not None else None
    print(write_page(output, title, images=images, pairs=pairs, store=store, metrics=metrics, retrieval=retrieval, count=count))


def main(tokens: Sequence[str] | None = None) -> None:
    """Run one verb; a user's mistake ends in one line and its exit code, without a traceback."""
    end_with_launcher()
    try:
        app(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _end(f"{' '.join(str(error).split())} (see megainter --help)", UsageError.exit_code)
    except MegainterError as error:
        _end(str(error), error.exit_code, told=isinstance(error, UsageError))
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on where it stopped", STOPPED_EARLY)
    except BrokenPipeError:
        _end("", 1)


def _end(text: str, code: int, told: bool = True) -> None:
    """Print one line (from the first rank where all say the same) and leave at once, without waiting for other ranks."""
    rank = int(os.environ.get("RANK", "0"))
    if text and not (told and rank > 0):
        print(f"megainter: {text}" if rank == 0 else f"megainter: rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _split_config(tokens: Sequence[str]) -> tuple[Path | None, list[str]]:
    rest, recipe = list(tokens), None
    for position, token in enumerate(rest):
        if token == "--config" or token.startswith("--config="):
            _, equals, value = token.partition("=")
            taken = rest[position : position + (1 if equals else 2)]
            if not equals and len(taken) < 2:
                raise UsageError("--config needs a TOML file")
            recipe = Path(value if equals else taken[1])
            rest = rest[:position] + rest[position + len(taken) :]
            break
    return recipe, rest


def _explain_settings() -> None:
    """List every setting with its default."""
    from megainter.config import describe_settings

    print("usage: megainter pretrain --config RECIPE.toml [--section.key value ...]\n\n" + describe_settings())
