"""The InterBERT models, as Hugging Face classes with two doors onto one core.

The packed door (`encode`, `score_packed`) takes `PackedInputs` and computes only what is asked for; training and evaluation use it.
The padded door (`forward`) takes ordinary padded tensors with masks, packs them, calls the same core, and pads the results again
(zeros at padding). With ``output_attentions`` it also says where every layer looks, as ``attentions.Watched.padded``.

Shape letters: S samples, Nt text tokens, Nr regions, H hidden, P pooled, V vocabulary, C region target size, B, T, R a padded batch,
K choices.

No parameter sits on these classes themselves: each is read inside the forward of the module that owns it, where ZeRO-3 gathers it.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init

from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.files import renew_checksums
from megainter.kernels import cross_entropy_sum, soft_label_kl_sum, squared_error_sum
from megainter.model.attentions import padded_attentions, watched
from megainter.model.configuration import InterBertConfig
from megainter.model.embeddings import DropoutAddLayerNorm, RegionEmbeddings, RegionScaling, TextEmbeddings
from megainter.model.encoder import Encoder, LinearGelu
from megainter.model.folder import locate_model, named, read_config
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
    matching_logits,
    means,
)
from megainter.model.outputs import (
    Asked,
    Encoded,
    InterBertClassificationOutput,
    InterBertForPreTrainingOutput,
    InterBertForRetrievalOutput,
    InterBertModelOutput,
    PackedLosses,
    PackedScores,
)
from megainter.model.packing import PackedLayout, pack_padded
from megainter.model.processor import InterBertProcessor
from megainter.model.remote_code import auto_map, write_remote_code
from megainter.model.vectors import BATCH, contrastive_vectors, ready_processor, vectors_of_images, vectors_of_texts

# Options of transformers' ``from_pretrained`` about its own way to the Hub.
_HUB_OPTIONS = {"token", "cache_dir", "force_download", "proxies", "gguf_file", "state_dict"}
MATCHED = 0  # class of the image-text matching head for a caption and its own image (official code)


class InterBertArchitecture(PreTrainedModel):
    """What all InterBERT classes share, those of `model.plain` too: configuration, initialisation, how Hugging Face tools handle them."""

    config_class = InterBertConfig
    base_model_prefix = "interbert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]  # noqa: RUF012 - Hugging Face's name and form
    # One folder may hold the heads of several models; each model takes its own.
    _keys_to_ignore_on_load_unexpected = [r"^(msm|mrm|itm|itc|choice)_head\.", r"^itm_similarity\.", r"^classifier\."]  # noqa: RUF012

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


class InterBertPreTrainedModel(InterBertArchitecture):
    """A model of this package: it takes packed batches, and its folders come by path or by name."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """transformers' own, for a folder of ours or a repository of the Hub (``hf:OWNER/NAME[@REVISION]``, or without ``hf:``).

        ``UsageError`` in one line for a path that does not exist, a folder of another kind or without its weights, and as
        ``weights.locate``. Weights are read from safetensors unless ``use_safetensors`` says otherwise.
        """
        name = pretrained_model_name_or_path
        if name is None or _HUB_OPTIONS & kwargs.keys():  # transformers' own ways, and its own errors
            return super().from_pretrained(name, *model_args, **kwargs)
        folder = locate_model(named(name, kwargs.pop("revision", None))).path
        read_config(folder / kwargs.get("subfolder", ""))
        try:
            return super().from_pretrained(folder, *model_args, **{"use_safetensors": True} | kwargs)
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As in transformers, with the file by which transformers alone can load the folder (`model.remote_code`); the checksums of a
        folder that has some are those of what it holds now."""
        self.config.auto_map = auto_map()
        super().save_pretrained(save_directory, *arguments, **options)
        write_remote_code(Path(save_directory))
        renew_checksums(Path(save_directory))


