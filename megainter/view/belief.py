"""What a model believes of one photo and one caption: whether they match, what it guesses where something is hidden, where it looks.

Everything comes from the padded door, `InterBertForPreTraining.forward`. Letters: T tokens with [CLS] and [SEP], R regions with the global
one in row 0, V vocabulary, C classes, N = R + T.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import logging as transformers_logging

from megainter.data.feature_store.record import RegionRecord
from megainter.data.integers import Int64s
from megainter.data.stream.masking import PAPER, overlaps
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.model.interbert import MATCHED, InterBertForPreTraining
from megainter.model.outputs import InterBertForPreTrainingOutput
from megainter.model.processor import InterBertProcessor

HEADS = {"words": "msm_head", "regions": "mrm_head", "matching": "itm_head"}  # by what they are asked
GUESSES = 5
AT_ONCE = 8  # samples of a forward: the vocabulary's logits of all their tokens are in memory


@dataclass(frozen=True)
class Guess:
    """One entry of the vocabulary or one class, and the probability that the model gives it."""

    name: str
    probability: float


@dataclass(frozen=True)
class HiddenToken:
    """A token that was hidden: its place in the caption's tokens, the number of the word that was hidden as a whole, what stood there
    (None where the caption itself had [MASK]) with its probability and its rank from 1, and the likeliest entries."""

    position: int
    word: int
    truth: Guess | None
    rank: int | None
    guesses: list[Guess]


@dataclass(frozen=True)
class HiddenRegion:
    """A region that was hidden with those that overlap it: its row of the record, the rows of the others, the detector's likeliest classes
    and the model's; of a model that predicts features, no classes and the cosine between the feature and what was predicted."""

    row: int
    with_it: list[int]
    detected: list[Guess]
    guesses: list[Guess]
    cosine: float | None


@dataclass(frozen=True)
class Belief:
    """``tokens`` T pieces, as of ``tokens_of``; ``regions`` R; ``matching``: the probability that both belong together, None where the
    model has no head for it.

    ``interaction`` float32 [h, N, N] of each layer, R regions before the T tokens, ``text`` [h, T, T], ``region`` [h', R, R]: what is asked
    looks along the last axis, whose shares sum to 1.
    """

    tokens: list[str]
    regions: int
    matching: float | None
    hidden_tokens: list[HiddenToken]
    hidden_regions: list[HiddenRegion]
    interaction: list[NDArray[np.float32]]
    text: list[NDArray[np.float32]]
    region: list[NDArray[np.float32]]


def open_model(folder: Path, device: torch.device) -> tuple[InterBertForPreTraining, set[str]]:
    """The model of a folder in float32 for looking at, and which of ``HEADS`` it has: a fine-tuned one lacks some."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns of heads that the folder has not
    transformers_logging.disable_progress_bar()
    try:
        model, told = InterBertForPreTraining.from_pretrained(folder, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(before)
    lacking = {str(name).partition(".")[0] for name in told["missing_keys"]}
    if "interbert" in lacking:
        raise UsageError(f"{folder} lacks weights of its encoder; convert it again")
    return model.float().eval().to(device), {name for name, head in HEADS.items() if head not in lacking}


@torch.inference_mode()
def believe(
    model: InterBertForPreTraining,
    processor: InterBertProcessor,
    record: RegionRecord,
    caption: str,
    names: tuple[str, ...],
    heads: set[str] | None = None,
) -> Belief:
    """Ask ``model`` about the regions of ``record``, of classes ``names`` (background first), and ``caption``.

    Words are hidden one at a time, all pieces of one together; where the caption has "[MASK]", those alone. Regions are hidden one at a
    time with all that overlap it by more than the paper's threshold, as in training. ``heads``: those of ``HEADS`` that the model has.
    """
    heads = set(HEADS) if heads is None else heads
    batch = {name: tensor.to(model.device) for name, tensor in processor([caption], [record]).items()}
    whole: InterBertForPreTrainingOutput = model(**batch, output_attentions=True)
    ids = batch["input_ids"][0].cpu().numpy()
    assert whole.itm_logits is not None
    return Belief(
        tokens=tokens_of(caption, ids, processor.vocabulary),
        regions=batch["region_features"].shape[1],
        matching=float(whole.itm_logits[0].float().softmax(-1)[MATCHED]) if "matching" in heads else None,
        hidden_tokens=list(_hidden_tokens(model, batch, ids, processor.vocabulary)) if "words" in heads else [],
        hidden_regions=list(_hidden_regions(model, batch, record, names)) if "regions" in heads else [],
        interaction=_first_of_each(whole.interaction_attentions),
        text=_first_of_each(whole.text_attentions),
        region=_first_of_each(whole.region_attentions),
    )


def _entries(vocabulary: Vocabulary) -> dict[int, str]:
    return {number: entry for entry, number in vocabulary.ids.items()}


def _first_of_each(layers: tuple[Tensor, ...] | None) -> list[NDArray[np.float32]]:
    return [layer[0].cpu().numpy() for layer in layers or ()]


def tokens_of(caption: str, ids: Int64s, vocabulary: Vocabulary) -> list[str]:
    """The entry of each of ``ids`` [T], which ``caption`` became between [CLS] and [SEP]; an unknown one as "[UNK] for" its letters.

    Where the caption spells a special token its letters are not to be had, and "[UNK]" stands alone.
    """
    entries, unknown = _entries(vocabulary), vocabulary.facts.unk_id
    found = vocabulary.tokenizer.encode(caption, add_special_tokens=False)
    inside = ids[1:-1].tolist()
    tokens = [entries[token] for token in ids.tolist()]
    if found.ids[: len(inside)] != inside:
        return tokens
    for place in np.flatnonzero(ids == unknown).tolist():
        first, end = found.offsets[place - 1]
        tokens[place] += f" for {caption[first:end]}"
    return tokens


def words_of(ids: Int64s, vocabulary: Vocabulary) -> list[list[int]]:
    """Positions of each word of a text's tokens, special tokens left out; or where it has [MASK], all of these as one."""
    facts = vocabulary.facts
    masks = np.flatnonzero(ids == facts.mask_id).tolist()
    if masks:
        return [masks]
    words: list[list[int]] = []
    for position, token in enumerate(ids.tolist()):
        if token in (facts.cls_id, facts.sep_id, facts.pad_id):
            continue
        if facts.is_continuation[token] and words and words[-1][-1] == position - 1:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def hidden_with(record: RegionRecord, most: int) -> NDArray[np.bool_]:
    """bool [n, n] of the first ``most`` regions: which others (and itself) are hidden with each, those that overlap it by more than 0.4."""
    boxes = record.boxes[:most]
    assert PAPER.iou_threshold is not None
    return (overlaps(boxes, boxes, 0.0) > PAPER.iou_threshold) | np.eye(len(boxes), dtype=bool)


