"""The first stage of retrieval in a large gallery: a light dual encoder, one vector for a caption and one for an image.

Each tower sees its own side alone, so that a vector is computed once and a pair costs one dot product: what CLIP (arXiv 2103.00020) does
with large towers is done here with a bag of words and a bag of regions. InterBERT then looks at the nearest candidates only.

Shape letters: B captions or images of a batch, L longest of them in rows, E width of a word or a region, H hidden, D width of a vector.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from megainter.config.settings import STRICT, Positive
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import region_rows
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import NumericsError, UsageError
from megainter.files import apply_umask, aside, read_json, sha256_of, write_json
from megainter.kinds import instead
from megainter.model.detector import detector_in_words, require_width
from megainter.progress import Progress
from megainter.tasks.retrieval.gallery import Tokens
from megainter.weights import origin_name

SETTINGS, WEIGHTS = "prefilter.json", "prefilter.safetensors"
AT_ONCE = 1024  # captions or images per forward


@dataclass(frozen=True, config=STRICT)
class PrefilterSettings:
    """What a prefilter's folder states (prefilter.json): sizes, and the vocabulary that its words are numbered by."""

    vocabulary_digest: str
    vocabulary_size: Positive
    word_size: Positive
    feature_size: Positive
    max_text_tokens: Annotated[int, Field(ge=3)]
    max_regions: Positive
    hidden_size: Positive = 512
    vector_size: Positive = 256
    detector: str | None = None
    format: Literal[1] = 1


