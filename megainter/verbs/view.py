"""`megainter view`: a page to look at."""

from pathlib import Path


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
