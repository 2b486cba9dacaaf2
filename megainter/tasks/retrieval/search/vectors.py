"""The first stage as searching sees it: a vector for a text, a vector for an image, and what their dot product is multiplied by.

Whatever computes such vectors can stand here: the dual encoder that `megainter finetune prefilter` trains, or the model itself, where it
was pretrained with image-text contrast (``prefilter/own.py``).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.feature_store.record import RegionRecord
from megainter.data.feature_store.views import RegionViews
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import require_detector
from megainter.model.folder import read_config, read_vocabulary
from megainter.tasks.retrieval.gallery import tokenize
from megainter.tasks.retrieval.prefilter.own import OwnVectors
from megainter.tasks.retrieval.prefilter.towers import (
    AT_ONCE,
    SETTINGS,
    DualEncoder,
    caption_vectors,
    load_prefilter,
    prefilter_digest,
    vectors_of_images,
)
from megainter.tasks.scoring.models import USUAL_LENGTH

INSIDE = "prefilter"  # where a first stage lies in the folder of its model, if the user does not say otherwise


class Towers:
    """The dual encoder's vectors, float32 of length 1 on the CPU.

    ``size`` D of them, ``scale`` from a dot product to a logit, ``most`` regions of an image that are looked at, ``digest`` of what
    computes them.
    """

    def __init__(self, encoder: DualEncoder, vocabulary: Vocabulary, device: torch.device, digest: str) -> None:
        self.encoder, self.vocabulary, self.device, self.digest = encoder.to(device), vocabulary, device, digest
        self.size, self.most = encoder.settings.vector_size, encoder.settings.max_regions
        self.scale = float(encoder.log_scale.detach().exp())

    def encode_texts(self, texts: list[str]) -> NDArray[np.float32]:
        """[n, D]."""
        tokens = tokenize(texts, self.vocabulary, self.encoder.settings.max_text_tokens)
        return caption_vectors(self.encoder, tokens, self.device).cpu().numpy()

    def encode_images(self, images: Sequence[RegionRecord | RegionViews]) -> NDArray[np.float32]:
        """[n, D], in forwards of ``AT_ONCE``."""
        parts = (images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE))
        return np.concatenate([vectors_of_images(self.encoder, part, self.device).cpu().numpy() for part in parts])


FirstStage = Towers | OwnVectors


def first_stage_folder(model: Path, given: Path | None) -> Path:
    """Where the first stage of a model is: as ``given``, else inside the model's folder, else the model itself where it has vectors.

    ``UsageError`` where there is none.
    """
    folder = given or model / INSIDE
    if given is None and not (folder / SETTINGS).is_file():
        if read_config(model).itc_size:
            return model
        advice = f"`megainter finetune prefilter {model} --pairs PAIRS --store STORE --output {folder}` makes one in minutes"
        raise UsageError(f"{model} has no first stage ({folder} is not there), and no --prefilter-model is given; {advice}")
    return folder


def open_first_stage(folder: Path, vocabulary: Vocabulary, store: FeatureStore, device: torch.device, other_detector: bool) -> FirstStage:
    """The first stage of a folder.

    ``UsageError`` where it is none, or fits neither vocabulary nor store, or unless ``other_detector`` is of another one's regions.
    """
    if not (folder / SETTINGS).is_file() and (folder / "config.json").is_file():
        config = read_config(folder)
        require_detector(config, folder, store, "--other-detector", other_detector)  # of one that does not say, the model has said it
        return _own_vectors(folder, config, vocabulary, device)
    return Towers(load_prefilter(folder, vocabulary, store, other_detector), vocabulary, device, prefilter_digest(folder))


def _own_vectors(folder: Path, config: InterBertConfig, vocabulary: Vocabulary, device: torch.device) -> OwnVectors:
    """The vectors of the model in ``folder``; ``UsageError`` where it has none, or is one of another vocabulary."""
    if not config.itc_size:
        raise UsageError(f"{folder} has no vectors of its own; `megainter finetune prefilter` makes a first stage")
    if read_vocabulary(folder, config).digest != vocabulary.digest:
        raise UsageError(f"{folder} has another vocabulary than the model: its vectors are not of the same words")
    return OwnVectors(folder, vocabulary, config.max_text_tokens or USUAL_LENGTH, config.max_regions or USUAL_LENGTH, device)
