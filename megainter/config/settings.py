"""The settings of a run: frozen dataclasses, filled from a TOML file and then from the command line.

Pretraining's are here, with the sections that fine-tuning shares; each task owns its configuration (``megainter/tasks``).

Every key is known, typed and bounded; an unknown key is an error that names the nearest one. Relative paths are taken from
the current folder, as in a shell.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megainter.precision import AskedPrecision
from megainter.tracking import Tracker


def _names(value: Any) -> Any:
    """What a command line gives for a list: names apart by commas, or none."""
    return () if value is None else tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)  # what stands under a setting is its help text
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_names)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
RecallName = Literal["text_to_image_r_at_1", "vectors_text_to_image_r_at_1", "both_text_to_image_r_at_1"]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """What is read: captions (``prepare``), regions (``extract``) and how both are masked."""

    pairs: Path
    """Captions: what `megainter prepare` wrote."""
    store: Path
    """Regions: what `megainter extract` wrote."""
    split: str = "train"
    """Split of the captions that is trained on."""
    vocabulary: Path | None = None
    """A WordPiece vocab.txt; none: that of model.start_from, else one is trained on the captions."""
    vocabulary_size: Positive = 8000
    """Most entries of a vocabulary that is trained on the captions."""
    lowercase: bool = True
    """Whether captions are lowercased."""
    max_text_tokens: Annotated[int, Field(ge=4)] = 36
    """Longest caption in tokens, [CLS] and [SEP] included; longer ones are cut."""
    max_regions: Positive = 36
    """Most regions of an image, without the global region; of more, the store's first ones are taken."""
    masking: Literal["official", "paper", "bert"] = "official"
    """What is masked: official (the released code's one long span), paper (short segments of whole words), bert (single tokens)."""
    word_segmentation: Literal["auto", "wordpiece", "jieba"] = "auto"
    """Chinese words, for masking "paper": auto (jieba's, where 1 % of the captions have Chinese), jieba, wordpiece (every character)."""
    conditional_masking: bool = False
    """true: a sample has text or regions masked, never both."""
    mismatch_probability: Probability = 0.5
    """Share of samples that get another image's caption, for image-text matching."""
    hard_negatives: Path | None = None
    """What `megainter prepare negatives` wrote for these pairs."""
    hard_negative_share: Probability = 0.2
    """Share of the mismatched captions that are hard negatives, where those are given."""
    batch_negatives: Probability = 0.0
    """Share of the mismatched captions that are drawn inside the step, the likelier the nearer to the image; needs training.itc_weight."""
    contrast_drop: Probability = 0.0
    """Share of a caption's tokens and of an image's regions that contrast leaves out, drawn anew each time; needs training.itc_weight."""
    gate_msm: bool = False
    """true: no masked-segment loss on mismatched captions."""
    max_bad: Probability = 0.01
    """Share of images that may lack regions in the store, their captions left out; one may in any case, unless this is 0."""
    other_detector: bool = False
    """true: take regions of another detector than the starting model was trained on, which is refused otherwise."""
    order: Literal["random", "blocks"] = "random"
    """Order of an epoch's samples: random, or blocks of images that lie near each other in the store, for network disks and hard disks."""
    block: Positive | None = None
    """Samples of a block, for order "blocks"; none: 4096."""
    workers: NotNegative = 2
    """Loader processes of each rank; 0: the rank loads for itself."""


