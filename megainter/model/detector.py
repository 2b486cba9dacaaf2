"""Whose regions a model was trained on: kept in its configuration, and compared with a store's.

Two detectors may give features of one width that mean nothing alike; scores from them would be no error, and no better than chance.
"""

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import StoreSchema
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.weights import origin_name


def keep_detector(config: InterBertConfig, schema: StoreSchema, name: str | None) -> None:
    """Write into a model's configuration whose regions it is trained on; ``name``: of the detector's weights, where they have one."""
    config.detector, config.detector_name, config.region_classes = schema.described_by, name, list(schema.class_names)


def detector_in_words(fingerprint: str, name: str | None) -> str:
    """A detector by the name of its weights, where they came by one, and its fingerprint."""
    return f"{f'{name}, ' if name is not None else ''}{fingerprint!r:.120}"


def require_detector(config: InterBertConfig, model: object, store: FeatureStore, option: str, other: bool) -> str:
    """What is to be said where the ``model`` does not say whose regions it was trained on; "" where it does, or ``other`` ones will do.

    ``UsageError`` where the ``store`` has another detector's regions, or of other classes; by ``option`` the user says that they will do.
    """
    if other:
        return ""
    if config.detector is None:
        return f"{model} names no detector that its regions were found by: whether {store.path} has the same one's is not checked"
    theirs = detector_in_words(config.detector, config.detector_name)
    if store.schema.described_by != config.detector:
        raise UsageError(f"{model} was trained on regions of {theirs}, and {_of(store)}: {_remedy(option)}")
    if config.region_classes is not None and list(store.schema.class_names) != config.region_classes:
        raise UsageError(f"{model} was trained on regions of other classes than {store.path} has, by one detector: {_remedy(option)}")
    return ""


def require_width(width: int, model: object, store: FeatureStore) -> None:
    """``UsageError`` where the ``store`` has features of another width than the ``model``, or first stage, takes."""
    if store.schema.feature_size != width:
        sizes = f"{width} numbers a region, and {store.path} has {store.schema.feature_size}, of {_detector(store)}"
        raise UsageError(f"{model} takes features of {sizes}: extract these images with the detector of its training")


def _of(store: FeatureStore) -> str:
    return f"{store.path} has those of {_detector(store)}"


def _detector(store: FeatureStore) -> str:
    """The store's detector, by the name of its weights too where they came by one."""
    return detector_in_words(store.schema.described_by, origin_name(store.path))


def require_same_detector(store: FeatureStore, other: FeatureStore, option: str) -> None:
    """``UsageError`` where ``other``, which ``option`` names, has features of another width or another detector than ``store``."""
    one, two = store.schema, other.schema
    if two.feature_size != one.feature_size:
        sizes = f"{one.feature_size}-d features, {option} {other.path} {two.feature_size}-d ones"
        raise UsageError(f"{store.path} has {sizes}; extract both with one detector")
    if two.described_by != one.described_by:
        both = f"{_detector(store)} and {_detector(other)}"
        raise UsageError(f"{store.path} and {option} {other.path} are of different detectors, {both}; extract both with one")


def _remedy(option: str) -> str:
    return f"extract these images with that detector's weights, or say that others will do with {option}"
