"""The InterBERT models, as Hugging Face classes with two doors onto one core.

The packed door (`encode`, `score_packed`) takes `PackedInputs` and computes only what is asked for; training and evaluation use it.
The padded door (`forward`, of `model.architecture`) takes ordinary padded tensors with masks; here they are packed, the same core is
called, and the results are padded again (zeros at padding). With ``output_attentions`` it also says where every layer looks, as
``attentions.Watched.padded``.

Shape letters: S samples, Nt text tokens, Nr regions, H hidden, P pooled, V vocabulary, C region target size, B, T, R a padded batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.files import renew_checksums
from megainter.model.architecture import (
    MATCHED,
    Attentions,
    InterBertArchitecture,
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
from megainter.model.attentions import padded_attentions, watched
from megainter.model.configuration import InterBertConfig
from megainter.model.folder import locate_model, named, read_config
from megainter.model.heads import matching_logits, means, rows_compared
from megainter.model.outputs import Asked, Encoded, InterBertForPreTrainingOutput, InterBertModelOutput, PackedLosses, PackedScores
from megainter.model.packing import PackedLayout, pack_padded
from megainter.model.processor import InterBertProcessor
from megainter.model.remote_code import auto_map, write_remote_code
from megainter.model.vectors import BATCH, contrastive_vectors, ready_processor, vectors_of_images, vectors_of_texts

# Options of transformers' ``from_pretrained`` about its own way to the Hub.
_HUB_OPTIONS = {"token", "cache_dir", "force_download", "proxies", "gguf_file", "state_dict"}


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


class InterBertModel(Trunk, InterBertPreTrainedModel):
    """Embeddings, encoder and poolers, without heads."""

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
        region = Asked.of(layout.region_starts, region_rows, layout.region, whole and not self.config.itc_of_features)
        text_XH, region_XH = self.encoder(text_NH, region_NH, layout, text.queries, region.queries)
        pooled_text = self.text_pooler(text_XH.index_select(0, text.starts))
        pooled_region = self.region_pooler(region_XH.index_select(0, region.starts))
        sides = None
        if compared and len(pooled_text) and len(pooled_region):
            sides = self._means(text_XH, region_XH, layout) if whole else (pooled_text, pooled_region)
            if self.config.itc_of_features:
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
        rows, or the means of all rows (then P is the hidden size); where ``config.itc_regions`` is a feature an image's is that,
        [I, F]. UsageError for a sample that has both.
        """
        if self.config.itc_of_features:
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
        """The feature that makes each image's vector, as it is embedded, [I, F]."""
        rows = rows_compared(layout.region_starts, layout.region.cu_seqlens.diff(), self.config)
        seen: torch.Tensor = self.region_embeddings.seen(inputs.region_features.index_select(0, rows))
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

    def encode_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> InterBertModelOutput:
        inputs, places = pack_padded(*texts, *images, self.config.region_feature_size, text_regions)
        with watched(self.encoder, output_attentions) as found:
            encoded = self.encode(inputs)
        return InterBertModelOutput(
            text_states=places.text(encoded.text_states),
            region_states=places.region(encoded.region_states),
            pooled_text=encoded.pooled_text,
            pooled_region=encoded.pooled_region,
            **padded_attentions(found, places),
        )

    def pool_padded(
        self, texts: ThreeTensors, images: ThreeTensors, text_regions: torch.Tensor | None, output_attentions: bool
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], Attentions]:
        inputs, places = pack_padded(*texts, *images, self.config.region_feature_size, text_regions)
        with watched(self.encoder, output_attentions) as found:
            pooled = self.pool(inputs)
        return pooled, padded_attentions(found, places)


def add_named_regions(text_NH: torch.Tensor, region_NH: torch.Tensor, text_regions_N: torch.Tensor) -> torch.Tensor:
    """[Nt, H]: each token's embedding plus that of the region it names (row of ``region_NH``; -1: none).

    Both have passed their layer norms, so that word and region weigh the same whatever the sizes of their tables.
    """
    nothing = len(region_NH)  # a row of zeros; as an embedding look-up, whose gradient is summed in a fixed order on GPUs too
    rows_N = torch.where(text_regions_N < 0, nothing, text_regions_N)
    return text_NH + F.embedding(rows_N, F.pad(region_NH, (0, 0, 0, 1)), padding_idx=nothing)


class _Packed(OnTrunk):
    """A model on the packed trunk."""

    trunk = InterBertModel
    interbert: InterBertModel


class _WithVectors(_Packed, Matching):
    """`Matching` on the packed trunk: a text alone and an image alone as vectors, where the model has them."""

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

    def _matching(self, encoded: Encoded, inputs: PackedInputs) -> torch.Tensor:
        alone = None
        if self.itm_vectors is not None and len(encoded.pooled_text) and len(encoded.pooled_region):
            alone = contrastive_vectors(self, inputs.apart())[:2]
        return matching_logits(self, encoded.pooled_text, encoded.pooled_region, encoded.sides, alone)