@dataclass(frozen=True, config=STRICT)
class ValidationConfig:
    """Periodic validation on a fixed set of samples; ``pairs`` and ``store`` default to those of the training data."""

    pairs: Path | None = None
    """Captions to validate on; none: those of the training data."""
    store: Path | None = None
    """Regions to validate with; none: those of the training data."""
    split: str = "val"
    """Split of the captions to validate on; without captions of this split there is no validation."""
    samples: Positive = 1000
    """Samples that each validation measures, the same every time."""
    images: NotNegative = 0
    """Images of a gallery, the first of the split, that captions are looked for in at each validation; 0: no recall is measured."""
    captions_per_image: Positive = 1
    """Captions of each image of the gallery that are looked for."""
    candidates: Annotated[int, Field(ge=10)] | None = None
    """Images of a caption and captions of an image that matching looks at, the nearest by the model's own vectors; none: all pairs."""
    best_by: RecallName | None = None
    """Figure by which the best checkpoint is kept in best/: that of matching, of the vectors, or of the sum of both; none: none is."""
    every_steps: NotNegative = 500
    """Steps between two validations; 0: only at the end."""


@dataclass(frozen=True, config=STRICT)
class ModelSettings:
    """The architecture, in the names of ``InterBertConfig``; none: taken from the data (vocabulary, feature store)."""

    start_from: Path | None = None
    """Folder or hf:OWNER/NAME whose weights are the start, with its sizes and vocabulary (`megainter convert bert` makes one of a BERT)."""
    vocab_size: Positive | None = None
    """Entries of the vocabulary; none: as the data has."""
    region_feature_size: Positive | None = None
    """Width of a region's feature; none: as the feature store has."""
    num_region_classes: Positive | None = None
    """Classes of the detector, background included; none: as the feature store has."""
    hidden_size: Positive = 768
    """Width of the hidden states."""
    num_attention_heads: Positive = 12
    """Attention heads of the interaction and text layers."""
    intermediate_size: Positive = 3072
    """Width inside the feed-forward blocks."""
    num_interaction_layers: NotNegative = 6
    """Layers that see text and regions together."""
    num_text_layers: NotNegative = 6
    """Layers of the text stream above the interaction layers."""
    num_region_layers: NotNegative = 6
    """Layers of the region stream above the interaction layers."""
    num_region_attention_heads: Positive = 8
    """Attention heads of the region layers."""
    hidden_dropout_prob: Probability = 0.1
    """Dropout of hidden states."""
    attention_probs_dropout_prob: Probability = 0.1
    """Dropout of attention weights."""
    region_hidden_dropout_prob: Probability = 0.2
    """Dropout of hidden states in the region layers."""
    region_feature_dropout_prob: Probability = 0.0
    """Dropout of the numbers of region features."""
    pooler_size: Positive = 1024
    """Width of the pooled text and image."""
    itc_size: Positive = 256
    """Width of the vectors of a text alone and an image alone, where training.itc_weight is above 0."""
    itc_pooling: Literal["first", "mean"] = "first"
    """What these vectors are made of: the pooled first token and global region, or the means of all tokens and regions."""
    itc_regions: Literal["states", "mean_feature", "first_feature"] = "states"
    """What an image's vector is made of: what layers make of its regions; its mean region feature; or that of its first region."""
    itm_similarity: bool = False
    """true: matching also weighs how near such vectors of a pair are once both sides have seen each other; needs training.itc_weight."""
    standardize_regions: bool = False
    """true: region features are brought to mean 0 and deviation 1 in each of their numbers, by those of the feature store, first of all."""
    itm_vectors: bool = False
    """true: matching also weighs how near the vectors of a pair are, each side alone; needs training.itc_weight."""
    fusion: Literal["mul", "sum"] = "mul"
    """How pooled text and image are joined for matching: product or sum."""
    region_objective: Literal["class", "feature"] = "class"
    """What a masked region's head predicts: the detector's class probabilities, or the feature itself."""
    max_position_embeddings: Positive = 512
    """Longest text that the model has positions for."""
    type_vocab_size: Positive = 2
    """Token types that the model tells apart."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    """Added to the variance in layer norms."""
    initializer_range: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of fresh weights; narrow models need more."""
    gradient_checkpointing: bool = False
    """true: recompute activations in the backward pass; less memory, about a third more time."""


