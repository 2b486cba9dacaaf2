"""`megainter view`: pages to look at."""

from pathlib import Path

from cyclopts import App

from megainter.weights import check_name, require_there

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
        How many images and captions to show.
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
