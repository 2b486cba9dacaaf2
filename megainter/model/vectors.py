"""Texts alone and images alone as vectors of one space, for the models that were pretrained with image-text contrast (``itc_size``)."""

from collections.abc import Sequence
from typing import Any

import torch

from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.model.processor import InterBertProcessor

BATCH = 256  # texts or images of one forward


def contrastive_vectors(model: Any, inputs: PackedInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ``InterBertForPreTraining.vectors_packed``."""
    _require_head(model)
    vectors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = model.itc_head(*model.interbert.pool_alone(inputs))
    return vectors


@torch.inference_mode()
def vectors_of_texts(model: Any, texts: Sequence[str], processor: InterBertProcessor | None, batch: int) -> torch.Tensor:
    """See ``InterBertForPreTraining.encode_texts``; texts of like length go together."""
    _require_head(model)
    processor = ready_processor(model, processor, "encode_texts()")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("encode_texts() takes a sequence of str, one for each text")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = torch.empty(len(texts), model.config.itc_size)
    for chosen in _batches(order, batch, "batch_texts"):
        inputs = processor.pack([texts[i] for i in chosen], None).to(model.device)
        vectors[chosen] = contrastive_vectors(model, inputs)[0].cpu()
    return vectors


@torch.inference_mode()
def vectors_of_images(
    model: Any, records: Sequence[RegionRecord | RegionViews], processor: InterBertProcessor | None, batch: int
) -> torch.Tensor:
    """See ``InterBertForPreTraining.encode_images``."""
    _require_head(model)
    processor = ready_processor(model, processor, "encode_images()")
    order = sorted(range(len(records)), key=lambda i: len(records[i]))
    vectors = torch.empty(len(records), model.config.itc_size)
    for chosen in _batches(order, batch, "batch_images"):
        inputs = processor.pack(None, [records[i] for i in chosen]).to(model.device)
        vectors[chosen] = contrastive_vectors(model, inputs)[1].cpu()
    return vectors


def ready_processor(model: Any, processor: InterBertProcessor | None, caller: str) -> InterBertProcessor:
    """The processor to use with ``model``: the given one, or that of the folder it came from.

    ``UsageError`` where there is none, where it is another model's, and for a model in training mode.
    """
    if processor is None:
        if not model.name_or_path:
            raise UsageError(f"the model did not come from a folder; give {caller} an InterBertProcessor")
        processor = InterBertProcessor.from_pretrained(model.name_or_path)
    if model.training:
        raise UsageError("the model is in training mode, where dropout changes its scores; call model.eval() first")
    if processor.vocabulary.size > model.config.vocab_size:
        raise UsageError(f"the processor has {processor.vocabulary.size:,} entries, and the model embeds {model.config.vocab_size:,}")
    return processor


def _batches(order: list[int], batch: int, name: str) -> list[list[int]]:
    if batch < 1:
        raise UsageError(f"{name} is {batch}; give at least 1")
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def _require_head(model: Any) -> None:
    if model.itc_head is None:
        raise UsageError("the model has no vectors (itc_size 0); pretrain it with training.itc_weight above 0")
