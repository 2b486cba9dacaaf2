"""`megainter serve`: searching as a local web page."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from megainter.errors import UsageError
from megainter.tasks.retrieval.search.options import SearchOptions, ServeOptions


def serve(
    index: Path,
    /,
    *,
    serving: Annotated[ServeOptions | None, Parameter(name="*")] = None,
    options: Annotated[SearchOptions | None, Parameter(name="*")] = None,
) -> None:
    """Serve an index as a web page and a JSON service, on this machine alone unless told otherwise.

    Parameters
    ----------
    index
        Folder that `megainter index` made.
    """
    from megainter.tasks.retrieval.search.checks import check_options, require_index

    require_index(index)
    check_options(options or SearchOptions())
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(f"serving needs starlette and uvicorn: pip install 'megainter[serve]' ({error})") from None
    from megainter.tasks.retrieval.web.serving import serve_index

    serve_index(index, options or SearchOptions(), serving or ServeOptions())