def _hidden_tokens(model: InterBertForPreTraining, batch: dict[str, Tensor], ids: Int64s, vocabulary: Vocabulary) -> Iterator[HiddenToken]:
    words, names, mask = words_of(ids, vocabulary), _entries(vocabulary), vocabulary.facts.mask_id
    for start in range(0, len(words), AT_ONCE):
        part = words[start : start + AT_ONCE]
        masked = _repeated(batch, len(part))
        for row, positions in enumerate(part):
            masked["input_ids"][row, positions] = mask
        logits = model(**masked).text_logits
        for row, positions in enumerate(part):
            for position in positions:
                yield _guessed(position, start + row, int(ids[position]), logits[row, position], names, mask)


def _guessed(position: int, word: int, token: int, logits_V: Tensor, names: dict[int, str], mask: int) -> HiddenToken:
    shares = logits_V.float().softmax(-1)
    best = shares.topk(min(GUESSES, len(shares)))
    guesses = [Guess(names.get(i, f"#{i}"), share) for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    if token == mask:
        return HiddenToken(position, word, None, None, guesses)
    rank = 1 + int((shares > shares[token]).sum())
    return HiddenToken(position, word, Guess(names[token], float(shares[token])), rank, guesses)


def _hidden_regions(
    model: InterBertForPreTraining, batch: dict[str, Tensor], record: RegionRecord, names: tuple[str, ...]
) -> Iterator[HiddenRegion]:
    count = batch["region_features"].shape[1] - 1
    together = hidden_with(record, count)
    for start in range(0, count, AT_ONCE):
        rows = range(start, min(start + AT_ONCE, count))
        masked = _repeated(batch, len(rows))
        for i, row in enumerate(rows):
            hide_regions(masked["region_features"][i], together[row])
        logits = model(**masked).region_logits
        for i, row in enumerate(rows):
            others = [other for other in np.flatnonzero(together[row]).tolist() if other != row]
            detected = _likeliest(torch.from_numpy(np.array(record.class_probs[row])), names)
            predicted = logits[i, row + 1].float()
            if model.config.region_objective == "class":
                yield HiddenRegion(row, others, detected, _likeliest(predicted.softmax(-1), names), None)
            else:
                real = batch["region_features"][0, row + 1].float()
                yield HiddenRegion(row, others, detected, [], float(torch.cosine_similarity(predicted, real, dim=0)))


def hide_regions(features_RF: Tensor, hidden: NDArray[np.bool_]) -> None:
    """Zero the features of regions ``hidden`` [R - 1] in place; the global region's is the mean over all of them then, as in training."""
    features_RF[1:][torch.from_numpy(hidden).to(features_RF.device)] = 0
    features_RF[0] = features_RF[1:].float().mean(0).to(features_RF.dtype)


def _likeliest(shares_C: Tensor, names: tuple[str, ...]) -> list[Guess]:
    best = shares_C.topk(min(GUESSES, len(shares_C)))
    return [Guess(names[i], share) for share, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _repeated(batch: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    return {name: tensor.repeat(times, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