class InterBertModel(InterBertPreTrainedModel):
    """Embeddings, encoder and poolers, without heads."""

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

    def encode(self, inputs: PackedInputs) -> Encoded:
        """The packed door. ``inputs`` must be on the model's device. UsageError when its lengths do not fit the model or its tensors."""
        layout, text_NH, region_NH = self._embed(inputs)
        text_NH, region_NH = self.encoder(text_NH, region_NH, layout)
        starts = text_NH.index_select(0, layout.text_starts), region_NH.index_select(0, layout.region_starts)
        return Encoded(text_NH, region_NH, self.text_pooler(starts[0]), self.region_pooler(starts[1]))

    def encode_rows(self, inputs: PackedInputs, text_rows: torch.Tensor, region_rows: torch.Tensor) -> Encoded:
        """`encode` where only some states are asked for: ``text_states`` [M, H] of ``text_rows`` int64 [M] of the Nt tokens, and
        ``region_states`` [K, H] of ``region_rows`` int64 [K] of the Nr regions, in the order asked for; either may be empty.

        The same numbers; the last layer of each stream computes these rows and the pooled ones alone.
        """
        return self._encode_rows(inputs, text_rows, region_rows, alone=False)

    def _encode_rows(self, inputs: PackedInputs, text_rows: torch.Tensor, region_rows: torch.Tensor, alone: bool) -> Encoded:
        layout, text_NH, region_NH = self._embed(inputs, alone)
        compared = self.config.itm_similarity and not alone
        whole = compared and self.config.itc_pooling == "mean"
        text = Asked.of(layout.text_starts, text_rows, layout.text, whole)
        region = Asked.of(layout.region_starts, region_rows, layout.region, whole and self.config.itc_regions == "states")
        text_XH, region_XH = self.encoder(text_NH, region_NH, layout, text.queries, region.queries)
        pooled_text = self.text_pooler(text_XH.index_select(0, text.starts))
        pooled_region = self.region_pooler(region_XH.index_select(0, region.starts))
        sides = None
        if compared and len(pooled_text) and len(pooled_region):
            sides = self._means(text_XH, region_XH, layout) if whole else (pooled_text, pooled_region)
            if self.config.itc_regions == "feature":
                sides = sides[0], self._seen(inputs, layout)
        return Encoded(text_XH.index_select(0, text.rows), region_XH.index_select(0, region.rows), pooled_text, pooled_region, sides)

    def pool(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The pooled text and regions alone, [S, P] each (0 rows for a modality that is absent)."""
        encoded = self.pool_and_compare(inputs)
        return encoded.pooled_text, encoded.pooled_region

    def pool_and_compare(self, inputs: PackedInputs) -> Encoded:
        """`encode_rows` with no row asked for: what matching needs."""
        nothing = torch.zeros(0, dtype=torch.int64, device=inputs.input_ids.device)
        return self.encode_rows(inputs, nothing, nothing)

    def pool_alone(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """One row for each text [T, P] and each image [I, P] of a batch in which every sample is a text alone or an image's regions alone.

        In any mixture: one pass of all layers for both kinds, in which no sample sees another. By ``config.itc_pooling`` the pooled first
        rows, or the means of all rows (then P is the hidden size); with ``config.itc_regions`` "feature" an image's is its mean region
        feature, [I, F]. UsageError for a sample that has both.
        """
        if self.config.itc_regions == "feature":
            layout = PackedLayout.of(inputs, self.config.max_position_embeddings, alone=True)
            return self._pool_texts(inputs.texts_alone()), self._seen(inputs, layout)
        return self._pool_states(inputs)

    def _pool_texts(self, inputs: PackedInputs) -> torch.Tensor:
        """`_pool_states` of texts; where there are none the layers have nothing to do."""
        if len(inputs):
            return self._pool_states(inputs)[0]
        size = self.config.pooler_size if self.config.itc_pooling == "first" else self.config.hidden_size
        return self.text_embeddings.word.weight.new_zeros(0, size)

    def _pool_states(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        if self.config.itc_pooling == "first":
            nothing = torch.zeros(0, dtype=torch.int64, device=inputs.input_ids.device)
            encoded = self._encode_rows(inputs, nothing, nothing, alone=True)
            return encoded.pooled_text, encoded.pooled_region
        layout, text_NH, region_NH = self._embed(inputs, alone=True)
        text_NH, region_NH = self.encoder(text_NH, region_NH, layout)
        return self._means(text_NH, region_NH, layout)

    def _seen(self, inputs: PackedInputs, layout: PackedLayout) -> torch.Tensor:
        """The mean region feature of each image as it is embedded, [I, F]: that of its global region."""
        seen: torch.Tensor = self.region_embeddings.seen(inputs.region_features.index_select(0, layout.region_starts))
        return seen

    def _means(self, text_NH: torch.Tensor, region_NH: torch.Tensor, layout: PackedLayout) -> tuple[torch.Tensor, torch.Tensor]:
        streams = ((text_NH, layout.text), (region_NH, layout.region))
        text, region = (means(rows, stream.cu_seqlens) for rows, stream in streams)
        return text, region

    def _embed(self, inputs: PackedInputs, alone: bool = False) -> tuple[PackedLayout, torch.Tensor, torch.Tensor]:
        layout = PackedLayout.of(inputs, self.config.max_position_embeddings, alone)
        text_NH = self.text_embeddings(inputs.input_ids, layout.text.position, inputs.token_type_ids)
        region_NH = self.region_embeddings(inputs.region_features, inputs.region_locations)
        if self.config.tie_objects and inputs.text_regions is not None:
            text_NH = add_named_regions(text_NH, region_NH, inputs.text_regions)
        return layout, text_NH, region_NH

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
        """The padded door: text [B, T] and/or regions [B, R, F] with locations [B, R, 5]; row 0 of the regions is the global region.

        ``text_regions`` int64 [B, T], for models with ``tie_objects``: the row of the region that a token names, or -1.
        ``output_attentions``: also where every layer looks, as ``attentions.Watched.padded``.
        """
        size = self.config.region_feature_size
        inputs, places = pack_padded(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            region_features=region_features,
            region_locations=region_locations,
            region_mask=region_mask,
            feature_size=size,
            text_regions=text_regions,
        )
        with watched(self.encoder, output_attentions) as found:
            encoded = self.encode(inputs)
        return InterBertModelOutput(
            text_states=places.text(encoded.text_states),
            region_states=places.region(encoded.region_states),
            pooled_text=encoded.pooled_text,
            pooled_region=encoded.pooled_region,
            **padded_attentions(found, places),
        )


def add_named_regions(text_NH: torch.Tensor, region_NH: torch.Tensor, text_regions_N: torch.Tensor) -> torch.Tensor:
    """[Nt, H]: each token's embedding plus that of the region it names (row of ``region_NH``; -1: none).

    Both have passed their layer norms, so that word and region weigh the same whatever the sizes of their tables.
    """
    nothing = len(region_NH)  # a row of zeros; as an embedding look-up, whose gradient is summed in a fixed order on GPUs too
    rows_N = torch.where(text_regions_N < 0, nothing, text_regions_N)
    return text_NH + F.embedding(rows_N, F.pad(region_NH, (0, 0, 0, 1)), padding_idx=nothing)


class InterBertForPreTraining(InterBertPreTrainedModel):
    """InterBERT with the heads of masked segment modelling, masked region modelling and image-text matching; with ``config.itc_size`` also
    that of image-text contrast."""

    _tied_weights_keys = {"msm_head.decoder.weight": "interbert.text_embeddings.word.weight"}  # noqa: RUF012

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.msm_head = PredictionHead(config, config.vocab_size)
        self.mrm_head = PredictionHead(config, config.region_target_size)
        self.fusion = Fusion(config)
        self.itm_head = nn.Linear(config.pooler_size, 2)
        self.itc_head = ContrastiveHead(config) if config.itc_size else None
        self.itm_similarity = Similarity() if config.itm_similarity else None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.msm_head.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """``value`` may be an ordinary linear layer (that of a resized vocabulary): its parameters are taken."""
        decoder = Decoder(value.in_features, value.out_features, device="meta")
        decoder.weight, decoder.bias = value.weight, value.bias
        self.msm_head.decoder = decoder

    def vectors_packed(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Vectors of the T texts alone [T, D] and of the I images alone [I, D] in ``inputs``, float32 and of length 1, and the logarithm of
        what their products are multiplied by, [1]. UsageError for a model without ``itc_size``, and for a sample with both sides."""
        return contrastive_vectors(self, inputs)

    def encode_texts(self, texts: Sequence[str], processor: InterBertProcessor | None = None, batch_texts: int = BATCH) -> torch.Tensor:
        """Vectors of texts, float32 [N, itc_size] of length 1 on the CPU: their products with those of images say how near both are.

        ``processor`` None: that of the folder the model came from, read at each call. ``UsageError`` for a model without ``itc_size`` or in
        training mode, and for a processor of another model.
        """
        return vectors_of_texts(self, texts, processor, batch_texts)

    def encode_images(
        self, records: Sequence[RegionRecord | RegionViews], processor: InterBertProcessor | None = None, batch_images: int = BATCH
    ) -> torch.Tensor:
        """Vectors of images' regions, float32 [N, itc_size] of length 1 on the CPU; the rest as ``encode_texts``."""
        return vectors_of_images(self, records, processor, batch_images)

    def score_packed(self, inputs: PackedInputs, msm_positions: torch.Tensor, mrm_positions: torch.Tensor) -> PackedScores:
        """The packed door: logits only at ``msm_positions`` [M] (rows of the Nt tokens) and ``mrm_positions`` [K] (rows of the Nr
        regions), both int64 and possibly empty. Every parameter takes part even then, so ranks always reduce the same gradients."""
        encoded = self.interbert.encode_rows(inputs, msm_positions, mrm_positions)
        return PackedScores(
            self.msm_head(encoded.text_states),
            self.mrm_head(encoded.region_states),
            matching_logits(self, encoded.pooled_text, encoded.pooled_region, encoded.sides),
        )

    def judge_packed(
        self, inputs: PackedInputs, msm_positions: torch.Tensor, msm_labels: torch.Tensor, mrm_positions: torch.Tensor
    ) -> PackedLosses:
        """`score_packed` with the vocabulary's logits judged where they are made, against ``msm_labels`` int64 [M]: they are the largest
        tensor of a step, and never whole in memory."""
        encoded = self.interbert.encode_rows(inputs, msm_positions, mrm_positions)
        return PackedLosses(
            *self.msm_head.losses(encoded.text_states, msm_labels),
            self.mrm_head(encoded.region_states),
            matching_logits(self, encoded.pooled_text, encoded.pooled_region, encoded.sides),
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        region_features: torch.Tensor | None = None,
        region_locations: torch.Tensor | None = None,
        region_mask: torch.Tensor | None = None,
        msm_labels: torch.Tensor | None = None,
        mrm_labels: torch.Tensor | None = None,
        mrm_targets: torch.Tensor | None = None,
        itm_labels: torch.Tensor | None = None,
        output_logits: bool = True,
        output_attentions: bool = False,
    ) -> InterBertForPreTrainingOutput:
        """The padded door.

        ``msm_labels`` int64 [B, T], -100 = ignore; ``mrm_labels`` [B, R-1] (without the global region), 1 = masked; ``mrm_targets``
        [B, R-1, C] class probabilities, or features when region_objective is "feature"; ``itm_labels`` int64 [B], 0 = matched.
        A loss is computed when its labels are given: MSM mean over labelled tokens, MRM over masked regions of matched pairs only
        (official code), ITM mean over pairs; each is 0 when there is nothing to average. With ``output_logits=False`` text and
        region logits are None and only the rows a loss needs are computed. ``output_attentions`` as in ``InterBertModel``.
        """
        inputs, places = pack_padded(
            input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, self.config.region_feature_size
        )
        msm_rows, msm_targets = _msm_targets(msm_labels, places.text_rows)
        mrm_rows, region_targets = _mrm_targets(mrm_labels, mrm_targets, itm_labels, places.region_rows)
        wanted_t = torch.arange(len(places.text_rows), device=msm_rows.device) if output_logits else msm_rows
        wanted_r = torch.arange(len(places.region_rows), device=mrm_rows.device) if output_logits else mrm_rows
        with watched(self.interbert.encoder, output_attentions) as found:
            scores = self.score_packed(inputs, wanted_t, wanted_r)
        msm_logits = scores.msm_logits[msm_rows] if output_logits else scores.msm_logits
        mrm_logits = scores.mrm_logits[mrm_rows] if output_logits else scores.mrm_logits
        msm_loss = cross_entropy_sum(msm_logits, msm_targets) / max(len(msm_rows), 1) if msm_targets is not None else None
        mrm_loss = self._region_sum(mrm_logits, region_targets) / max(len(mrm_rows), 1) if region_targets is not None else None
        itm_loss = cross_entropy_sum(scores.itm_logits, itm_labels) / max(len(inputs), 1) if itm_labels is not None else None
        losses = [loss for loss in (msm_loss, mrm_loss, itm_loss) if loss is not None]
        return InterBertForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            msm_loss=msm_loss,
            mrm_loss=mrm_loss,
            itm_loss=itm_loss,
            text_logits=places.text(scores.msm_logits) if output_logits else None,
            region_logits=places.region(scores.mrm_logits) if output_logits else None,
            itm_logits=scores.itm_logits,
            **padded_attentions(found, places),
        )

    def _region_sum(self, logits_KC: torch.Tensor, targets_KC: torch.Tensor) -> torch.Tensor:
        by_class = self.config.region_objective == "class"
        return soft_label_kl_sum(logits_KC, targets_KC) if by_class else squared_error_sum(logits_KC, targets_KC)


