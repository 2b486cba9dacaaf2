"""A model and its batch in numbers: parameters, floating-point operations, and what a training step keeps for the backward pass.

The same model as `megainter.model`, counted without building it; tests compare both.
"""

from dataclasses import dataclass, replace

from megainter.config.settings import RunConfig

VOCABULARY, FEATURES, CLASSES = 30522, 2048, 1601  # where the recipe takes them from the data: BERT's, bottom-up-attention's


@dataclass(frozen=True)
class Shape:
    """Sizes of an InterBERT, in the names of its configuration; ``targets`` is the width of the region head.

    ``itc_size`` above 0: image-text contrast is trained, for which a step runs both sides alone, once more before it without gradients.
    ``itc_means``: vectors are made of all rows; ``itc_feature``: images' of a feature instead; ``itm_similarity``: matching compares
    such vectors of pairs too; ``itm_vectors``: and those of their texts and images alone, for which these run once more.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_region_attention_heads: int
    num_interaction_layers: int
    num_text_layers: int
    num_region_layers: int
    region_feature_size: int
    targets: int
    pooler_size: int
    max_position_embeddings: int
    type_vocab_size: int
    hidden_dropout: bool = True
    attention_dropout: bool = True
    itc_size: int = 0
    itc_means: bool = False
    itc_feature: bool = False
    itm_similarity: bool = False
    itm_vectors: bool = False

    @property
    def vector_widths(self) -> tuple[int, int]:
        """How wide is what the vectors of a text and of an image are made of."""
        states = self.hidden_size if self.itc_means else self.pooler_size
        return states, self.region_feature_size if self.itc_feature else states

    @property
    def layers(self) -> int:
        """Transformer layers of all three kinds."""
        return self.num_interaction_layers + self.num_text_layers + self.num_region_layers


@dataclass(frozen=True)
class Load:
    """What one micro-batch holds: samples (a mean need not be whole), and per sample text tokens, regions (the global one included) and
    masked ones of each."""

    samples: float
    text: float
    regions: float
    masked_text: float
    masked_regions: float

    def rows(self, shape: Shape) -> float:
        """Rows that all transformer layers of ``shape`` compute together."""
        text, regions = self.samples * self.text, self.samples * self.regions
        own = shape.num_text_layers * text + shape.num_region_layers * regions
        return shape.num_interaction_layers * (text + regions) + own


def shape_of(config: RunConfig, vocab_size: int | None = None, features: int | None = None, classes: int | None = None) -> Shape:
    """The shape a recipe describes; what it leaves to the data is taken from the arguments, else from BERT and bottom-up-attention."""
    model = config.model
    features = model.region_feature_size or features or FEATURES
    classes = model.num_region_classes or classes or CLASSES
    same = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_region_attention_heads", "num_interaction_layers",
        "num_text_layers", "num_region_layers", "pooler_size", "max_position_embeddings", "type_vocab_size",
    )  # fmt: skip
    return Shape(
        vocab_size=model.vocab_size or vocab_size or VOCABULARY,
        region_feature_size=features,
        targets=classes if model.region_objective == "class" else features,
        hidden_dropout=model.hidden_dropout_prob > 0,
        attention_dropout=model.attention_probs_dropout_prob > 0,
        itc_size=model.itc_size if config.training.itc_weight > 0 else 0,
        itc_means=model.itc_pooling == "mean",
        itc_feature=model.itc_regions != "states",
        itm_similarity=model.itm_similarity,
        itm_vectors=model.itm_vectors,
        **{name: getattr(model, name) for name in same},
    )


def largest_load(config: RunConfig, ranks: int) -> Load:
    """The largest micro-batch of a recipe: ``micro_batch`` of the longest samples, or as many of these as ``micro_tokens`` holds (and a
    rank gets)."""
    training = config.training
    if training.micro_tokens is None:
        return load_of(config, training.micro_batch)
    return load_of(config, min(training.micro_tokens / longest_sample(config), training.global_batch / ranks))


def longest_sample(config: RunConfig) -> int:
    """Tokens of the longest sample that a recipe allows, text and regions, the global one included."""
    return config.data.max_text_tokens + config.data.max_regions + 1


def load_of(config: RunConfig, samples: float, text: float | None = None, regions: float | None = None) -> Load:
    """A micro-batch of ``samples``: lengths as given, else the longest the recipe allows; an eighth of the rows masked, as BERT does."""
    text = text if text is not None else config.data.max_text_tokens
    regions = regions if regions is not None else config.data.max_regions + 1
    return Load(samples, text, regions, text * 0.15, regions * 0.15 * (1 - config.data.mismatch_probability))


def parameters(shape: Shape) -> int:
    """Trainable numbers of the pretraining model: 157,021,565 for the official base model. The MSM decoder is tied to the embeddings."""
    hidden, pooled = shape.hidden_size, shape.pooler_size
    text = hidden * (shape.vocab_size + shape.max_position_embeddings + shape.type_vocab_size) + 2 * hidden
    regions = hidden * (shape.region_feature_size + 1) + hidden * (5 + 1) + 2 * hidden
    head = hidden * (hidden + 1) + 2 * hidden
    heads = 2 * head + shape.vocab_size + shape.targets * (hidden + 1)
    contrast = shape.itc_size * (sum(shape.vector_widths) + 2) + 1 if shape.itc_size else 0
    contrast += 2 * (shape.itm_similarity + shape.itm_vectors)
    return text + regions + shape.layers * layer_parameters(shape) + 2 * pooled * (hidden + 1) + heads + 2 * pooled + 2 + contrast


def tensors(shape: Shape) -> int:
    """Parameter tensors: weight and bias of six linear layers and two norms in a layer, and 28 around (embeddings, poolers, heads); five
    more of contrast, two of similarity."""
    return 16 * shape.layers + 28 + (5 if shape.itc_size else 0) + 2 * (shape.itm_similarity + shape.itm_vectors)


def layer_parameters(shape: Shape) -> int:
    """Numbers of one transformer layer."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    return 4 * hidden * (hidden + 1) + inner * (hidden + 1) + hidden * (inner + 1) + 4 * hidden


