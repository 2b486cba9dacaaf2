"""megainter pretrains, fine-tunes and evaluates InterBERT, a BERT over text tokens and image regions.

The model classes are found here but loaded when first named: `import megainter` itself imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from megainter.model.configuration import InterBertConfig as InterBertConfig
    from megainter.model.interbert import (
        InterBertForMultipleChoice as InterBertForMultipleChoice,
    )
    from megainter.model.interbert import (
        InterBertForPreTraining as InterBertForPreTraining,
    )
    from megainter.model.interbert import (
        InterBertForRetrieval as InterBertForRetrieval,
    )
    from megainter.model.interbert import (
        InterBertForSequenceClassification as InterBertForSequenceClassification,
    )
    from megainter.model.interbert import (
        InterBertModel as InterBertModel,
    )
    from megainter.model.processor import InterBertProcessor as InterBertProcessor

_HOMES = {
    "InterBertConfig": "megainter.model.configuration",
    "InterBertModel": "megainter.model.interbert",
    "InterBertForPreTraining": "megainter.model.interbert",
    "InterBertForRetrieval": "megainter.model.interbert",
    "InterBertForMultipleChoice": "megainter.model.interbert",
    "InterBertForSequenceClassification": "megainter.model.interbert",
    "InterBertProcessor": "megainter.model.processor",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'megainter' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def _version() -> str:
    """The installed distribution's version, which its tag gave it; a checkout that nobody installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megainter")
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
