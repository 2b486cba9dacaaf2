"""The second stage of a search: InterBERT's log-odds that a text and an image belong together, for some pairs of a few of each.

Shape letter: S pairs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.packed import region_rows
from megainter.data.text.vocabulary import Vocabulary
from megainter.model.configuration import InterBertConfig
from megainter.model.grid import embed_captions, embed_images, score_pairs
from megainter.model.interbert import InterBertForRetrieval
from megainter.precision import Precision
from megainter.tasks.retrieval.gallery import Tokens, tokenize
from megainter.tasks.scoring.models import DTYPES, USUAL_LENGTH, load_model

PAIRS_AT_ONCE = 256


class CloseLook:
    """The model on a device."""

    def __init__(self, folder: Path, config: InterBertConfig, vocabulary: Vocabulary, device: torch.device, precision: Precision) -> None:
        self.device, self.vocabulary = device, vocabulary
        self.max_tokens = config.max_text_tokens or USUAL_LENGTH
        self.most = config.max_regions or USUAL_LENGTH
        self.model = load_model(folder, InterBertForRetrieval)
        # nn.Module's own method: the wrapper around it in transformers has no usable type
        torch.nn.Module.to(self.model, device=device, dtype=DTYPES[precision])

    def score(
        self, texts: list[str], images: Sequence[RegionRecord | RegionViews], text_S: NDArray[np.int64], image_S: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Log-odds [S] of the pairs that ``text_S`` and ``image_S`` number; long ones meet long ones in a forward."""
        tokens = tokenize(texts, self.vocabulary, self.max_tokens)
        regions = np.array([min(len(image), self.most) for image in images])
        order = np.lexsort((tokens.lengths[text_S], regions[image_S]))
        scores = np.empty(len(order), np.float32)
        for start in range(0, len(order), PAIRS_AT_ONCE):
            some = order[start : start + PAIRS_AT_ONCE]
            scores[some] = self._forward(tokens, images, text_S[some], image_S[some])
        return scores

    @torch.inference_mode()
    def _forward(
        self, tokens: Tokens, images: Sequence[RegionRecord | RegionViews], text_S: NDArray[np.int64], image_S: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        texts, text_place_S = np.unique(text_S, return_inverse=True)
        pictures, image_place_S = np.unique(image_S, return_inverse=True)
        ids, lengths = tokens.take(texts)
        captions = embed_captions(self.model, ids.to(self.device), lengths)
        features, locations, counts = region_rows([images[number] for number in pictures], self.most)
        embedded = embed_images(self.model, features.to(self.device), locations.to(self.device), counts)
        return score_pairs(self.model, captions, embedded, torch.from_numpy(text_place_S), torch.from_numpy(image_place_S)).cpu().numpy()