def forward_flops(shape: Shape, load: Load) -> float:
    """Operations of one forward pass over a micro-batch whose samples are equally long (multiply and add are two), of both sides alone too
    where contrast is trained."""
    hidden, pooled, samples = shape.hidden_size, shape.pooler_size, load.samples
    asked = of_pairs(shape, load)
    layers = (
        shape.num_interaction_layers * _layer_flops(shape, load.text + load.regions, load.text + load.regions)
        + _stream_flops(shape, shape.num_text_layers, load.text, asked.masked_text + 1)
        + _stream_flops(shape, shape.num_region_layers, load.regions, asked.masked_regions + 1)
    ) * samples
    embeddings = 2 * samples * load.regions * hidden * (shape.region_feature_size + 5)
    poolers = 2 * samples * (2 * hidden * pooled + 2 * pooled)
    msm = 2 * samples * load.masked_text * hidden * (hidden + shape.vocab_size)
    mrm = 2 * samples * load.masked_regions * hidden * (hidden + shape.targets)
    similarity = 2 * samples * sum(shape.vector_widths) * shape.itc_size if shape.itm_similarity else 0.0
    sides = alone_flops(shape, load) * ((shape.itc_size > 0) + shape.itm_vectors)
    return layers + embeddings + poolers + similarity + msm + mrm + sides


def alone_flops(shape: Shape, load: Load) -> float:
    """Operations of one pass of a micro-batch's texts alone and images alone, to their vectors."""
    sides = of_sides(shape, load)
    text, regions = sides.text, sides.regions
    layers = shape.num_interaction_layers * (_layer_flops(shape, text, text) + _layer_flops(shape, regions, regions))
    streams = _stream_flops(shape, shape.num_text_layers, text, sides.masked_text + 1)
    streams += _stream_flops(shape, shape.num_region_layers, regions, sides.masked_regions + 1)
    embeddings = 2 * regions * shape.hidden_size * (shape.region_feature_size + 5)
    poolers = 0 if shape.itc_means else 2 * shape.hidden_size * shape.pooler_size * (1 if shape.itc_feature else 2)
    return load.samples * (layers + streams + embeddings + poolers + 2 * sum(shape.vector_widths) * shape.itc_size)


