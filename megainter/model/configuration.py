"""The architecture of an InterBERT, as Hugging Face stores it (config.json, model_type "interbert")."""

import math
from typing import Any

from transformers import PretrainedConfig

from megainter.errors import UsageError

FUSIONS = ("mul", "sum")
REGION_OBJECTIVES = ("class", "feature")
ITC_POOLINGS, ITC_REGIONS = ("first", "mean"), ("states", "mean_feature", "first_feature")
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_region_attention_heads",
    "region_feature_size",
    "num_region_classes",
    "pooler_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_COUNTS = ("num_interaction_layers", "num_text_layers", "num_region_layers", "itc_size")
_INPUT_LENGTHS = ("max_regions", "max_text_tokens")
NEARNESS = ("itm_similarity", "itm_vectors")  # of text and image, by which matching may be helped: need vectors
_CHOICES = {"fusion": FUSIONS, "region_objective": REGION_OBJECTIVES, "itc_pooling": ITC_POOLINGS, "itc_regions": ITC_REGIONS}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "region_hidden_dropout_prob", "region_feature_dropout_prob")


class InterBertConfig(PretrainedConfig):
    """Sizes and probabilities of an InterBERT. The defaults are the official base model (157,021,565 parameters with its heads).

    ``num_interaction_layers`` layers see text and regions at once; above them ``num_text_layers`` and ``num_region_layers`` see one
    modality each. Region layers have their own number of heads and hidden dropout, everything else is shared. ``num_region_classes``
    counts the background (class 0). ``pooler_size`` is the width of the pooled vectors that ``fusion`` joins: their product ("mul")
    or their sum. ``region_objective`` "class" predicts the detector's class distribution, "feature" the region feature itself.
    ``max_regions`` (without the global region) and ``max_text_tokens`` ([CLS] and [SEP] included) say what inputs the weights were
    trained on, where that is known; the model itself takes any number. ``tie_objects``: a text token that names an object of the image
    (``text_regions`` of the inputs) gets the embedding of the object's region added; without it ``text_regions`` changes nothing.
    ``detector``, ``detector_name`` and ``region_classes``: whose regions the weights were trained on, the name of its weights where they
    came by one, and the names of its classes, where known.
    ``itc_size``: width of the vectors that a text alone and an image alone become, for image-text contrast; 0: the model has no such head.
    ``itc_pooling``: what they are made of, the pooled first row ("first") or the mean of all rows ("mean").
    ``itc_regions``: "states": regions pass the layers to become a vector; "mean_feature": an image's mean region feature becomes one by a
    linear layer alone, and "first_feature" that of its first region, which in a store with a grid is the whole image.
    ``itm_similarity``: matching also weighs how near such vectors of both sides are, made of states that have seen each other;
    ``itm_vectors``: how near those of each side alone are.
    ``region_mean`` and ``region_deviation``, lists of ``region_feature_size`` numbers: what is subtracted from a region feature, and what
    the rest is divided by, before it is embedded; None: it is embedded as it is (official). ``region_feature_dropout_prob``: of the numbers
    of a feature, in training.

    Raises UsageError for sizes that contradict each other.
    """

    model_type = "interbert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        num_interaction_layers: int = 6,
        num_text_layers: int = 6,
        num_region_layers: int = 6,
        num_region_attention_heads: int = 8,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        region_hidden_dropout_prob: float = 0.2,
        region_feature_dropout_prob: float = 0.0,
        region_feature_size: int = 2048,
        num_region_classes: int = 1601,
        pooler_size: int = 1024,
        fusion: str = "mul",
        region_objective: str = "class",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        max_regions: int | None = None,
        max_text_tokens: int | None = None,
        tie_objects: bool = False,
        itc_size: int = 0,
        itc_pooling: str = "first",
        itc_regions: str = "states",
        itm_similarity: bool = False,
        itm_vectors: bool = False,
        region_mean: list[float] | None = None,
        region_deviation: list[float] | None = None,
        detector: str | None = None,
        detector_name: str | None = None,
        region_classes: list[str] | None = None,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_interaction_layers = num_interaction_layers
        self.num_text_layers = num_text_layers
        self.num_region_layers = num_region_layers
        self.num_region_attention_heads = num_region_attention_heads
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.region_hidden_dropout_prob = region_hidden_dropout_prob
        self.region_feature_dropout_prob = region_feature_dropout_prob
        self.region_feature_size = region_feature_size
        self.num_region_classes = num_region_classes
        self.pooler_size = pooler_size
        self.fusion = fusion
        self.region_objective = region_objective
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.max_regions = max_regions
        self.max_text_tokens = max_text_tokens
        self.tie_objects = tie_objects
        self.itc_size = itc_size
        self.itc_pooling = itc_pooling
        self.itc_regions = itc_regions
        self.itm_similarity = itm_similarity
        self.itm_vectors = itm_vectors
        self.region_mean = region_mean
        self.region_deviation = region_deviation
        self.detector = detector
        self.detector_name = detector_name
        self.region_classes = region_classes
        _check(self)
        if pad_token_id is not None:
            _require_whole("pad_token_id", pad_token_id, least=0)
            if pad_token_id >= self.vocab_size:
                raise UsageError(f"pad_token_id is {pad_token_id}, beyond the vocabulary's {self.vocab_size} entries")
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)  # type: ignore[call-arg]

    @property
    def num_hidden_layers(self) -> int:
        """Layers a text token passes through; tools made for other models ask for this name."""
        return self.num_interaction_layers + self.num_text_layers

    @property
    def itc_of_features(self) -> bool:
        """Whether the vector of an image is made of a feature, and not of states."""
        return self.itc_regions != "states"

    @property
    def standardize_regions(self) -> bool:
        """Whether region features are brought to mean 0 and deviation 1 before they are embedded."""
        return self.region_mean is not None

    @property
    def region_target_size(self) -> int:
        """Width of the region head: classes, or the feature itself."""
        return self.num_region_classes if self.region_objective == "class" else self.region_feature_size