class Pooling(nn.Module):
    """How much each row of a caption or an image counts, and what becomes of their weighted sum: two layers, a vector of length 1.

    In training whole rows are dropped, and parts of the hidden layer: dropping parts of every row took more time than all else.
    """

    def __init__(self, width: int, hidden: int, vector: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, vector)
        self.dropout = nn.Dropout(dropout)

    def shares(self, weights_N: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shares [B, L] of the rows, from their logits [N], end to end; and bool [B, L] where there are rows."""
        weights_BL, present_BL = padded(weights_N, lengths)
        return self.dropout(weights_BL.masked_fill(~present_BL, -math.inf).softmax(-1)), present_BL

    def forward(self, sum_BE: torch.Tensor) -> torch.Tensor:
        """[B, E] -> [B, D]."""
        return F.normalize(self.outer(self.dropout(F.gelu(self.inner(self.norm(sum_BE))))), dim=-1)


class TextTower(nn.Module):
    """A bag of words: each has an embedding and a weight of its own."""

    def __init__(self, settings: PrefilterSettings, dropout: float) -> None:
        super().__init__()
        self.word = nn.Embedding(settings.vocabulary_size, settings.word_size)
        self.weight = nn.Embedding(settings.vocabulary_size, 1)
        nn.init.zeros_(self.weight.weight)
        self.pooling = Pooling(settings.word_size, settings.hidden_size, settings.vector_size, dropout)

    def forward(self, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``ids`` int64 [N], captions end to end; ``lengths`` int64 [B] (CPU); [B, D]."""
        shares_BL, present_BL = self.pooling.shares(self.weight(ids)[:, 0], lengths)
        starts = (lengths.cumsum(0) - lengths).to(ids.device)
        sum_BE = F.embedding_bag(ids, self.word.weight, starts, mode="sum", per_sample_weights=shares_BL[present_BL])
        return self.pooling(sum_BE)  # type: ignore[no-any-return]


class RegionTower(nn.Module):
    """A bag of regions: each is seen through one layer, which also says how much it weighs."""

    def __init__(self, settings: PrefilterSettings, dropout: float) -> None:
        super().__init__()
        hidden = settings.hidden_size
        self.norm = nn.LayerNorm(settings.feature_size)
        self.feature, self.location = nn.Linear(settings.feature_size, hidden), nn.Linear(5, hidden)
        self.weight = nn.Linear(hidden, 1)
        self.pooling = Pooling(hidden, hidden, settings.vector_size, dropout)

    def forward(self, features: torch.Tensor, locations: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """``features`` [N, F] and ``locations`` [N, 5], images end to end; ``lengths`` int64 [B] (CPU); [B, D]."""
        rows_NH = F.gelu(self.feature(self.norm(features.float())) + self.location(locations))
        shares_BL, _ = self.pooling.shares(self.weight(rows_NH)[:, 0], lengths)
        return self.pooling((shares_BL[:, None, :] @ padded(rows_NH, lengths)[0])[:, 0])  # type: ignore[no-any-return]


class DualEncoder(nn.Module):
    """Both towers, and the logarithm of what dot products are multiplied by in training."""

    def __init__(self, settings: PrefilterSettings, dropout: float = 0.0) -> None:
        super().__init__()
        self.settings = settings
        self.text, self.region = TextTower(settings, dropout), RegionTower(settings, dropout)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def padded(rows: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [N, ...] end to end as [B, L, ...] with zeros, and bool [B, L] where they are; ``lengths`` int64 [B] on the CPU."""
    longest = int(lengths.max())
    present_BL = torch.arange(longest) < lengths[:, None]
    places = present_BL.flatten().nonzero()[:, 0].to(rows.device)
    flat = rows.new_zeros(len(lengths) * longest, *rows.shape[1:]).index_copy(0, places, rows)
    return flat.unflatten(0, (len(lengths), longest)), present_BL.to(rows.device)


def save_prefilter(folder: Path, encoder: DualEncoder) -> None:
    """Write the weights, then the settings, without which the folder is none."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).unlink(missing_ok=True)
    with aside(folder / WEIGHTS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}, partial)
        apply_umask(partial)
    write_json(folder / SETTINGS, asdict(encoder.settings))


def load_prefilter(folder: Path, vocabulary: Vocabulary, store: FeatureStore, other_detector: bool = False) -> DualEncoder:
    """The encoder of a folder, for evaluation.

    ``UsageError`` where there is none, or it is not of this vocabulary and feature size, or unless ``other_detector`` not of this detector.
    """
    if not (folder / SETTINGS).is_file():
        raise UsageError(f"{folder} is no prefilter (it has no {SETTINGS}); `megainter finetune prefilter` makes one{instead(folder)}")
    try:
        settings = TypeAdapter(PrefilterSettings).validate_python(read_json(folder / SETTINGS))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{folder / SETTINGS}: {'.'.join(map(str, first['loc']))}: {first['msg']}; train the prefilter again") from None
    if settings.vocabulary_digest != vocabulary.digest:
        raise UsageError(f"{folder} was trained with another vocabulary than the model's; train it with --model of the same vocabulary")
    require_width(settings.feature_size, folder, store)
    if settings.detector not in (None, store.schema.described_by) and not other_detector:
        own = detector_in_words(store.schema.described_by, origin_name(store.path))
        theirs = f"{detector_in_words(settings.detector, None)}, and {store.path} has those of {own}"
        raise UsageError(f"{folder} was trained on regions of {theirs}: train it on this store, or give --other-detector")
    encoder = DualEncoder(settings)
    try:
        encoder.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        what = " ".join(str(error).split())
        raise UsageError(f"{folder / WEIGHTS} does not fit {SETTINGS} ({what}); train the prefilter again") from None
    return encoder.eval()


def prefilter_digest(folder: Path) -> str:
    """SHA-256 over settings and weights."""
    return hashlib.sha256("".join(sha256_of(folder / name) for name in (SETTINGS, WEIGHTS)).encode()).hexdigest()


@torch.inference_mode()
def caption_vectors(encoder: DualEncoder, tokens: Tokens, device: torch.device) -> torch.Tensor:
    """float32 [C, D] on ``device``, of length 1."""
    parts = []
    for start in range(0, len(tokens.lengths), AT_ONCE):
        ids, lengths = tokens.take(np.arange(start, min(start + AT_ONCE, len(tokens.lengths))))
        parts.append(encoder.text(ids.to(device), lengths))
    return _finite(torch.cat(parts), "captions")


@torch.inference_mode()
def image_vectors(encoder: DualEncoder, store: FeatureStore, image_ids: Sequence[str], device: torch.device) -> torch.Tensor:
    """float32 [I, D] on ``device``, of length 1; every record is read once."""
    parts = []
    with Progress("reading images", len(image_ids), "images") as progress:
        for start in range(0, len(image_ids), AT_ONCE):
            some = image_ids[start : start + AT_ONCE]
            parts.append(vectors_of_images(encoder, store.views(some, encoder.settings.max_regions), device))
            progress.update(len(some))
    return torch.cat(parts)


@torch.inference_mode()
def vectors_of_images(encoder: DualEncoder, images: Sequence[RegionRecord | RegionViews], device: torch.device) -> torch.Tensor:
    """float32 [I, D] on ``device``, of length 1, of the regions of some images in one forward."""
    features, locations, lengths = region_rows(images, encoder.settings.max_regions)
    return _finite(encoder.region(features.to(device), locations.to(device), lengths), "images")


def _finite(vectors: torch.Tensor, of: str) -> torch.Tensor:
    if not bool(vectors.isfinite().all()):
        raise NumericsError(f"the prefilter's vectors of {of} are not finite: its weights are not; train it again with a lower rate")
    return vectors
