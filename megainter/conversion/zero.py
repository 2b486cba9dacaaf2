"""From a training run (any world size, any ZeRO stage) to a Hugging Face folder, bit-equal to the fp32 master weights.

Ours or DeepSpeed's own files; tensor by tensor, so that memory holds little more than the largest one.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from megainter.conversion.card import NO_CARD, Card, TrainedBy
from megainter.conversion.deepspeed_files import find_deepspeed_folder, open_deepspeed
from megainter.conversion.folder import Output, finish, refuse_existing
from megainter.conversion.foreign_files import MERGED, WEIGHT_FILES, LazyTensor, open_tensors, without_prefix
from megainter.conversion.mapping import Plan
from megainter.conversion.official import bert_names, plan_weights
from megainter.conversion.ours import has_our_names, plan_ours
from megainter.conversion.vocabulary import NO_VOCABULARY, find_vocabulary, require_room
from megainter.errors import DamagedError, UsageError
from megainter.files import require_own_files
from megainter.kinds import instead
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint

PREFIX = "model."  # of the trained module's parameter names


def convert(
    run: Path,
    destination: Path,
    *,
    ema: bool = False,
    config_file: Path | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: bool = False,
    verify: bool = False,
    card: Card = NO_CARD,
) -> Plan:
    """Write the Hugging Face folder ``destination`` from a run folder's newest whole checkpoint, or from one checkpoint folder.

    ``ema`` takes the averaged weights instead. A folder of DeepSpeed's own files (any stage, or universal) does as well, and so does what
    its zero_to_fp32.py writes: the model may bear our names or the official ones, and its sizes come from the tensors and ``config_file``.
    Raises ``UsageError`` where there is no checkpoint or ``destination`` exists, ``DamagedError`` where files or tensors are wrong.
    """
    refuse_existing(destination)
    folder = find_deepspeed_folder(run)
    merged = folder is None and _is_merged(run)
    if folder is None and not merged:
        saved = find_checkpoint(run)
        files, _ = find_vocabulary(vocabulary or saved.folder / "vocab.txt", not saved.state["lowercase"] if cased is None else cased)
        card = replace(card, trained=_trained_by(saved))
        return _convert_ours(saved, "ema" if ema else "weights", Output(destination, files, allow_partial, verify=verify, card=card))
    if ema:
        raise UsageError(f"{run} holds DeepSpeed's own files, in which there are no averaged weights; leave --ema out")
    if folder is None:
        plan = plan_merged(without_prefix(open_tensors(run)), run, config_file or _config_beside(run), allow_partial)
    else:
        plan = plan_deepspeed(folder, config_file, allow_partial)
    files, notes = find_vocabulary(vocabulary, cased) if vocabulary is not None else (None, [NO_VOCABULARY])
    require_room(files, plan.config.vocab_size)
    plan = replace(plan, notes=(*plan.notes, *notes))
    finish(plan, folder or run, Output(destination, files, allow_partial, verify=verify, card=card))
    return plan


def _trained_by(saved: checkpoint.Checkpoint) -> TrainedBy | None:
    """The run that a checkpoint lies in; None where it lies alone."""
    run = next((folder for folder in saved.folder.resolve().parents[:2] if (folder / "metrics.jsonl").is_file()), None)
    return TrainedBy(run, saved.step) if run is not None else None


def _is_merged(run: Path) -> bool:
    """Whether ``run`` is what zero_to_fp32.py writes: one file, or a folder with one file or shards of weights."""
    names = (*WEIGHT_FILES, MERGED)
    return run.is_file() or (not (run / checkpoint.MANIFEST).is_file() and any((run / name).exists() for name in names))


def _config_beside(run: Path) -> Path | None:
    path = (run if run.is_dir() else run.parent) / "config.json"
    return path if path.is_file() else None


def _convert_ours(saved: checkpoint.Checkpoint, kind: str, output: Output) -> Plan:
    with ExitStack() as stack:
        tensors = _tensors(saved, kind, stack)
        config = InterBertConfig.from_json_file(saved.folder / "config.json")
        architecture = (config.architectures or ["InterBertForPreTraining"])[0]
        tensors = without_prefix(tensors, (PREFIX,))
        plan = plan_ours(config, tensors, saved.folder, notes=[f"step {saved.step:,}"], architecture=architecture)
        finish(plan, saved.folder, replace(output, architecture=architecture))
    return plan


def _tensors(saved: checkpoint.Checkpoint, kind: str, stack: ExitStack) -> dict[str, LazyTensor]:
    tensors = {}
    for path in sorted(saved.folder.glob(f"{kind}-*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        for name in file.keys():  # noqa: SIM118 - not a dict
            shape = tuple(file.get_slice(name).get_shape())
            tensors[name] = LazyTensor(shape, torch.float32, lambda file=file, name=name: file.get_tensor(name))  # type: ignore[misc]
    if not tensors:
        raise UsageError(f"{saved.folder} has no {kind}-*.safetensors" + ("; leave --ema out" if kind == "ema" else ""))
    return tensors


def plan_deepspeed(folder: Path, config_file: Path | None, allow_partial: bool = False) -> Plan:
    """What a checkpoint of DeepSpeed's becomes; the model's names are ours or the official ones."""
    state = open_deepspeed(folder)
    return plan_merged(without_prefix(state.tensors), folder, config_file, allow_partial, state.notes)


def plan_merged(
    tensors: dict[str, LazyTensor], source: Path, config_file: Path | None, allow_partial: bool, notes: Iterable[str] = ()
) -> Plan:
    """What a model's weights by name become, ours or the official names, without prefixes of wrappers."""
    named = tensors if has_our_names(tensors) else bert_names(tensors, source)
    plan = plan_weights(named, source, config_file, {}, allow_partial)
    return replace(plan, notes=(*notes, *plan.notes))


def find_checkpoint(run: Path) -> checkpoint.Checkpoint:
    """The checkpoint in ``run``: itself, or the newest whole one of a run folder."""
    if (run / checkpoint.MANIFEST).is_file():
        require_own_files(run)
        return checkpoint.open_checkpoint(run)
    if not run.is_dir():
        raise UsageError(f"{run} {'is a file' if run.exists() else 'does not exist'}; give a run folder or one of its checkpoints")
    saved = checkpoint.newest(run / "checkpoints", lambda text: print(f"warning: {text}"))
    if saved is None:
        raise UsageError(f"{run} has no checkpoints; give a run folder or one of its checkpoints{instead(run)}")
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
