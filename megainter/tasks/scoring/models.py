"""The model that scores, its devices and its precision."""

import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from megainter.data.feature_store.reader import FeatureStore
from megainter.data.text.vocabulary import Vocabulary
from megainter.devices import devices_named, torch_device, units_of
from megainter.errors import DamagedError, UsageError
from megainter.files import read_json, require_own_files
from megainter.model.configuration import InterBertConfig
from megainter.model.detector import require_detector, require_width
from megainter.model.folder import model_digest, read_vocabulary
from megainter.precision import AskedPrecision, Precision, automatic
from megainter.weights import Located, locate

Model = TypeVar("Model", bound=PreTrainedModel)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
USUAL_LENGTH = 36  # regions and tokens where the model's folder does not say what it was trained with
PAIRS_WORTH_A_PROCESS = 10_000  # on CPU: starting one costs about as much as scoring these


def scored_model(model: Path) -> Located:
    """The model that is measured, a folder or one by name, said where it came by one; raises as ``weights.locate``."""
    found = locate(model, option="MODEL")
    if found.told:
        print(found.told, flush=True)
    return found


def keep_reports(output: Path, model: Path, replace: bool, beside: Path | None = None) -> None:
    """``UsageError`` where ``output`` has the report of another model than the one in the folder ``model``, or is something else, unless
    it is to be replaced: a report of the same weights is written anew, and with it the file ``beside`` it. Without one that file stays."""
    if replace:
        return
    if not output.exists():
        if beside is not None and beside.exists():
            raise UsageError(f"{beside} is there, and no report of it at --output {output}; give another name, or --replace")
        return
    try:
        report = read_json(output)
    except (UsageError, DamagedError):
        report = None
    if not isinstance(report, dict) or not isinstance(report.get("model_digest"), str):  # one of unlabelled examples has no figures
        raise UsageError(f"--output {output} is there and is no report of `megainter evaluate`; give another name, or --replace")
    if report["model_digest"] != model_digest(model):
        raise UsageError(
            f"--output {output} has the report of another model, {report.get('model')!s:.120}; give another name, or --replace"
        )


def check_store(folder: Path, config: InterBertConfig, store: FeatureStore, other_detector: bool) -> None:
    """``UsageError`` where the store's regions are not what the model in ``folder`` was trained on: their width, or unless
    ``other_detector`` whose they are."""
    require_width(config.region_feature_size, folder, store)
    if unknown := require_detector(config, folder, store, "--other-detector", other_detector):
        print(unknown, flush=True)


def check_model(
    folder: Path, config: InterBertConfig, store: FeatureStore, max_text_tokens: int, other_detector: bool = False
) -> Vocabulary:
    """The model's vocabulary, once model, vocabulary, store and text length are known to fit each other; ``UsageError`` if not."""
    check_store(folder, config, store, other_detector)
    if not 3 <= max_text_tokens <= config.max_position_embeddings:
        raise UsageError(
            f"--max-text-tokens is {max_text_tokens}; give 3 to {config.max_position_embeddings}, what {folder} has positions for"
        )
    return read_vocabulary(folder, config)


def choose_precision(asked: AskedPrecision, device: str) -> Precision:
    """What ``asked`` stands for on ``device``: of "auto" a line says which and why. ``UsageError`` for a device that is not here."""
    if asked != "auto":
        return asked
    if device != "auto":
        torch_device(device)
    precision, why = automatic([units_of(each) for each in devices_named(device)])
    print(why, flush=True)
    return precision


def choose_devices(device: str, precision: str, processes: int | None, pairs: int, chunks: int) -> list[torch.device]:
    """One device for each process: GPUs in turn, or the CPU as often as there are cores and work for them."""
    device = str(torch_device(device))
    if precision not in DTYPES or (precision == "fp16" and device == "cpu"):
        raise UsageError(f"--precision {precision} is not possible on {device}; give fp32 or bf16")
    if device == "cuda":
        gpus = torch.cuda.device_count()
        return [torch.device("cuda", number % gpus) for number in range(min(processes or gpus, chunks))]
    worth = 1 if device != "cpu" else max(1, min(len(os.sched_getaffinity(0)), pairs // PAIRS_WORTH_A_PROCESS))
    return [torch.device(device)] * min(processes or worth, chunks)


def load_model(folder: Path, kind: type[Model]) -> Model:
    """The model of this ``kind`` in a Hugging Face folder, in evaluation mode, from safetensors alone.

    ``UsageError`` where the folder is none, or its weights lack a part of the model (a bare encoder has no head).
    """
    require_own_files(folder)
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = kind.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{folder} cannot be loaded as {kind.__name__}: {str(error).splitlines()[0]}") from None
    model, info = loaded
    missing: list[str] = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            f"{folder} has no weights for {len(missing)} parameters, first {missing[0]}; give a pretrained or fine-tuned model"
        )
    whole: Model = model.eval()
    return whole