class InterBertForPreTraining(PreTraining, _WithVectors, InterBertPreTrainedModel):
    """InterBERT with the heads of masked segment modelling, masked region modelling and image-text matching; with ``config.itc_size`` also
    that of image-text contrast."""

    def score_packed(self, inputs: PackedInputs, msm_positions: torch.Tensor, mrm_positions: torch.Tensor) -> PackedScores:
        """The packed door: logits only at ``msm_positions`` [M] (rows of the Nt tokens) and ``mrm_positions`` [K] (rows of the Nr
        regions), both int64 and possibly empty. Every parameter takes part even then, so ranks always reduce the same gradients."""
        return self._scores(self.interbert.encode_rows(inputs, msm_positions, mrm_positions), inputs)

    def _scores(self, encoded: Encoded, inputs: PackedInputs) -> PackedScores:
        matching = self._matching(encoded, inputs)
        return PackedScores(self.msm_head(encoded.text_states), self.mrm_head(encoded.region_states), matching)

    def judge_packed(
        self, inputs: PackedInputs, msm_positions: torch.Tensor, msm_labels: torch.Tensor, mrm_positions: torch.Tensor
    ) -> PackedLosses:
        """`score_packed` with the vocabulary's logits judged where they are made, against ``msm_labels`` int64 [M]: they are the largest
        tensor of a step, and never whole in memory."""
        encoded = self.interbert.encode_rows(inputs, msm_positions, mrm_positions)
        return PackedLosses(
            *self.msm_head.losses(encoded.text_states, msm_labels),
            self.mrm_head(encoded.region_states),
            self._matching(encoded, inputs),
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
        mrm_rows, region_targets = _mrm_targets(masked_regions(mrm_labels, mrm_targets, itm_labels), places.region_rows)
        wanted_t = torch.arange(len(places.text_rows), device=msm_rows.device) if output_logits else msm_rows
        wanted_r = torch.arange(len(places.region_rows), device=mrm_rows.device) if output_logits else mrm_rows
        with watched(self.interbert.encoder, output_attentions) as found:
            encoded = self.interbert.encode_rows(inputs, wanted_t, wanted_r)
        scores = self._scores(encoded, inputs)
        msm_logits = scores.msm_logits[msm_rows] if output_logits else scores.msm_logits
        mrm_logits = scores.mrm_logits[mrm_rows] if output_logits else scores.mrm_logits
        return self._output(
            JudgedRows(msm_logits, msm_targets, max(len(msm_rows), 1)) if msm_targets is not None else None,
            JudgedRows(mrm_logits, region_targets, max(len(mrm_rows), 1)) if region_targets is not None else None,
            itm_labels,
            itm_logits=scores.itm_logits,
            text_logits=places.text(scores.msm_logits) if output_logits else None,
            region_logits=places.region(scores.mrm_logits) if output_logits else None,
            attentions=padded_attentions(found, places),
        )


def _msm_targets(labels_BT: torch.Tensor | None, text_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed rows that have a label, and their labels (None when no labels were given)."""
    if labels_BT is None:
        return text_rows[:0], None
    labels = labels_BT.flatten()[text_rows]
    rows = (labels != -100).nonzero()[:, 0]
    return rows, labels[rows]


def _mrm_targets(masked: tuple[torch.Tensor, torch.Tensor] | None, region_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed rows of `masked_regions`, and their targets (None when no labels were given)."""
    if masked is None:
        return region_rows[:0], None
    masked_BR, targets = masked
    with_global = F.pad(masked_BR, (1, 0))
    rows = with_global.flatten()[region_rows].nonzero()[:, 0]
    flat_targets = F.pad(targets, (0, 0, 1, 0)).flatten(0, 1)
    return rows, flat_targets[region_rows[rows]]


class InterBertForRetrieval(Retrieval, _WithVectors, InterBertPreTrainedModel):
    """Scores how well caption and image match, with the matching head of pretraining (zero-shot as it comes, or fine-tuned)."""

    def logits_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """Matching logits [S, 2], class 0 = matched."""
        return self._matching(self.interbert.pool_and_compare(inputs), inputs)

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

    def match_padded(self, texts: ThreeTensors, images: ThreeTensors, output_attentions: bool) -> tuple[torch.Tensor, Attentions]:
        inputs, places = pack_padded(*texts, *images, self.config.region_feature_size)
        with watched(self.interbert.encoder, output_attentions) as found:
            encoded = self.interbert.pool_and_compare(inputs)
        return self._matching(encoded, inputs), padded_attentions(found, places)


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


class InterBertForMultipleChoice(MultipleChoice, _Packed, InterBertPreTrainedModel):
    """One score per choice of text for an image (VCR: question and answer, or question, answer and rationale)."""

    def score_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """One logit per packed sample (a sample is one choice with its image), [S]."""
        return self.logits_of(*self.interbert.pool(inputs))


class InterBertForSequenceClassification(SequenceClassification, _Packed, InterBertPreTrainedModel):
    """``config.num_labels`` classes for a text and an image, or for a text or an image alone.

    ``config.num_images`` 2 (default 1): an example is a text with two images (NLVR2), two packed samples one after the other.
    ``config.problem_type`` says what logits mean and what the loss is, as in other models of transformers: "single_label_classification"
    (cross entropy), "multi_label_classification" (binary cross entropy, labels may be soft), "regression" (squared error); where it
    says nothing, one label means regression.
    """

    def score_packed(self, inputs: PackedInputs) -> torch.Tensor:
        """Logits [E, num_labels] of E examples: as many as samples, or half as many where an example has two images."""
        return self.logits_of(*self.interbert.pool(inputs))


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
