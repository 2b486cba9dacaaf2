"""InterBERT in plain PyTorch on padded batches: no packing, no fused kernel, no shape that depends on a value.

The same parameters under the same names as `model.interbert`, and the same numbers. This is what a model's folder carries along for
those who have transformers alone (`model.remote_code` writes this module and what it uses into one file), and what ONNX is made of.
Shape letters: B samples, T text columns, R region columns, H hidden, P pooled, V vocabulary, C region target size, K choices.
"""

import torch
import torch.nn.functional as F
from torch import nn

from megainter.errors import UsageError
from megainter.kernels import cross_entropy_sum, soft_label_kl_sum, squared_error_sum
from megainter.model.configuration import InterBertConfig
from megainter.model.embeddings import RegionEmbeddings, TextEmbeddings, at_least_single
from megainter.model.encoder import Encoder
from megainter.model.heads import ContrastiveHead, Decoder, Fusion, Pooler, PredictionHead, Similarity, matching_logits
from megainter.model.interbert import (
    MATCHED,
    InterBertArchitecture,
    PairClassifier,
    beside_each_image,
    classification_losses,
    images_per_example,
    per_choice,
)
from megainter.model.outputs import (
    InterBertClassificationOutput,
    InterBertForPreTrainingOutput,
    InterBertForRetrievalOutput,
    InterBertModelOutput,
)
from megainter.model.padding import PaddedInputs, PaddedStreams, first_rows, mean_rows, positions_of, require_both_sides
from megainter.model.plain_attentions import looking


