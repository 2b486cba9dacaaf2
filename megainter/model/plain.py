"""InterBERT in plain PyTorch on padded batches: no packing, no fused kernel, no shape that depends on a value.

The same parameters under the same names as `model.interbert`, and the same numbers. This is what a model's folder carries along for
those who have transformers alone (`model.remote_code` writes this module and what it uses into one file), and what ONNX is made of.
Shape letters: B samples, T text columns, R region columns, H hidden, P pooled, V vocabulary, C region target size,
L columns of either side, X any width.
"""

import torch
import torch.nn.functional as F

from megainter.errors import UsageError
from megainter.model.architecture import (
    Attentions,
    JudgedRows,
    Matching,
    MultipleChoice,
    OnTrunk,
    PreTraining,
    Retrieval,
    SequenceClassification,
    ThreeTensors,
    Trunk,
    masked_regions,
)
from megainter.model.embeddings import at_least_single
from megainter.model.heads import TwoSides, matching_logits, rows_compared
from megainter.model.outputs import InterBertForPreTrainingOutput, InterBertModelOutput
from megainter.model.padding import PaddedInputs, PaddedStreams, first_rows, mean_rows, positions_of, require_both_sides
from megainter.model.plain_attentions import looking


class InterBertModel(Trunk):
    """Embeddings, encoder and poolers, without heads."""

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

    def encode_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> InterBertModelOutput:
        inputs = PaddedInputs.of(*texts, *images, self.config.region_feature_size)
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

    def pool_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Attentions]:
        inputs = PaddedInputs.of(*texts, *images, self.config.region_feature_size)
        with looking(self.encoder, output_attentions) as attentions:
            pooled = self.pool(inputs, text_regions)
        return pooled, attentions


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


class _Plain(OnTrunk):
    """A model on the plain trunk."""

    trunk = InterBertModel
    interbert: InterBertModel


class _WithVectors(_Plain, Matching):
    """`Matching` on the plain trunk: a text alone and an image alone as vectors, where the model has them (``config.itc_size``)."""

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
        if self.config.itc_of_features and not inputs.has_text:
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
            if self.config.itc_of_features:
                sides = sides[0], self._seen(inputs)
        return matching_logits(self, *pooled, sides, self._alone(inputs))

    def _alone(self, inputs: PaddedInputs) -> TwoSides | None:
        """Vectors of texts and of images, each alone, where matching weighs them and both are there."""
        if self.itm_vectors is None or not (inputs.has_text and inputs.has_regions):
            return None
        size = self.config.region_feature_size
        texts = PaddedInputs.of(inputs.input_ids, inputs.text_real, inputs.token_type_ids, None, None, None, size)
        images = PaddedInputs.of(None, None, None, inputs.region_features, inputs.region_locations, inputs.region_real, size)
        return self._vectors(texts), self._vectors(images)

    def _seen(self, inputs: PaddedInputs) -> torch.Tensor:
        """The feature that makes each image's vector, as it is embedded, [B, F]."""
        lengths_B = inputs.region_real.sum(1)
        numbers_B = rows_compared(torch.zeros_like(lengths_B), lengths_B, self.config)  # among the image's own rows
        here = inputs.region_real & (inputs.region_real.cumsum(1) - 1 == numbers_B[:, None])
        seen: torch.Tensor = self.interbert.region_embeddings.seen(first_rows(inputs.region_features, here))
        return seen


class InterBertForPreTraining(PreTraining, _WithVectors):
    """InterBERT with the heads of masked segment modelling, masked region modelling and image-text matching; with ``config.itc_size`` also
    that of image-text contrast."""

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

        # what the losses are about
        msm = mrm = None
        if msm_labels is not None:
            msm = _judged(text_logits, msm_labels, inputs.text_real & (msm_labels != -100))
        masked = masked_regions(mrm_labels, mrm_targets, itm_labels)
        if masked is not None:
            mrm = _judged(region_logits[:, 1:], masked[1], inputs.region_real[:, 1:] & masked[0])
        return self._output(msm, mrm, itm_labels, itm_logits, text_logits, region_logits, attentions)


def _judged(logits_BLX: torch.Tensor, targets_BL: torch.Tensor, rows_BL: torch.Tensor) -> JudgedRows:
    return JudgedRows(logits_BLX[rows_BL], targets_BL[rows_BL], rows_BL.sum().clamp(min=1))


class InterBertForRetrieval(Retrieval, _WithVectors):
    """Scores how well caption and image match, with the matching head of pretraining (zero-shot as it comes, or fine-tuned)."""

    def match_padded(self, texts: ThreeTensors, images: ThreeTensors, output_attentions: bool) -> tuple[torch.Tensor, Attentions]:
        inputs = PaddedInputs.of(*texts, *images, self.config.region_feature_size)
        with looking(self.interbert.encoder, output_attentions) as attentions:
            states = self.interbert.encode(inputs)
        return self._matching(*states, inputs), attentions


class InterBertForMultipleChoice(MultipleChoice, _Plain):
    """One score per choice of text for an image (VCR: question and answer, or question, answer and rationale)."""


class InterBertForSequenceClassification(SequenceClassification, _Plain):
    """``config.num_labels`` classes for a text and an image, or for a text or an image alone; ``config.num_images`` 2: for a text with two
    images. ``config.problem_type`` says what logits mean and what the loss is, as in other models of transformers."""
