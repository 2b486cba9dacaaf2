"""From a training run (any world size, any ZeRO stage) to a Hugging Face folder, bit-equal to the fp32 master weights.

Ours or DeepSpeed's own files; tensor by tensor, so that memory holds little more than the largest one.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open

from megainter.conversion.architecture import make_config, region_target, sizes_in_shapes, stated_sizes
from megainter.conversion.deepspeed_files import find_deepspeed_folder, open_deepspeed
from megainter.conversion.folder import Output, finish, refuse_existing
from megainter.conversion.foreign_files import LazyTensor, without_prefix
from megainter.conversion.mapping import HEADS, Origin, Plan, make_plan
from megainter.conversion.official import bert_names, plan_official
from megainter.conversion.vocabulary import NO_VOCABULARY, find_vocabulary, require_room
from megainter.errors import DamagedError, UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import checkpoint

PREFIX = "model."  # of the trained module's parameter names
TIED = "msm_head.decoder.weight"


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
) -> Plan:
    """Write the Hugging Face folder ``destination`` from a run folder's newest whole checkpoint, or from one checkpoint folder.

    ``ema`` takes the averaged weights instead. A folder of DeepSpeed's own files (any stage, or universal) does as well; its model may
    bear our names or the official ones, and its sizes come from the tensors and ``config_file``.
    Raises ``UsageError`` where there is no checkpoint or ``destination`` exists, ``DamagedError`` where files or tensors are wrong.
    """
    refuse_existing(destination)
    folder = find_deepspeed_folder(run)
    if folder is None:
        saved = find_checkpoint(run)
        files, _ = find_vocabulary(vocabulary or saved.folder / "vocab.txt", not saved.state["lowercase"] if cased is None else cased)
        return _convert_ours(saved, "ema" if ema else "weights", Output(destination, files, allow_partial, verify=verify))
    if ema:
        raise UsageError(f"{folder} is a checkpoint of DeepSpeed's own, which holds no averaged weights; leave --ema out")
    plan = plan_deepspeed(folder, config_file)
    files, notes = find_vocabulary(vocabulary, cased) if vocabulary is not None else (None, [NO_VOCABULARY])
    require_room(files, plan.config.vocab_size)
    plan = replace(plan, notes=(*plan.notes, *notes))
    finish(plan, folder, Output(destination, files, allow_partial, verify=verify))
    return plan


def _convert_ours(saved: checkpoint.Checkpoint, kind: str, output: Output) -> Plan:
    with ExitStack() as stack:
        tensors = _tensors(saved, kind, stack)
        config = InterBertConfig.from_json_file(saved.folder / "config.json")
        architecture = (config.architectures or ["InterBertForPreTraining"])[0]
        plan = _plan_ours(config, without_prefix(tensors, (PREFIX,)), [f"step {saved.step:,}"], architecture)
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


def plan_deepspeed(folder: Path, config_file: Path | None) -> Plan:
    """What a checkpoint of DeepSpeed's becomes; the model's names are ours or the official ones."""
    state = open_deepspeed(folder)
    tensors = without_prefix(state.tensors)
    if not any(name.startswith("interbert.") for name in tensors):
        plan = plan_official(bert_names(tensors, folder), folder, config_file, {})
        return replace(plan, notes=(*state.notes, *plan.notes))
    stated = stated_sizes(config_file)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    target, notes = region_target(shapes, stated.get("region_objective"))
    config, assumed = make_config(stated, sizes_in_shapes(shapes) | target, {})
    return _plan_ours(config, tensors, [*state.notes, *notes, *assumed])


def _plan_ours(
    config: InterBertConfig, tensors: dict[str, LazyTensor], notes: Iterable[str], architecture: str = "InterBertForPreTraining"
) -> Plan:
    """A model of its own names; a downstream model has its head, others may have it beside the pretraining heads."""
    pretraining = architecture == "InterBertForPreTraining"
    heads = [head for head in HEADS if f"{head}.weight" in tensors] if pretraining else []
    found = {name: Origin(name, tensor) for name, tensor in tensors.items()}
    return make_plan(config, found, [name for name in tensors if name != TIED], heads=heads, notes=notes, architecture=architecture)


def find_checkpoint(run: Path) -> checkpoint.Checkpoint:
    """The checkpoint in ``run``: itself, or the newest whole one of a run folder."""
    if (run / checkpoint.MANIFEST).is_file():
        return checkpoint.open_checkpoint(run)
    if not run.is_dir():
        raise UsageError(f"{run} {'is a file' if run.exists() else 'does not exist'}; give a run folder or one of its checkpoints")
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
