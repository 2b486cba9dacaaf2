"""`megainter view`: pages to look at."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from megainter.errors import UsageError
from megainter.paths import require_there
from megainter.weights import check_name

view_app = App(name="view", help="Write one HTML page to look at: of images, a run and scores, or of what its commands say.")


@view_app.default
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
        Run folder whose curves are drawn.
    retrieval
        JSON written by `evaluate retrieval`.
    title
        Heading of the page.
    count
        How many images to show, how many captions, and how many of the hardest errors.
    """
    from megainter.view.page import write_page

    metrics = run / "metrics.jsonl" if run is not None else None
    print(write_page(output, title, images=images, pairs=pairs, store=store, metrics=metrics, retrieval=retrieval, count=count))


@view_app.command(name="model")
def view_model(
    model: Path,
    photo: Path,
    caption: str,
    /,
    *,
    store: Path,
    output: Path,
    image_id: str | None = None,
    weights: Path | None = None,
    other_detector: bool = False,
    device: str = "auto",
    title: str = "What a model believes",
) -> None:
    """What a model believes of a photo and a caption: the match, hidden words and regions guessed, and where every layer looks.

    Parameters
    ----------
    model
        Hugging Face folder with its vocabulary, or hf:OWNER/NAME[@REVISION] of the Hub.
    photo
        Image file.
    caption
        Sentence in quotes; where it has [MASK], what stands there is guessed.
    store
        Feature store, whose detector finds the photo's regions.
    output
        HTML file to write.
    image_id
        Take the regions that the store has under this id instead of finding them again.
    weights
        Weights of the store's detector, where they do not come along.
    other_detector
        Take regions of another detector than the model was trained on, which is refused otherwise.
    device
        Torch device; "auto" takes CUDA where there is one.
    title
        Heading of the page.
    """
    check_name(model, option="MODEL")
    for path, option in ((photo, "PHOTO"), (store, "--store"), (weights, "--weights")):
        require_there(path, option)
    from megainter.view.belief_page import write_belief_page

    page = write_belief_page(
        output, title, model=model, photo=photo, caption=caption, store=store, image_id=image_id, weights=weights,
        other_detector=other_detector, device=device,
    )  # fmt: skip
    print(page)


@view_app.command(name="batch")
def view_batch(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True)],
    output: Path,
    run: Path | None = None,
    step: int = 1,
    images: Path | None = None,
    count: int = 24,
    title: str = "A step of pretraining",
) -> None:
    """A step of pretraining as the loader makes it: what is masked and why, wrong captions, and what each loss scores.

    Of a run folder, which is only read, or of a recipe: megainter view batch --config base --data.pairs PAIRS --data.store STORE.

    Parameters
    ----------
    settings
        --config RECIPE.toml, and settings laid over it, as `megainter pretrain` takes them.
    output
        HTML file to write.
    run
        Run folder of `megainter pretrain`, in place of a recipe.
    step
        The step, counted from 1.
    images
        Folder that the manifest's image paths start from; without it regions are drawn on empty frames.
    count
        How many samples of the step to show.
    title
        Heading of the page.
    """
    from megainter.config.reading import load_config
    from megainter.verbs.pretrain import require_paths, settings_of_pretrain, split_config

    require_there(run, "--run")
    require_there(images, "--images")
    words = settings_of_pretrain(settings, "view batch")
    if run is not None and words:
        raise UsageError(f"{words[0]!r:.80} and --run: a run has its own settings; give one of both")
    if run is None and not words:
        raise UsageError("give --run RUN, or --config RECIPE and settings as `megainter pretrain` takes them")
    recipe, overrides = split_config(words)
    config = load_config(recipe, [*overrides, "--output", str(output)]) if run is None else None
    if config is not None:
        require_paths(config)
    from megainter.view.batch_page import write_batch_page

    print(write_batch_page(output, title, config=config, run=run, step=step, images=images, count=count))


@view_app.command(name="runs")
def view_runs(*runs: Path, output: Path, title: str = "Runs") -> None:
    """Runs over one another: losses, accuracy, recall, rate, memory, stalls, and where they were resumed.

    Parameters
    ----------
    runs
        Run folders of `megainter pretrain` or `megainter finetune`, finished or not.
    output
        HTML file to write.
    title
        Heading of the page.
    """
    for run in runs:
        require_there(run, "RUNS")
    from megainter.view.runs_page import write_runs_page

    print(write_runs_page(output, title, list(runs)))


@view_app.command(name="store")
def view_store(
    store: Path,
    /,
    *,
    output: Path,
    images: Path | None = None,
    pairs: Path | None = None,
    count: int = 200,
    title: str = "A feature store",
) -> None:
    """A feature store: a grid of its images with boxes, classes and confidences, to be filtered, and the list of what failed.

    Parameters
    ----------
    store
        Feature store.
    output
        HTML file to write.
    images
        Folder of the images; without it regions are drawn on empty frames.
    pairs
        Pairs manifest that says where each image's file is; without it files are known by their ids.
    count
        How many images to show, spread over the store.
    title
        Heading of the page.
    """
    for path, option in ((store, "STORE"), (images, "--images"), (pairs, "--pairs")):
        require_there(path, option)
    from megainter.view.store_page import write_store_page

    print(write_store_page(output, title, store=store, images=images, pairs=pairs, count=count))