@dataclass(frozen=True, config=STRICT)
class StartConfig:
    """The model that fine-tuning starts from, and what of it may be changed; none: as the model has it."""

    start_from: Path
    """Hugging Face folder of a pretrained model, with its vocabulary, or hf:OWNER/NAME[@REVISION]."""
    hidden_dropout_prob: Probability | None = None
    """Dropout of hidden states."""
    attention_probs_dropout_prob: Probability | None = None
    """Dropout of attention weights."""
    region_hidden_dropout_prob: Probability | None = None
    """Dropout of hidden states in the region layers."""
    region_feature_dropout_prob: Probability | None = None
    """Dropout of the numbers of region features."""
    gradient_checkpointing: bool = False
    """true: recompute activations in the backward pass; less memory, about a third more time."""


@dataclass(frozen=True, config=STRICT)
class TrainingConfig:
    """How long and in what portions; exactly one of ``steps`` and ``epochs``."""

    steps: Positive | None = None
    """Optimiser steps of the whole run, in place of epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training samples, in place of steps; fractions are allowed."""
    global_batch: Positive = 512
    """Samples of one optimiser step over all ranks."""
    micro_batch: Positive = 64
    """Samples of one forward on one rank, where micro_tokens is not given."""
    micro_tokens: Positive | None = None
    """Real tokens, text and regions, of one forward on one rank, in place of micro_batch; the samples of a step stay the same."""
    seed: NotNegative = 42
    """Random seed of weights, sample order, masks, mismatched captions and dropout."""
    log_every: Positive = 20
    """Steps between two records of losses and rates; progress is shown at least once a minute besides."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of a moving average of the weights, which is kept in the checkpoints; 0: no average."""
    ema_warmup: bool = True
    """true: the average reaches back over a tenth of the updates so far at most, so that a short run does not return its start."""
    max_skipped: Positive = 10
    """Updates left out in a row after which the run ends; fp16's first, while the loss scale is sought, do not count."""
    spike_sigma: Annotated[float, Field(ge=0)] = 6.0
    """Standard deviations above the mean of the last steps at which a loss or a gradient norm is told as a spike; 0: none is."""
    spike_window: Annotated[int, Field(ge=4)] = 128
    """Steps that spikes are measured against; judged once half as many are known."""
    spike_action: Literal["tell", "skip", "roll_back"] = "tell"
    """What follows a spike: a line and a record (tell), also no update (skip), or also a return to the last checkpoint (roll_back)."""
    max_roll_backs: NotNegative = 10
    """Times that a run goes back to a checkpoint because of a spike, after which it ends."""
    verify_every: NotNegative = 0
    """Steps between two that are done twice and compared to the bit, to find hardware that computes wrong; 0: never."""
    profile_steps: NotNegative = 0
    """Steps to profile after two of warm-up: a Chrome trace of each rank and a table by module, in the run folder's profile; 0: none."""


@dataclass(frozen=True, config=STRICT)
class PretrainingConfig(TrainingConfig):
    """How long and in what portions, exactly one of ``steps`` and ``epochs``; and how much each objective weighs."""

    msm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-segment loss; 0: no text is masked."""
    mrm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the masked-region loss; 0: no region is masked."""
    itm_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the image-text matching loss; 0: no captions are mismatched."""
    itc_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the image-text contrast loss, over all samples of a step; 0: none, and no vectors of a text or an image alone."""


@dataclass(frozen=True, config=STRICT)
class OptimizerConfig:
    """AdamW or LAMB with decoupled weight decay; linear warmup, then linear decay to ``final_fraction``.

    ``optimizer.compat = "official"`` in a recipe or on the command line stands for the released code's choices (``COMPAT``).
    """

    name: Literal["adamw", "lamb"] = "adamw"
    """LAMB is for global batches of several thousand; its rates are larger (docs/optimizers.md)."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of Adam's second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay."""
    warmup: Probability = 0.1
    """Share of all steps in which the rate rises."""
    final_fraction: Probability = 0.0
    """Learning rate of the last step, as a share of the peak."""
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Gradients with a larger norm are scaled down to this; 0: never. optimizer.clip says whether of all or of each tensor."""
    clip: Literal["global", "tensor"] = "global"
    """What is clipped: the gradient as one vector, or each parameter's for itself."""
    decay_groups: Literal["right", "swapped"] = "right"
    """Where weight decay acts: on matrices and embeddings (right), or on biases and norms (swapped, as in the released code)."""
    bias_correction: bool = True
    """Adam's correction of its moments' bias in the first steps; the released code has none."""
    start_rate: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the learning rate of the layers that a BERT gives: text embeddings, interaction and text layers."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate for each layer below the heads; 1: all layers learn alike."""


