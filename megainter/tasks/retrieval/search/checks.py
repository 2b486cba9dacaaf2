"""What can be seen of a command before anything heavy is imported; light."""

from pathlib import Path

from megainter.errors import UsageError
from megainter.files import require_file_place, require_page_place
from megainter.kinds import instead
from megainter.paths import did_you_mean, not_a_file, require_there
from megainter.tasks.retrieval.search.options import IndexOptions, SearchOptions
from megainter.weights import check_name

DESCRIPTION = "index.json"  # of an index, as of all mapped arrays
MOST_CANDIDATES = 10_000
MOST_SHOWN = 1000


def check_index(model: Path, options: IndexOptions) -> None:
    """``UsageError`` for paths that are not there, an output that is something else, and numbers that cannot be."""
    check_name(model, option="MODEL")
    for what, path in (("--store", options.store), ("--pairs", options.pairs)):
        require_there(path, what)
    if options.split is not None and options.pairs is None:
        raise UsageError(f"--split {options.split} is one of a table of captions; give --pairs, or leave it out")
    require_there(options.prefilter_model, "--prefilter-model")
    require_there(options.images, "--images")
    if options.weights is not None:
        check_name(options.weights, "detector", "--weights")
    if not 0 <= options.max_bad <= 1:
        raise UsageError(f"--max-bad is {options.max_bad}; give a share, 0 to 1")
    output = options.output
    if output.exists() and not (output / DESCRIPTION).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"--output {output} is there and is no index; name a new folder")
    require_file_place(output / DESCRIPTION if output.is_dir() else output, "--output")


def check_search(index: Path, queries: tuple[str, ...], options: SearchOptions, image: Path | None, top: int, page: Path | None) -> None:
    """``UsageError`` for an index that is none, for nothing to search for, and for numbers that cannot be."""
    require_index(index)
    if not queries and image is None:
        raise UsageError('nothing to search for: give a sentence in quotes, as in `megainter search INDEX "two dogs"`, or --image FILE')
    if any(not query.strip() for query in queries):
        raise UsageError("a query is empty; give a sentence in quotes")
    if not all(map(is_unicode, queries)):
        raise UsageError("a query is not valid Unicode; give it in the terminal's encoding")
    if not 1 <= top <= MOST_SHOWN:
        raise UsageError(f"--top is {top}; give 1 to {MOST_SHOWN:,}")
    if image is not None and not image.is_file():
        raise UsageError(f"--image {not_a_file(image)}")
    check_options(options)
    if page is not None:
        require_page_place(page, "--page")


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: bytes of another encoding and halves of letters in JSON cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_index(path: Path) -> None:
    """``UsageError`` where there is no index."""
    if not path.exists():
        order = '; the index stands first, as in `megainter search INDEX "two dogs"`' if " " in path.name else ""
        raise UsageError(f"index {path} does not exist{did_you_mean(path) or order}")
    if not (path / DESCRIPTION).is_file():
        raise UsageError(f"{path} is no index (it has no {DESCRIPTION}); `megainter index` writes one{instead(path)}")


def check_options(options: SearchOptions) -> None:
    """``UsageError`` for paths that are not there and numbers that cannot be."""
    if not 1 <= options.candidates <= MOST_CANDIDATES:
        raise UsageError(f"--candidates is {options.candidates}; give 1 to {MOST_CANDIDATES:,}")
    if options.threads is not None and options.threads < 1:
        raise UsageError(f"--threads is {options.threads}; give at least 1")
    if options.model is not None:
        check_name(options.model, option="--model")
    for name in ("prefilter_model", "store", "images"):
        require_there(getattr(options, name), f"--{name.replace('_', '-')}")
    if options.weights is not None:
        check_name(options.weights, "detector", "--weights")