def of_pairs(shape: Shape, load: Load) -> Load:
    """The same samples with the places that the last layers are asked for besides the first ones: the masked ones, or all where matching
    compares means."""
    if not (shape.itm_similarity and shape.itc_means):
        return load
    return replace(_wholly_asked(load), masked_regions=load.masked_regions) if shape.itc_feature else _wholly_asked(load)


def of_sides(shape: Shape, load: Load) -> Load:
    """The same samples as each side alone is: no masked place is asked for, or all places where vectors are means; and no regions where
    images' vectors are made of a feature."""
    load = replace(load, regions=0.0) if shape.itc_feature else load
    return _wholly_asked(load) if shape.itc_means else replace(load, masked_text=0.0, masked_regions=0.0)


def _wholly_asked(load: Load) -> Load:
    return replace(load, masked_text=load.text - 1, masked_regions=max(load.regions - 1, 0.0))


def _stream_flops(shape: Shape, layers: int, length: float, asked: float) -> float:
    """One sample's layers of a stream: the last computes the rows of masked places and the first one alone."""
    if not layers:
        return 0.0
    return (layers - 1) * _layer_flops(shape, length, length) + _layer_flops(shape, length, min(asked, length))


def _layer_flops(shape: Shape, length: float, asked: float) -> float:
    """Keys and values of all rows; everything else of the rows asked for."""
    hidden = shape.hidden_size
    return 2 * hidden * (2 * hidden * length + (2 * hidden + 2 * shape.intermediate_size) * asked) + 4 * length * asked * hidden


def kept_rows_bytes(shape: Shape, width: int, padded: bool) -> float:
    """Bytes that one layer keeps per row for its backward pass, attention scores aside; ``width`` bytes a number.

    Kept: the input; query, key and value; what attention gives; both layer norms' inputs; the feed-forward's input, and its inner
    rows before and after the activation. Dropout keeps a mask: a byte a number on CUDA, a whole number where ``padded`` (CPU).
    """
    masks = 2 * shape.hidden_size * (width if padded else 1) if shape.hidden_dropout else 0
    return (8 * shape.hidden_size + 2 * shape.intermediate_size) * width + masks


def kept_scores_bytes(shape: Shape, load: Load, width: int, alone: bool = False) -> float:
    """Bytes of attention probabilities that the CPU's plain form keeps over all layers: softmax, and with dropout its mask and product.

    ``alone``: of both sides alone, two sequences a sample, which that form pads to the longer one.
    """
    copies = 3 if shape.attention_dropout else 1
    squares = 2 * max(load.text, load.regions) ** 2 if alone else (load.text + load.regions) ** 2
    joint = shape.num_interaction_layers * shape.num_attention_heads * squares
    text = shape.num_text_layers * shape.num_attention_heads * load.text**2
    regions = shape.num_region_layers * shape.num_region_attention_heads * load.regions**2
    unasked = sum(heads * length * idle for heads, length, idle in (
        (shape.num_attention_heads, load.text, idle_text(shape, load)),
        (shape.num_region_attention_heads, load.regions, idle_regions(shape, load)),
    ))  # fmt: skip
    return copies * width * load.samples * (joint + text + regions - unasked)


def spared_bytes(shape: Shape, load: Load, width: int, padded: bool) -> float:
    """Bytes that the last layers of both streams do not keep: of rows nobody asks for, the input, keys and values alone stay."""
    idle = idle_text(shape, load) + idle_regions(shape, load)
    asked = (load.text if shape.num_text_layers else 0) + (load.regions if shape.num_region_layers else 0) - idle
    copies = asked if idle else 0  # the rows that ask, picked out of the input
    row = shape.hidden_size * width
    return load.samples * (idle * (kept_rows_bytes(shape, width, padded) - 3 * row) - copies * row)


def idle_text(shape: Shape, load: Load) -> float:
    """Text rows of a sample that the last text layer does not compute: all but [CLS] and masked places."""
    return max(0.0, load.text - load.masked_text - 1) if shape.num_text_layers else 0.0


def idle_regions(shape: Shape, load: Load) -> float:
    """Regions of a sample that the last region layer does not compute: all but the global one and masked ones."""
    return max(0.0, load.regions - load.masked_regions - 1) if shape.num_region_layers else 0.0