@dataclass(frozen=True, config=STRICT)
class EngineConfig:
    """How DeepSpeed runs it."""

    precision: AskedPrecision = "auto"
    """Precision of the model's arithmetic; auto: bf16 where all devices compute it, else fp16 on GPUs, else fp32. Weights stay fp32."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What DeepSpeed shares out over ranks: 0 nothing, 1 the optimiser's state, 2 also gradients, 3 also weights."""
    communication: Literal["fp32", "bf16"] = "fp32"
    """Precision of gradients while they are summed over ranks; bf16 sends half as much (docs/evidence/performance.md)."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON (see ds_configs/) laid over what the settings give."""
    apex: Literal["off", "auto", "on"] = "off"
    """NVIDIA apex's fused optimisers, checked at the start (docs/optimizers.md); auto: where it can be had."""


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """When a checkpoint is published, and how many are kept."""

    every_steps: Positive = 1000
    """Steps between two checkpoints."""
    keep: Positive = 2
    """How many checkpoints are kept, the newest."""
    keep_every: NotNegative = 0
    """Checkpoints of steps that this divides are kept for good besides; a multiple of every_steps, 0: none."""


@dataclass(frozen=True, config=STRICT)
class HangConfig:
    """When ranks that make no progress are named, with their stacks, and the run ended (docs/launch.md)."""

    factor: Annotated[float, Field(ge=0)] = 10.0
    """How many times the median step a step may take without progress, within the two bounds; 0: any time."""
    least: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that every step may take without progress."""
    most: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that no step may take without progress; collectives themselves give up after half an hour."""
    start: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds without progress while data are opened and the first steps compile; 0: any time."""
    validation: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds of a validation without progress; 0: any time."""
    saving: Annotated[float, Field(ge=0)] = 1800.0
    """Seconds of a checkpoint's writing without progress; 0: any time."""


@dataclass(frozen=True, config=STRICT)
class RunConfig:
    """A whole pretraining run."""

    verb: ClassVar[str] = "pretrain"
    output: Path
    """Run folder; the same command goes on with the run in it."""
    data: DataConfig
    training: PretrainingConfig
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    hangs: HangConfig = dataclasses.field(default_factory=HangConfig)
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    tracking: Trackers = ()
    """Experiment trackers that metrics.jsonl is sent to by processes of their own, apart by commas (docs/run-folder.md)."""


@dataclass(frozen=True, config=STRICT, kw_only=True)
class FinetuneConfig:
    """What every fine-tuning run has; a task adds its ``data`` and ``validation``."""

    output: Path
    """Run folder; the same command goes on with the run in it. Its folder `model` is the result."""
    training: TrainingConfig
    model: StartConfig
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    hangs: HangConfig = dataclasses.field(default_factory=HangConfig)
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    tracking: Trackers = ()
    """Experiment trackers that metrics.jsonl is sent to by processes of their own, apart by commas (docs/run-folder.md)."""


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as JSON types, as they are stored in the run folder."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def section_defaults(section: str, kind: type = RunConfig) -> dict[str, Any]:
    """Default of every setting of a section that has one, as JSON types: what a run recorded before the setting existed had."""
    inner = next((field.type for field in dataclasses.fields(kind) if field.name == section), None)
    known = dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else ()
    return {field.name: field.default for field in known if isinstance(field.default, bool | int | float | str | None)}
