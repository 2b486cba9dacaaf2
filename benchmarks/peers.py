"""What `benchmarks.against_peers` compares with: InterBERT as its released code computes it, and two models of `transformers`.

All work on padded batches [B, 36 text + 37 region positions] and compute every logit, as those programs do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertModel, VisualBertConfig, VisualBertForPreTraining
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from megainter.conversion.official_names import official_name
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class PaddedBatch:
    """A batch with padding: masks are 1 at real positions, ``msm_labels`` -100 and ``mrm_labels`` 0 where nothing is predicted."""

    input_ids: Tensor  # int64 [B, T]
    text_mask: Tensor  # float32 [B, T]
    features: Tensor  # float32 [B, R, F], the global region first
    locations: Tensor  # float32 [B, R, 5]
    region_mask: Tensor  # float32 [B, R]
    msm_labels: Tensor  # int64 [B, T]
    mrm_labels: Tensor  # float32 [B, R - 1]
    mrm_targets: Tensor  # float32 [B, R - 1, C]
    itm_labels: Tensor  # int64 [B]

    def to(self, device: torch.device) -> "PaddedBatch":
        """The same batch on ``device``, copied without waiting where its memory is pinned."""
        return PaddedBatch(**{field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)})

    def pin_memory(self) -> "PaddedBatch":
        """The same batch in page-locked memory."""
        return PaddedBatch(**{field.name: getattr(self, field.name).pin_memory() for field in fields(self)})


def official_weights(model: InterBertForPreTraining, device: torch.device | str = "cpu") -> Weights:
    """Copies of the weights under the released code's names, to be trained; the tied decoder is the word embedding itself."""
    config: InterBertConfig = model.config  # type: ignore[assignment]
    named = {official_name(name, config): p.detach().to(device, torch.float32, copy=True) for name, p in model.named_parameters()}
    return {name: value.requires_grad_() for name, value in named.items()}