class InterBertModel(InterBertArchitecture):
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

    def encode(self, inputs: PaddedInputs, text_regions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Last states of text [B, T, H] and of regions [B, R, H]; those of padding mean nothing."""
        if not torch.compiler.is_compiling():
            require_both_sides(inputs, self.config.max_position_embeddings)
        text_BTH = self.text_embeddings(inputs.input_ids, positions_of(inputs.text_real), inputs.token_type_ids)
        region_BRH = self.region_embeddings(inputs.region_features, inputs.region_locations)
        if self.config.tie_objects and text_regions is not None:
            text_BTH = add_named_columns(text_BTH, region_BRH, torch.where(inputs.text_real, text_regions, -1), inputs.region_real)
        states: tuple[torch.Tensor, torch.Tensor] = self.encoder(
            text_BTH, region_BRH, PaddedStreams.of(inputs.text_real, inputs.region_real)
        )
        return states

    def pool(self, inputs: PaddedInputs, text_regions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled text and pooled regions, [B, P] each (0 rows for a side that is absent)."""
        return self._pooled(*self.encode(inputs, text_regions), inputs)

    def _pooled(self, text_BTH: torch.Tensor, region_BRH: torch.Tensor, inputs: PaddedInputs) -> tuple[torch.Tensor, torch.Tensor]:
        firsts = first_rows(text_BTH, inputs.text_real), first_rows(region_BRH, inputs.region_real)
        return self.text_pooler(firsts[0]), self.region_pooler(firsts[1])

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
        ``output_attentions``: also where every layer looks, as ``looking`` says.
        """
        size = self.config.region_feature_size
        inputs = PaddedInputs.of(input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, size)
        with looking(self.encoder, output_attentions) as attentions:
            text_BTH, region_BRH = self.encode(inputs, text_regions)
        pooled_text, pooled_region = self._pooled(text_BTH, region_BRH, inputs)
        return InterBertModelOutput(
            text_states=_real_alone(text_BTH, inputs.text_real),
            region_states=_real_alone(region_BRH, inputs.region_real),
            pooled_text=pooled_text,
            pooled_region=pooled_region,
            **attentions,
        )


def add_named_columns(
    text_BTH: torch.Tensor, region_BRH: torch.Tensor, text_regions_BT: torch.Tensor, region_real_BR: torch.Tensor
) -> torch.Tensor:
    """[B, T, H]: each token's embedding plus that of the region it names (column of ``region_BRH``; -1: none)."""
    with_nothing = F.pad(_real_alone(region_BRH, region_real_BR), (0, 0, 0, 1))  # a column of zeros
    columns_BT = torch.where(text_regions_BT < 0, region_BRH.shape[1], text_regions_BT)
    return text_BTH + with_nothing.gather(1, columns_BT[..., None].expand(-1, -1, text_BTH.shape[2]))


def _real_alone(rows_BLX: torch.Tensor, real_BL: torch.Tensor) -> torch.Tensor:
    """The same with zeros at padding."""
    return torch.where(real_BL[..., None], rows_BLX, 0.0)


class _WithVectors(InterBertArchitecture):
    """Models that may have the head of image-text contrast (``config.itc_size``): a text alone and an image alone as vectors."""

    interbert: InterBertModel
    itc_head: ContrastiveHead | None
    itm_similarity: Similarity | None

    def encode_texts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Texts [B, T] -> vectors of length 1, float32 [B, itc_size]: products with those of images say how near both are.

        ``UsageError`` for a model that has no such vectors.
        """
        size = self.config.region_feature_size
        return self._vectors(PaddedInputs.of(input_ids, attention_mask, token_type_ids, None, None, None, size))

    def encode_images(
        self, region_features: torch.Tensor, region_locations: torch.Tensor, region_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Regions [B, R, F] with locations [B, R, 5], the global region first -> vectors as ``encode_texts``. They depend on no text."""
        size = self.config.region_feature_size
        return self._vectors(PaddedInputs.of(None, None, None, region_features, region_locations, region_mask, size))

    def _vectors(self, inputs: PaddedInputs) -> torch.Tensor:
        if self.itc_head is None:
            raise UsageError("the model has no vectors (itc_size 0): it was not trained with image-text contrast")
        if self.config.itc_regions == "feature" and not inputs.has_text:
            return F.normalize(at_least_single(self.itc_head.region(self._seen(inputs))), dim=-1)
        text_BTH, region_BRH = self.interbert.encode(inputs)
        states, real = (text_BTH, inputs.text_real) if inputs.has_text else (region_BRH, inputs.region_real)
        if self.config.itc_pooling == "mean":
            pooled = mean_rows(states, real)
        else:
            pooled = (self.interbert.text_pooler if inputs.has_text else self.interbert.region_pooler)(first_rows(states, real))
        into = self.itc_head.text if inputs.has_text else self.itc_head.region
        return F.normalize(at_least_single(into(pooled)), dim=-1)

    def _matching(self, text_BTH: torch.Tensor, region_BRH: torch.Tensor, inputs: PaddedInputs) -> torch.Tensor:
        pooled = self.interbert._pooled(text_BTH, region_BRH, inputs)
        sides = None
        if self.itm_similarity is not None and inputs.has_text and inputs.has_regions:
            sides = pooled
            if self.config.itc_pooling == "mean":
                sides = mean_rows(text_BTH, inputs.text_real), mean_rows(region_BRH, inputs.region_real)
            if self.config.itc_regions == "feature":
                sides = sides[0], self._seen(inputs)
        return matching_logits(self, *pooled, sides)

    def _seen(self, inputs: PaddedInputs) -> torch.Tensor:
        """The mean region feature of each image as it is embedded, [B, F]: that of its global region."""
        seen: torch.Tensor = self.interbert.region_embeddings.seen(first_rows(inputs.region_features, inputs.region_real))
        return seen


class InterBertForPreTraining(_WithVectors):
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
        decoder = Decoder(value.in_features, value.out_features, device="meta")
        decoder.weight, decoder.bias = value.weight, value.bias
        self.msm_head.decoder = decoder

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
        output_attentions: bool = False,
    ) -> InterBertForPreTrainingOutput:
        """Logits [B, T, V], [B, R, C] (zeros at padding) and [B, 2] (class 0 = matched), and the losses whose labels are given.

        ``msm_labels`` int64 [B, T], -100 = ignore; ``mrm_labels`` [B, R-1] (without the global region), 1 = masked; ``mrm_targets``
        [B, R-1, C] class probabilities, or features when region_objective is "feature"; ``itm_labels`` int64 [B], 0 = matched. MSM is the
        mean over labelled tokens, MRM over masked regions of matched pairs, ITM over pairs; each is 0 where there is nothing to average.
        """
        size = self.config.region_feature_size
        inputs = PaddedInputs.of(input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, size)
        with looking(self.interbert.encoder, output_attentions) as attentions:
            text_BTH, region_BRH = self.interbert.encode(inputs)
        text_logits = _real_alone(self.msm_head(text_BTH), inputs.text_real)
        region_logits = _real_alone(self.mrm_head(region_BRH), inputs.region_real)
        itm_logits = self._matching(text_BTH, region_BRH, inputs)

        # the losses whose labels are there
        msm_loss = mrm_loss = itm_loss = None
        if msm_labels is not None:
            rows = inputs.text_real & (msm_labels != -100)
            msm_loss = cross_entropy_sum(text_logits[rows], msm_labels[rows]) / rows.sum().clamp(min=1)
        if mrm_labels is not None or mrm_targets is not None:
            mrm_loss = self._region_loss(region_logits, inputs.region_real, mrm_labels, mrm_targets, itm_labels)
        if itm_labels is not None:
            itm_loss = cross_entropy_sum(itm_logits, itm_labels) / max(len(itm_labels), 1)
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

    def _region_loss(
        self,
        logits_BRC: torch.Tensor,
        real_BR: torch.Tensor,
        labels: torch.Tensor | None,
        targets: torch.Tensor | None,
        itm_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        if labels is None or targets is None:
            raise UsageError("mrm_labels and mrm_targets belong together; one of them is missing")
        rows = real_BR[:, 1:] & (labels == 1)  # the global region is never masked
        if itm_labels is not None:
            rows = rows & (itm_labels == MATCHED)[:, None]
        summed = soft_label_kl_sum if self.config.region_objective == "class" else squared_error_sum
        return summed(logits_BRC[:, 1:][rows], targets[rows]) / rows.sum().clamp(min=1)


class InterBertForRetrieval(_WithVectors):
    """Scores how well caption and image match, with the matching head of pretraining (zero-shot as it comes, or fine-tuned)."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        self.itm_head = nn.Linear(config.pooler_size, 2)
        self.itc_head = ContrastiveHead(config) if config.itc_size else None
        self.itm_similarity = Similarity() if config.itm_similarity else None
        self.post_init()

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
        """Pairs of caption and image, row by row. ``labels`` int64 [B], 0 = matched: mean two-way cross entropy."""
        size = self.config.region_feature_size
        inputs = PaddedInputs.of(input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask, size)
        with looking(self.interbert.encoder, output_attentions) as attentions:
            logits = self._matching(*self.interbert.encode(inputs), inputs)
        loss = cross_entropy_sum(logits, labels) / max(len(labels), 1) if labels is not None else None
        return InterBertForRetrievalOutput(loss=loss, logits=logits, scores=logits.float().softmax(-1)[:, MATCHED], **attentions)


class InterBertForMultipleChoice(InterBertArchitecture):
    """One score per choice of text for an image (VCR: question and answer, or question, answer and rationale)."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        self.choice_head = nn.Linear(config.pooler_size, 1)
        self.post_init()

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
        row of the region that a token names, or -1. Returns logits [B, K]."""
        batch, choices = input_ids.shape[:2]
        per_token = (input_ids, attention_mask, token_type_ids, text_regions)
        ids, mask, types, named = (t.flatten(0, 1) if t is not None else None for t in per_token)
        features, locations = (per_choice(t, choices, shared_dims=3) for t in (region_features, region_locations))
        real = per_choice(region_mask, choices, shared_dims=2)
        inputs = PaddedInputs.of(ids, mask, types, features, locations, real, self.config.region_feature_size)
        with looking(self.interbert.encoder, output_attentions) as attentions:
            logits = self.choice_head(self.fusion(*self.interbert.pool(inputs, named))).view(batch, choices)
        loss = cross_entropy_sum(logits, labels) / max(batch, 1) if labels is not None else None
        return InterBertClassificationOutput(loss=loss, logits=logits, **attentions)


class InterBertForSequenceClassification(InterBertArchitecture):
    """``config.num_labels`` classes for a text and an image, or for a text or an image alone; ``config.num_images`` 2: for a text with two
    images. ``config.problem_type`` says what logits mean and what the loss is, as in other models of transformers."""

    def __init__(self, config: InterBertConfig) -> None:
        super().__init__(config)
        self.interbert = InterBertModel(config)
        self.fusion = Fusion(config)
        labels = int(config.num_labels)  # type: ignore[arg-type]
        pairs = images_per_example(config) == 2
        self.classifier = PairClassifier(config.pooler_size, labels) if pairs else nn.Linear(config.pooler_size, labels)
        self.post_init()

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
        """Texts [B, T] with regions [B, R, F], or [B, 2, R, F] of two images (locations and mask too). ``labels`` int64 [B] classes, float
        [B, num_labels] soft labels, or float [B] values, by the problem. Logits [B, num_labels]."""
        texts, images = (input_ids, attention_mask, token_type_ids), (region_features, region_locations, region_mask)
        if images_per_example(self.config) == 2:
            texts, images = beside_each_image(texts, images)
        inputs = PaddedInputs.of(*texts, *images, self.config.region_feature_size)
        with looking(self.interbert.encoder, output_attentions) as attentions:
            logits = self.classifier(self.fusion(*self.interbert.pool(inputs)))
        loss = classification_losses(logits, labels, self.config).sum() / max(len(labels), 1) if labels is not None else None
        return InterBertClassificationOutput(loss=loss, logits=logits, **attentions)