def _check(config: InterBertConfig) -> None:
    for name in _POSITIVE:
        _require_whole(name, getattr(config, name), least=1)
    for name in _COUNTS:
        _require_whole(name, getattr(config, name), least=0)
    for name in _INPUT_LENGTHS:
        if getattr(config, name) is not None:
            _require_whole(name, getattr(config, name), least=1)
    for name in ("tie_objects", *NEARNESS):
        if not isinstance(getattr(config, name), bool):
            raise UsageError(f"{name} is {getattr(config, name)!r}; give true or false")
    for name in NEARNESS:
        if getattr(config, name) and not config.itc_size:
            raise UsageError(f"{name} compares the vectors of image-text contrast; give itc_size above 0, or leave it out")
    for name in ("detector", "detector_name"):
        if not isinstance(getattr(config, name), str | None):
            raise UsageError(f"{name} is {getattr(config, name)!r:.80}; give a feature store's, or null")
    if config.region_classes is not None and not all(isinstance(name, str) for name in list(config.region_classes)):
        raise UsageError(f"region_classes is {config.region_classes!r:.80}; give a list of names, or null")
    for name in DROPOUTS:
        if not isinstance(getattr(config, name), int | float) or not 0 <= getattr(config, name) < 1:
            raise UsageError(f"{name} is {getattr(config, name)}; give a probability of at least 0 and below 1")
    for name in ("num_attention_heads", "num_region_attention_heads"):
        if config.hidden_size % getattr(config, name):
            heads = getattr(config, name)
            raise UsageError(f"hidden_size {config.hidden_size} cannot be shared out over {name} = {heads}; give a divisor of it")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise UsageError(f"{name} is {getattr(config, name)!r}; give one of {', '.join(map(repr, choices))}")
    _check_scaling(config)


def _check_scaling(config: InterBertConfig) -> None:
    mean, deviation = config.region_mean, config.region_deviation
    if (mean is None) != (deviation is None):
        raise UsageError("region_mean and region_deviation belong together; one of them is missing")
    for name, values in (("region_mean", mean), ("region_deviation", deviation)):
        is_list = isinstance(values, list | tuple) and len(values) == config.region_feature_size and all(map(_is_finite, values))
        if values is not None and not is_list:
            raise UsageError(f"{name} is {values!r:.80}; give a list of {config.region_feature_size} numbers, or null")
    if deviation is not None and min(deviation) <= 0:
        raise UsageError(f"region_deviation has {min(deviation)}; features are divided by it: give numbers above 0")


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _require_whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} is {value!r}; give a whole number of at least {least}")
