"""`megainter index`: vectors of one's own images and captions, for searching."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megainter.tasks.retrieval.search.options import IndexOptions


def index(model: Path, /, *, options: Annotated[IndexOptions, Parameter(name="*")]) -> None:
    """Compute the vectors of all images and their captions, if any, once, for `megainter search` and `serve`. The same command resumes.

    Parameters
    ----------
    model
        Hugging Face folder with its vocabulary, or hf:OWNER/NAME[@REVISION] of the Hub.
    """
    from megainter.process import raise_on_signals
    from megainter.tasks.retrieval.search.checks import check_index

    check_index(model, options)
    from megainter.tasks.retrieval.search.building import build_index

    raise_on_signals("stopped; the same command goes on where it was")
    build_index(model, options)