def _msm_targets(labels_BT: torch.Tensor | None, text_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed rows that have a label, and their labels (None when no labels were given)."""
    if labels_BT is None:
        return text_rows[:0], None
    labels = labels_BT.flatten()[text_rows]
    rows = (labels != -100).nonzero()[:, 0]
    return rows, labels[rows]


def _mrm_targets(
    labels: torch.Tensor | None, targets: torch.Tensor | None, itm_labels: torch.Tensor | None, region_rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed rows of the masked regions of matched pairs, and their targets (None when no labels were given)."""
    if labels is None and targets is None:
        return region_rows[:0], None
    if labels is None or targets is None:
        raise UsageError("mrm_labels and mrm_targets belong together; one of them is missing")
    masked = labels == 1
    if itm_labels is not None:
        masked = masked & (itm_labels == MATCHED)[:, None]
    with_global = F.pad(masked, (1, 0))  # the global region is never masked
    rows = with_global.flatten()[region_rows].nonzero()[:, 0]
    flat_targets = F.pad(targets, (0, 0, 1, 0)).flatten(0, 1)
    return rows, flat_targets[region_rows[rows]]


class InterBertForRetrieval(InterBertPreTrainedModel):
    """Scores how well caption and image match, with the matching head of pretraining (zero-shot as it comes, or fine-tuned)."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        self.itm_head = nn.Linear(config.pooler_size, 2)
        self.itc_head = ContrastiveHead(config) if config.itc_size else None
        self.itm_similarity = Similarity() if config.itm_similarity else None
        self.post_init()

    def vectors_packed(self, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As ``InterBertForPreTraining.vectors_packed``."""
        return contrastive_vectors(self, inputs)

    def encode_texts(self, texts: Sequence[str], processor: InterBertProcessor | None = None, batch_texts: int = BATCH) -> torch.Tensor:
        """As ``InterBertForPreTraining.encode_texts``."""
        return vectors_of_texts(self, texts, processor, batch_texts)

    def encode_images(
        self, records: Sequence[RegionRecord | RegionViews], processor: InterBertProcessor | None = None, batch_images: int = BATCH
    ) -> torch.Tensor:
        """As ``InterBertForPreTraining.encode_images``."""
        return vectors_of_images(self, records, processor, batch_images)

    def logits_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """Matching logits [S, 2], class 0 = matched."""
        encoded = self.interbert.pool_and_compare(inputs)
        return matching_logits(self, encoded.pooled_text, encoded.pooled_region, encoded.sides)

    def score_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """Log-odds of "matched" as float32 [S]. Its sigmoid is the official score (softmax of the logits, class 0): the same order,
        but log-odds do not round to equal ones where the model is sure."""
        logits_S2 = self.logits_packed(inputs).float()
        return logits_S2[:, MATCHED] - logits_S2[:, 1 - MATCHED]

    @torch.inference_mode()
    def score(
        self,
        texts: str | Sequence[str],
        records: RegionRecord | Sequence[RegionRecord],
        processor: InterBertProcessor | None = None,
        batch_pairs: int = 64,
    ) -> torch.Tensor:
        """How well texts and images match, row by row: log-odds of "matched", float32 [N] on the CPU, the scores of `evaluate retrieval`.

        One text (alone or in a list) is set against all records, one record against all texts; for all texts against all records repeat
        both, or use `evaluate retrieval`. A record without regions is judged by its text alone. Pairs run ``batch_pairs`` at a time,
        those of like length together. ``processor`` None: that of the folder the model came from (give one where many calls are made: it
        is read each time).
        ``UsageError`` for a model in training mode, numbers that do not go together, and a processor of another model.
        """
        texts, records = _side_by_side(texts, records)
        if batch_pairs < 1:
            raise UsageError(f"batch_pairs is {batch_pairs}; give at least 1")
        processor = ready_processor(self, processor, "score()")
        order = sorted(range(len(texts)), key=lambda i: (len(records[i]), len(texts[i])))
        scores = torch.empty(len(texts))
        for start in range(0, len(order), batch_pairs):
            chosen = order[start : start + batch_pairs]
            inputs = processor.pack([texts[i] for i in chosen], [records[i] for i in chosen])
            scores[chosen] = self.score_packed(inputs.to(self.device)).cpu()
        return scores

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
        inputs, places = pack_padded(
            input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, self.config.region_feature_size
        )
        with watched(self.interbert.encoder, output_attentions) as found:
            logits = self.logits_packed(inputs)
        loss = cross_entropy_sum(logits, labels) / max(len(labels), 1) if labels is not None else None
        scores = logits.float().softmax(-1)[:, MATCHED]
        return InterBertForRetrievalOutput(loss=loss, logits=logits, scores=scores, **padded_attentions(found, places))


def _side_by_side(
    texts: str | Sequence[str], records: RegionRecord | Sequence[RegionRecord]
) -> tuple[Sequence[str], Sequence[RegionRecord]]:
    """Texts and records of the same number: one of either is set beside all others."""
    all_texts = [texts] if isinstance(texts, str) else list(texts)
    all_records = [records] if isinstance(records, RegionRecord) else list(records)
    for kind, wanted, given in (("texts", str, all_texts), ("records", RegionRecord, all_records)):
        wrong = [type(one).__name__ for one in given if not isinstance(one, wanted)]
        if wrong:
            raise UsageError(f"{kind} are {wanted.__name__}, not {wrong[0]}; records come from a store: FeatureStore(path)[id]")
    if len(all_texts) == 1:
        all_texts *= len(all_records)
    elif len(all_records) == 1:
        all_records *= len(all_texts)
    if len(all_texts) != len(all_records):
        raise UsageError(f"{len(all_texts)} texts and {len(all_records)} records do not go together row by row, and neither is one")
    return all_texts, all_records


class InterBertForMultipleChoice(InterBertPreTrainedModel):
    """One score per choice of text for an image (VCR: question and answer, or question, answer and rationale)."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        self.choice_head = nn.Linear(config.pooler_size, 1)
        self.post_init()

    def score_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """One logit per packed sample (a sample is one choice with its image), [S]."""
        return self.choice_head(self.fusion(*self.interbert.pool(inputs)))[:, 0]

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
        """Texts [B, K, T]; regions [B, K, R, F], or [B, R, F] when all choices of an example look at the same image (likewise locations
        and mask). ``labels`` int64 [B], the index of the right choice. ``text_regions`` int64 [B, K, T], for models with ``tie_objects``:
        the row of the region that a token names, or -1. Returns logits [B, K]. ``output_attentions`` as in ``InterBertModel``, of the B * K
        choices in order."""
        batch, choices = input_ids.shape[:2]
        per_token = (input_ids, attention_mask, token_type_ids, text_regions)
        ids, mask, types, named = (t.flatten(0, 1) if t is not None else None for t in per_token)
        features, locations = (per_choice(t, choices, shared_dims=3) for t in (region_features, region_locations))
        real = per_choice(region_mask, choices, shared_dims=2)
        inputs, places = pack_padded(
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=types,
            region_features=features,
            region_locations=locations,
            region_mask=real,
            feature_size=self.config.region_feature_size,
            text_regions=named,
        )
        with watched(self.interbert.encoder, output_attentions) as found:
            logits = self.score_packed(inputs).view(batch, choices)
        loss = cross_entropy_sum(logits, labels) / max(batch, 1) if labels is not None else None
        return InterBertClassificationOutput(loss=loss, logits=logits, **padded_attentions(found, places))


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


class InterBertForSequenceClassification(InterBertPreTrainedModel):
    """``config.num_labels`` classes for a text and an image, or for a text or an image alone.

    ``config.num_images`` 2 (default 1): an example is a text with two images (NLVR2), two packed samples one after the other.
    ``config.problem_type`` says what logits mean and what the loss is, as in other models of transformers: "single_label_classification"
    (cross entropy), "multi_label_classification" (binary cross entropy, labels may be soft), "regression" (squared error); where it
    says nothing, one label means regression.
    """

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        labels = int(config.num_labels)  # type: ignore[arg-type]
        pairs = images_per_example(config) == 2
        self.classifier = PairClassifier(config.pooler_size, labels) if pairs else nn.Linear(config.pooler_size, labels)
        self.post_init()

    def score_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """Logits [E, num_labels] of E examples: as many as samples, or half as many where an example has two images."""
        return self.classifier(self.fusion(*self.interbert.pool(inputs)))

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
        """The padded door: texts [B, T] with regions [B, R, F], or [B, 2, R, F] of two images (likewise locations and mask).

        ``labels`` int64 [B] classes, float [B, num_labels] soft labels, or float [B] values, by the problem. The loss is the mean over
        examples; over labels it is summed, so that its size does not depend on how many answers nobody gave. Logits [B, num_labels].
        ``output_attentions`` as in ``InterBertModel``, of two images of B * 2 samples in order.
        """
        texts, images = (input_ids, attention_mask, token_type_ids), (region_features, region_locations, region_mask)
        if images_per_example(self.config) == 2:
            texts, images = beside_each_image(texts, images)
        inputs, places = pack_padded(*texts, *images, self.config.region_feature_size)
        with watched(self.interbert.encoder, output_attentions) as found:
            logits = self.score_packed(inputs)
        loss = classification_losses(logits, labels, self.config).sum() / max(len(labels), 1) if labels is not None else None
        return InterBertClassificationOutput(loss=loss, logits=logits, **padded_attentions(found, places))


ThreeTensors = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


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


def _register(*pairs: tuple[Any, type[PreTrainedModel]]) -> None:
    AutoConfig.register(InterBertConfig.model_type, InterBertConfig, exist_ok=True)
    for auto, model in pairs:
        auto.register(InterBertConfig, model, exist_ok=True)


_register(
    (AutoModel, InterBertModel),
    (AutoModelForPreTraining, InterBertForPreTraining),
    (AutoModelForNextSentencePrediction, InterBertForRetrieval),
    (AutoModelForMultipleChoice, InterBertForMultipleChoice),
    (AutoModelForSequenceClassification, InterBertForSequenceClassification),
)
