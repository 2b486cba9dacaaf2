"""`megainter search`: images for sentences, captions and similar images for a photo."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megainter.tasks.retrieval.search.options import SearchOptions


def search(
    index: Path,
    /,
    *queries: str,
    image: Path | None = None,
    top: int = 10,
    json: bool = False,
    page: Path | None = None,
    options: Annotated[SearchOptions | None, Parameter(name="*")] = None,
) -> None:
    """Find images by sentences, or captions and similar images by a photo; print a table, or JSON.

    Parameters
    ----------
    index
        Folder that `megainter index` made.
    queries
        Sentences, each in quotes; each is a search of its own.
    image
        A photo to search by: its regions are found by the store's own detector.
    top
        How many to show.
    json
        Print one JSON object for scripts instead of tables.
    page
        Also write the pictures found to this HTML file; needs the images' folder.
    """
    from megainter.tasks.retrieval.search.checks import check_search

    options = options or SearchOptions()
    check_search(index, queries, options, image, top, page)
    from megainter.tasks.retrieval.search.command import run_search

    run_search(index, queries, options, image=image, top=top, as_json=json, page=page)
