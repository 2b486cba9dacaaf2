"""What the InterBERT models are, whichever door they are entered by: their parts, their padded ``forward`` and their losses.

`model.interbert` (packed rows) and `model.plain` (padded rows, plain PyTorch) make their models of these classes: each supplies its
trunk, and how a padded batch becomes states, pooled rows and logits. Such a batch comes as ``texts``, which are ids, mask and token
types [B, T], and ``images``, which are features [B, R, F], locations [B, R, 5] and mask [B, R]; `PaddedInputs.of` says what may be
left out.

Shape letters: B samples, T text columns, R region columns, F the width of a region feature, H hidden, P pooled, V vocabulary,
C region target size, K choices, E examples, M rows that a loss is about, X any width.

No parameter sits on these classes themselves: each is read inside the forward of the module that owns it, where ZeRO-3 gathers it.
"""

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init

from megainter.errors import UsageError
from megainter.kernels import cross_entropy_sum, soft_label_kl_sum, squared_error_sum
from megainter.model.configuration import InterBertConfig
from megainter.model.embeddings import DropoutAddLayerNorm, RegionEmbeddings, RegionScaling, TextEmbeddings
from megainter.model.encoder import Encoder, LinearGelu
from megainter.model.heads import (
    FIRST_FACTOR,
    FIRST_MARGIN,
    FIRST_SCALE,
    ContrastiveHead,
    Decoder,
    Fusion,
    Pooler,
    PredictionHead,
    Similarity,
)
from megainter.model.outputs import (
    InterBertClassificationOutput,
    InterBertForPreTrainingOutput,
    InterBertForRetrievalOutput,
    InterBertModelOutput,
)

ThreeTensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
Attentions = dict[str, tuple[torch.Tensor, ...]]  # by the names of the outputs; empty where nobody asked for them
MATCHED = 0  # class of the image-text matching head for a caption and its own image (official code)


