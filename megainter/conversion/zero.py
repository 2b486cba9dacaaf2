"""From a training run (any world size, any ZeRO stage) to a Hugging Face folder, bit-equal to the fp32 master weights."""

import os
import shutil
from pathlib import Path

import torch

from megainter.errors import DamagedError, UsageError
from megainter.files import fsync_folder, write_json
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint

PREFIX = "model."  # of the trained module's parameter names


def convert(run: Path, destination: Path) -> InterBertForPreTraining:
    """Write the Hugging Face folder ``destination`` from a run folder's newest whole checkpoint, or from one checkpoint folder.

    The folder holds config.json, model.safetensors (fp32), vocab.txt and tokenizer_config.json; it appears whole or not at all.
    Raises ``UsageError`` where there is no checkpoint or ``destination`` exists, ``DamagedError`` where files or tensors are wrong.
    """
    if destination.exists():
        raise UsageError(f"{destination} exists; give a new folder or remove it")
    saved = find_checkpoint(run)
    model = load_model(saved)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        shutil.copyfile(saved.folder / "vocab.txt", partial / "vocab.txt")
        settings = {
            "do_lower_case": bool(saved.state["lowercase"]),
            "tokenizer_class": "BertTokenizer",
            "model_max_length": model.config.max_position_embeddings,
        }
        write_json(partial / "tokenizer_config.json", settings)
        os.rename(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_folder(destination.absolute().parent)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{saved.folder} -> {destination}: step {saved.step:,}, {parameters:,} parameters, fp32")
    return model


def find_checkpoint(run: Path) -> checkpoint.Checkpoint:
    """The checkpoint in ``run``: itself, or the newest whole one of a run folder."""
    if (run / checkpoint.MANIFEST).is_file():
        return checkpoint.open_checkpoint(run)
    if not run.is_dir():
        raise UsageError(f"{run} does not exist; give a run folder or one of its checkpoints")
    saved = checkpoint.newest(run / "checkpoints", lambda text: print(f"warning: {text}"))
    if saved is None:
        raise UsageError(f"{run} has no checkpoints; give a run folder or one of its checkpoints")
    return saved


def load_model(saved: checkpoint.Checkpoint) -> InterBertForPreTraining:
    """The model of a checkpoint in fp32; ``DamagedError`` where parameters are missing or left over."""
    model = InterBertForPreTraining(InterBertConfig.from_json_file(saved.folder / "config.json"))
    expected = {PREFIX + name: parameter for name, parameter in model.named_parameters()}
    names = set(checkpoint.weight_names(saved))
    if names != set(expected):
        missing, left_over = sorted(set(expected) - names), sorted(names - set(expected))
        raise DamagedError(
            f"checkpoint {saved.folder}: {len(missing)} parameters missing {missing[:3]}, {len(left_over)} left over {left_over[:3]}"
        )
    with checkpoint.reader(saved) as read, torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(read("weights", name))
    return model.eval()