def released_losses(p: Weights, config: InterBertConfig, batch: PaddedBatch, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """MSM, MRM and ITM loss as the released code computes them: fp32, padded, eager attention, logits at every position."""
    drop = config.hidden_dropout_prob if training else 0.0
    regions = _norm(p, "bert.v_embeddings", _linear(p, "bert.v_embeddings.image_embeddings", batch.features)
                    + _linear(p, "bert.v_embeddings.image_location_embeddings", batch.locations))  # fmt: skip
    positions = p["bert.embeddings.position_embeddings.weight"][: batch.input_ids.shape[1]]
    words = F.embedding(batch.input_ids, p["bert.embeddings.word_embeddings.weight"])
    text = _norm(p, "bert.embeddings", words + positions + p["bert.embeddings.token_type_embeddings.weight"][0])
    states = torch.cat([F.dropout(regions, drop), F.dropout(text, drop)], dim=1)
    masks = [(1.0 - mask)[:, None, None, :] * -10000.0 for mask in (batch.region_mask, batch.text_mask)]
    probs_drop = config.attention_probs_dropout_prob if training else 0.0
    for number in range(config.num_interaction_layers):
        states = _layer(p, f"bert.encoder.layer.{number}", states, torch.cat(masks, -1), config.num_attention_heads, drop, probs_drop)
    regions, text = states.split([batch.features.shape[1], batch.input_ids.shape[1]], dim=1)
    for number in range(config.num_text_layers):
        name = f"bert.encoder.layer.{config.num_interaction_layers + number}"
        text = _layer(p, name, text, masks[1], config.num_attention_heads, drop, probs_drop)
    region_drop = config.region_hidden_dropout_prob if training else 0.0
    for number in range(config.num_region_layers):
        regions = _layer(p, f"bert.encoder.v_layer.{number}", regions, masks[0], config.num_region_attention_heads, region_drop, probs_drop)
    return _losses(p, batch, text, regions, 0.1 if training else 0.0)


def _losses(p: Weights, batch: PaddedBatch, text: Tensor, regions: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    word = p["bert.embeddings.word_embeddings.weight"]
    text_logits = F.linear(_transform(p, "cls.predictions", text), word) + p["cls.predictions.bias"]
    region_logits = _linear(p, "cls.imagePredictions.decoder", _transform(p, "cls.imagePredictions", regions))[:, 1:]
    pooled = F.relu(_linear(p, "bert.t_pooler.dense", text[:, 0])) * F.relu(_linear(p, "bert.v_pooler.dense", regions[:, 0]))
    itm_logits = _linear(p, "cls.bi_seq_relationship", F.dropout(pooled, drop))
    msm = F.cross_entropy(text_logits.flatten(0, 1), batch.msm_labels.flatten(), ignore_index=-100)
    asked = batch.mrm_labels * (batch.itm_labels == 0)[:, None]
    divergence = F.kl_div(F.log_softmax(region_logits, -1), batch.mrm_targets, reduction="none").sum(-1)
    mrm = (divergence * asked).sum() / asked.sum().clamp(min=1)
    return msm, mrm, F.cross_entropy(itm_logits, batch.itm_labels)


def _layer(p: Weights, name: str, x: Tensor, mask: Tensor, heads: int, drop: float, probs_drop: float) -> Tensor:
    q, k, v = (
        _linear(p, f"{name}.attention.self.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in ("query", "key", "value")
    )
    probs = (q @ k.mT / math.sqrt(q.shape[-1]) + mask).softmax(-1)
    context = (F.dropout(probs, probs_drop) @ v).transpose(1, 2).flatten(2)
    attended = F.dropout(_linear(p, f"{name}.attention.output.dense", context), drop)
    x = _norm(p, f"{name}.attention.output", attended + x)
    wide = F.gelu(_linear(p, f"{name}.intermediate.dense", x))
    return _norm(p, f"{name}.output", F.dropout(_linear(p, f"{name}.output.dense", wide), drop) + x)


def _linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])


def _norm(p: Weights, name: str, x: Tensor) -> Tensor:
    weight = p[f"{name}.LayerNorm.weight"]
    return F.layer_norm(x, weight.shape, weight, p[f"{name}.LayerNorm.bias"], 1e-12)


def _transform(p: Weights, name: str, x: Tensor) -> Tensor:
    return _norm(p, f"{name}.transform", F.gelu(_linear(p, f"{name}.transform.dense", x)))


def bert_step(learning_rate: float, device: torch.device, compiled: str | None = None, **sizes: int) -> Callable[[PaddedBatch], Tensor]:
    """A training step of `transformers`' BERT-base (12 layers, SDPA) under bf16 autocast with fused AdamW; forward and backward by
    ``torch.compile`` where ``compiled`` names its backend.

    It sees all 73 positions as tokens, and its MLM head reads the 36 of the text: the arithmetic of a padded InterBERT sample.
    """
    config = BertConfig(**({"vocab_size": 30522} | sizes))
    config._attn_implementation = "sdpa"
    body, head = BertModel(config, add_pooling_layer=False).train().to(device), BertOnlyMLMHead(config).train().to(device)  # type: ignore[call-arg]
    head.predictions.decoder.weight = body.embeddings.word_embeddings.weight
    parameters = {id(p): p for module in (body, head) for p in module.parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, fused=True)

    def loss_of(ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        states = body(input_ids=ids, attention_mask=mask).last_hidden_state[:, : labels.shape[1]]
        return F.cross_entropy(head(states).flatten(0, 1).float(), labels.flatten())

    loss_by = loss_of if compiled is None else torch.compile(loss_of, backend=compiled)

    def step(batch: PaddedBatch) -> Tensor:
        ids = F.pad(batch.input_ids, (0, batch.features.shape[1]), value=1000)
        mask = torch.cat([batch.text_mask, batch.region_mask], 1)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_by(ids, mask, batch.msm_labels)
        return _update(loss, optimizer)

    return step


def visual_bert_step(learning_rate: float, device: torch.device, **sizes: int) -> Callable[[PaddedBatch], Tensor]:
    """A training step of `transformers`' VisualBertForPreTraining (eager attention: it offers no other) under bf16 autocast."""
    config = VisualBertConfig(**({"vocab_size": 30522, "visual_embedding_dim": 2048} | sizes))
    model = VisualBertForPreTraining(config).train().to(device)  # type: ignore[call-arg]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def step(batch: PaddedBatch) -> Tensor:
        labels = F.pad(batch.msm_labels, (0, batch.features.shape[1]), value=-100)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(
                input_ids=batch.input_ids, attention_mask=batch.text_mask, visual_embeds=batch.features,
                visual_attention_mask=batch.region_mask, labels=labels, sentence_image_labels=batch.itm_labels,
            ).loss  # fmt: skip
        return _update(loss, optimizer)

    return step


def released_step(
    weights: Weights, config: InterBertConfig, learning_rate: float, training: bool = True
) -> Callable[[PaddedBatch], Tensor]:
    """A training step as in the released code, in fp32 with torch's plain AdamW and the global gradient clipped to norm 1."""
    optimizer = torch.optim.AdamW(weights.values(), lr=learning_rate, eps=1e-6)

    def step(batch: PaddedBatch) -> Tensor:
        loss = torch.stack(released_losses(weights, config, batch, training)).sum()
        return _update(loss, optimizer)

    return step


def _update(loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