class InterBertArchitecture(PreTrainedModel):
    """What all InterBERT classes share: configuration, initialisation, how Hugging Face tools handle them."""

    config_class = InterBertConfig
    base_model_prefix = "interbert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012 - Hugging Face's name and form
    # One folder may hold the heads of several models; each model takes its own.
    _keys_to_ignore_on_load_unexpected = [r"^(msm|mrm|itm|itc|choice)_head\.", r"^itm_(similarity|vectors)\.", r"^classifier\."]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights N(0, initializer_range), the padding row of the word embeddings too; biases 0, norms 1 and 0 (official code)."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            init.zeros_(module.bias)
        if isinstance(module, DropoutAddLayerNorm | nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        if isinstance(module, ContrastiveHead):
            init.constant_(module.log_scale, math.log(FIRST_SCALE))
        if isinstance(module, Similarity):
            init.constant_(module.log_scale, math.log(FIRST_FACTOR))
            init.constant_(module.margin, FIRST_MARGIN)
        if isinstance(module, RegionScaling):
            init.copy_(module.mean, torch.tensor(self.config.region_mean))
            init.copy_(module.deviation, torch.tensor(self.config.region_deviation))


class Trunk(InterBertArchitecture):
    """Parts and ``forward`` of ``InterBertModel``: embeddings, encoder and poolers."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.text_embeddings = TextEmbeddings(config)
        self.region_embeddings = RegionEmbeddings(config)
        self.encoder = Encoder(config)
        self.text_pooler = Pooler(config)
        self.region_pooler = Pooler(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_embeddings.word = value  # type: ignore[assignment]

    @abstractmethod
    def encode_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> InterBertModelOutput:
        """What ``forward`` gives; ``InterBertModel`` has it."""

    @abstractmethod
    def pool_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Attentions]:
        """Pooled text and pooled regions, [B, P] each (0 rows for a side that is absent), and where layers look."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        text_regions: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> InterBertModelOutput:
        """Text [B, T] and/or regions [B, R, F] with locations [B, R, 5]; row 0 of the regions is the global region.

        ``text_regions`` int64 [B, T], for models with ``tie_objects``: the row of the region that a token names, or -1.
        ``output_attentions``: also where every layer looks, as ``plain_attentions.looking`` says.
        """
        texts, images = (input_ids, attention_mask, token_type_ids), (region_features, region_locations, region_mask)
        return self.encode_padded(texts, images, text_regions, output_attentions)


class OnTrunk(InterBertArchitecture):
    """A model with a trunk, which is an ``InterBertModel`` of the same kind."""

    trunk: type[Trunk]
    interbert: Trunk

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = self.trunk(config)


class Matching(OnTrunk):
    """A model that tells whether a text and an image belong together; with ``config.itc_size`` it has vectors of each alone."""

    itc_head: ContrastiveHead | None
    itm_similarity: Similarity | None
    itm_vectors: Similarity | None

    def _add_matching_heads(self, config: InterBertConfig) -> None:
        self.fusion = Fusion(config)
        self.itm_head = nn.Linear(config.pooler_size, 2)
        self.itc_head = ContrastiveHead(config) if config.itc_size else None
        self.itm_similarity = Similarity() if config.itm_similarity else None
        self.itm_vectors = Similarity() if config.itm_vectors else None


class JudgedRows(NamedTuple):
    """The rows that a loss is the mean of: their logits [M, X], what these should say, and their number, or 1 where there are none."""

    logits: torch.Tensor
    targets: torch.Tensor
    number: int | torch.Tensor


class PreTraining(Matching):
    """Parts and output of ``InterBertForPreTraining``."""

    _tied_weights_keys = {"msm_head.decoder.weight": "interbert.text_embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.msm_head = PredictionHead(config, config.vocab_size)
        self.mrm_head = PredictionHead(config, config.region_target_size)
        self._add_matching_heads(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.msm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """``value`` may be an ordinary linear layer (that of a resized vocabulary): its parameters are taken."""
        decoder = Decoder(value.in_features, value.out_features, device="meta")
        decoder.weight, decoder.bias = value.weight, value.bias
        self.msm_head.decoder = decoder

    def _output(
        self,
        msm: JudgedRows | None,
        mrm: JudgedRows | None,
        itm_labels: torch.Tensor | None,
        itm_logits: torch.Tensor,
        text_logits: torch.Tensor | None,
        region_logits: torch.Tensor | None,
        attentions: Attentions,
    ) -> InterBertForPreTrainingOutput:
        """What ``forward`` gives, with the losses whose labels are there, and their sum."""
        region_sum = soft_label_kl_sum if self.config.region_objective == "class" else squared_error_sum
        msm_loss = cross_entropy_sum(msm.logits, msm.targets) / msm.number if msm is not None else None
        mrm_loss = region_sum(mrm.logits, mrm.targets) / mrm.number if mrm is not None else None
        itm_loss = mean_cross_entropy(itm_logits, itm_labels)
        losses = [loss for loss in (msm_loss, mrm_loss, itm_loss) if loss is not None]
        return InterBertForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            msm_loss=msm_loss,
            mrm_loss=mrm_loss,
            itm_loss=itm_loss,
            text_logits=text_logits,
            region_logits=region_logits,
            itm_logits=itm_logits,
            **attentions,
        )


def masked_regions(
    labels: torch.Tensor | None, targets: torch.Tensor | None, itm_labels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which regions are to be told, bool [B, R-1], and their targets [B, R-1, C]: the masked ones of matched pairs (official code).

    The global region, which is never masked, is not among them. None where no labels were given; ``UsageError`` where one part is missing.
    """
    if labels is None and targets is None:
        return None
    if labels is None or targets is None:
        raise UsageError("mrm_labels and mrm_targets belong together; one of them is missing")
    masked = labels == 1
    if itm_labels is not None:
        masked = masked & (itm_labels == MATCHED)[:, None]
    return masked, targets


class Retrieval(Matching):
    """Parts and ``forward`` of ``InterBertForRetrieval``."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self._add_matching_heads(config)
        self.post_init()

    @abstractmethod
    def match_padded(self, texts: ThreeTensors, images: ThreeTensors, output_attentions: bool) -> tuple[torch.Tensor, Attentions]:
        """Matching logits [B, 2], class 0 = matched, and where layers look."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> InterBertForRetrievalOutput:
        """Pairs of caption and image, row by row. ``labels`` int64 [B], 0 = matched: mean two-way cross entropy (official code).
        ``output_attentions`` as in ``InterBertModel``."""
        texts, images = (input_ids, attention_mask, token_type_ids), (region_features, region_locations, region_mask)
        logits, attentions = self.match_padded(texts, images, output_attentions)
        scores = logits.float().softmax(-1)[:, MATCHED]
        return InterBertForRetrievalOutput(loss=mean_cross_entropy(logits, labels), logits=logits, scores=scores, **attentions)


def mean_cross_entropy(logits_BK: torch.Tensor, labels_B: torch.Tensor | None) -> torch.Tensor | None:
    """The mean over rows, 0 where there are none; None without labels."""
    return cross_entropy_sum(logits_BK, labels_B) / max(len(labels_B), 1) if labels_B is not None else None


class MultipleChoice(OnTrunk):
    """Parts and ``forward`` of ``InterBertForMultipleChoice``."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.fusion = Fusion(config)
        self.choice_head = nn.Linear(config.pooler_size, 1)
        self.post_init()

    def logits_of(self, pooled_text_SP: torch.Tensor, pooled_region_SP: torch.Tensor) -> torch.Tensor:
        """One logit for each choice with its image, [S]."""
        return self.choice_head(self.fusion(pooled_text_SP, pooled_region_SP))[:, 0]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        text_regions: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> InterBertClassificationOutput:
        """Texts [B, K, T]; regions [B, K, R, F], or [B, R, F] when all choices of an example look at the same image (locations and mask
        too). ``labels`` int64 [B], the index of the right choice. ``text_regions`` int64 [B, K, T], for models with ``tie_objects``: the
        row of the region that a token names, or -1. Returns logits [B, K]. ``output_attentions`` as in ``InterBertModel``, of the B * K
        choices in order."""
        choices = input_ids.shape[1]
        per_token = (input_ids, attention_mask, token_type_ids, text_regions)
        ids, mask, types, named = (t.flatten(0, 1) if t is not None else None for t in per_token)
        features, locations = (per_choice(t, choices, shared_dims=3) for t in (region_features, region_locations))
        images = (features, locations, per_choice(region_mask, choices, shared_dims=2))
        pooled, attentions = self.interbert.pool_padded((ids, mask, types), images, named, output_attentions)
        logits = self.logits_of(*pooled).view(input_ids.shape[:2])
        return InterBertClassificationOutput(loss=mean_cross_entropy(logits, labels), logits=logits, **attentions)


def per_choice(tensor: torch.Tensor | None, choices: int, shared_dims: int) -> torch.Tensor | None:
    """[B, ...] shared by all choices, or [B, K, ...] -> [B * K, ...]."""
    if tensor is None:
        return None
    return tensor.repeat_interleave(choices, 0) if tensor.dim() == shared_dims else tensor.flatten(0, 1)


class PairClassifier(nn.Module):
    """From an example's two images, each fused with the same text, to its logits: both vectors side by side through a hidden layer.

    A sum of each image's own logits could not say that one image shows more than the other, which is what such sentences are about.
    """

    def __init__(self, pooler_size: int, num_labels: int) -> None:
        super().__init__()
        self.hidden = LinearGelu(2 * pooler_size, pooler_size)
        self.output = nn.Linear(pooler_size, num_labels)

    def forward(self, fused_SP: torch.Tensor) -> torch.Tensor:
        """[2E, P], an example's two rows together -> [E, num_labels]."""
        return self.output(self.hidden(fused_SP.unflatten(0, (-1, 2)).flatten(1)))


class SequenceClassification(OnTrunk):
    """Parts and ``forward`` of ``InterBertForSequenceClassification``."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.fusion = Fusion(config)
        labels = int(config.num_labels)  # type: ignore[arg-type]
        pairs = images_per_example(config) == 2
        self.classifier = PairClassifier(config.pooler_size, labels) if pairs else nn.Linear(config.pooler_size, labels)
        self.post_init()

    def logits_of(self, pooled_text_SP: torch.Tensor, pooled_region_SP: torch.Tensor) -> torch.Tensor:
        """Logits [E, num_labels] of E examples: as many as samples, or half as many where an example has two images."""
        return self.classifier(self.fusion(pooled_text_SP, pooled_region_SP))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> InterBertClassificationOutput:
        """Texts [B, T] with regions [B, R, F], or [B, 2, R, F] of two images (locations and mask too).

        ``labels`` int64 [B] classes, float [B, num_labels] soft labels, or float [B] values, by the problem. The loss is the mean over
        examples; over labels it is summed, so that its size does not depend on how many answers nobody gave. Logits [B, num_labels].
        ``output_attentions`` as in ``InterBertModel``, of two images of B * 2 samples in order.
        """
        texts, images = (input_ids, attention_mask, token_type_ids), (region_features, region_locations, region_mask)
        if images_per_example(self.config) == 2:
            texts, images = beside_each_image(texts, images)
        pooled, attentions = self.interbert.pool_padded(texts, images, None, output_attentions)
        logits = self.logits_of(*pooled)
        loss = classification_losses(logits, labels, self.config).sum() / max(len(labels), 1) if labels is not None else None
        return InterBertClassificationOutput(loss=loss, logits=logits, **attentions)


def beside_each_image(texts: ThreeTensors, images: ThreeTensors) -> tuple[ThreeTensors, ThreeTensors]:
    """Texts [B, T] and regions [B, 2, R, ...] as [2B, ...]: every text twice, beside one of its images each."""
    if images[0] is None or images[0].dim() != 4 or images[0].shape[1] != 2:
        raise UsageError("a model of two images for each text takes region_features [B, 2, R, F]")
    ids, mask, types = (t.repeat_interleave(2, 0) if t is not None else None for t in texts)
    features, locations, real = (t.flatten(0, 1) if t is not None else None for t in images)
    return (ids, mask, types), (features, locations, real)


def images_per_example(config: PretrainedConfig) -> int:
    """2 for a model of two images for each text, else 1; 0 says that it was trained on texts alone, which takes the same head as 1."""
    return int(getattr(config, "num_images", 1))


def classification_losses(logits_EK: torch.Tensor, labels: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """The loss of each example, float32 [E]: by ``config.problem_type``, see ``InterBertForSequenceClassification``."""
    logits_EK = logits_EK.float()
    problem = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
    if problem == "regression":
        return (logits_EK[:, 0] - labels).square()
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits_EK, labels.float(), reduction="none").sum(1)
    return F.cross_entropy(logits_EK, labels, reduction="none")
