"""What every fine-tuning task does before and after the training loop: open the starting model, and leave a Hugging Face folder."""

import os
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from megainter.config.settings import FinetuneConfig, StartConfig
from megainter.conversion.zero import convert
from megainter.data.feature_store.reader import FeatureStore
from megainter.data.packed import PackedInputs
from megainter.data.text.vocabulary import Vocabulary
from megainter.errors import UsageError
from megainter.files import aside
from megainter.model.configuration import DROPOUTS, InterBertConfig
from megainter.model.detector import keep_detector, require_detector
from megainter.model.flops import BatchCounts, forward_flops
from megainter.model.folder import locate_model, read_config, read_vocabulary
from megainter.tasks.moved import moved, told
from megainter.training import checkpoint
from megainter.training.job import Job
from megainter.training.loop import BEST, log, train
from megainter.training.world import World
from megainter.weights import Located, locate, origin_name

MODEL = "model"  # the Hugging Face folder in the run folder
Model = TypeVar("Model", bound=PreTrainedModel)


def finetune_job(config: FinetuneConfig, open_job: Callable[[World], Job], complete: Callable[[Path], None] | None = None) -> Path:
    """Train, and write the Hugging Face folder ``<output>/model``: the best checkpoint (else the last), averaged where it was averaged.

    ``complete(folder)`` adds to it what the task learns at the end, before the folder is in its place. A result that hardly moved from its
    start is warned about. Raises as ``training.loop.train``. Returns the folder, on every rank; rank 0 writes it.
    """
    last = train(config, open_job)
    folder = config.output / MODEL
    if os.environ.get("RANK", "0") == "0":
        best = config.output / BEST
        source = next((path for path in sorted(best.glob("step_*"), reverse=True)), last)
        with aside(folder) as partial, open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            convert(source, partial, ema=config.training.ema_decay > 0)
            if complete is not None:
                complete(partial)
        log.info("the model of %s: %s", source, folder)
        _warn_if_unmoved(config, source)
    return folder


def _warn_if_unmoved(config: FinetuneConfig, source: Path) -> None:
    start, saved = locate(config.model.start_from).path, checkpoint.open_checkpoint(source)
    found = moved(start, saved, averaged=config.training.ema_decay > 0)
    if found.hardly:
        log.warning("%s", told(found, start, saved.step))


@dataclass(frozen=True)
class Start:
    """The model that fine-tuning starts from: its folder, configuration (with the changes that the settings ask for) and vocabulary."""

    folder: Path
    config: InterBertConfig
    vocabulary: Vocabulary
    vocabulary_file: bytes

    def build(self, kind: type[Model], saved: InterBertConfig | None, fresh: str = r"(?!)") -> Model:
        """A model of this ``kind``: with the folder's weights, or bare in the configuration of a checkpoint.

        ``UsageError`` where the folder lacks parameters whose names do not begin with ``fresh`` (a new head begins anew).
        """
        if saved is not None:
            return kind(saved)
        transformers_logging.disable_progress_bar()
        try:
            loaded: Any = kind.from_pretrained(
                self.folder, config=self.config, output_loading_info=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError(f"model.start_from {self.folder} cannot be loaded: {str(error).splitlines()[0]}") from None
        model, info = loaded
        missing = sorted(name for name in info["missing_keys"] if not name.startswith(fresh))
        if missing:
            raise UsageError(f"model.start_from {self.folder} lacks {len(missing)} parameters, first {missing[0]}; give a pretrained model")
        started: Model = model
        return started


def open_start(
    settings: StartConfig,
    output: Path,
    max_text_tokens: int | None,
    max_regions: int | None,
    store: FeatureStore | None,
    other_detector: bool = False,
    vectors: bool = False,
) -> Start:
    """Open ``model.start_from``, a path or weights by name. Lengths that are None stay as the model was trained with them;
    The result is of the ``store``'s detector, where there is one. What came by name stands in ``output``/origin.json. The head of
    image-text contrast is left behind where the task does not train ``vectors``, since its changes would spoil them.

    ``UsageError`` for a folder that is no model of ours, or does not fit the lengths or the store: its width, or its detector unless
    ``other_detector``.
    """
    found = locate_model(settings.start_from, "model.start_from")
    folder, config = found.path, read_config(found.path)
    if store is not None:
        _take_regions_of(store, config, folder, other_detector)
    for name in DROPOUTS:
        if getattr(settings, name) is not None:
            setattr(config, name, getattr(settings, name))
    if not vectors:
        config.itc_size, config.itm_similarity, config.itm_vectors = 0, False, False
    config.max_text_tokens = max_text_tokens or config.max_text_tokens
    config.max_regions = max_regions or config.max_regions
    if config.max_text_tokens is not None and config.max_text_tokens > config.max_position_embeddings:
        raise UsageError(f"data.max_text_tokens {config.max_text_tokens} exceeds {folder}'s {config.max_position_embeddings} positions")
    vocabulary = read_vocabulary(folder, config)
    record_start(found, output)
    return Start(folder, config, vocabulary, (folder / "vocab.txt").read_bytes())


def _take_regions_of(store: FeatureStore, config: InterBertConfig, folder: Path, other_detector: bool) -> None:
    size = store.schema.feature_size
    if config.region_feature_size != size:
        raise UsageError(f"model.start_from {folder} takes {config.region_feature_size}-d region features, the store has {size}-d ones")
    if unknown := require_detector(config, f"model.start_from {folder}", store, "--data.other_detector true", other_detector):
        log.info("%s", unknown)
    keep_detector(config, store.schema, origin_name(store.path))


def record_start(found: Located, output: Path) -> None:
    """Write into the run folder, on rank 0, which weights by name the run starts from."""
    if found.digests and os.environ.get("RANK", "0") == "0":
        output.mkdir(parents=True, exist_ok=True)
        found.record(output)


def inputs_flops(config: InterBertConfig, inputs: PackedInputs) -> int:
    """Floating-point operations of one forward without the heads of masking."""
    return forward_flops(config, BatchCounts.of(inputs.text_lengths, inputs.region_lengths, 0, 0))
