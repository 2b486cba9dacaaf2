"""Writing a Hugging Face folder: tensor by tensor, so that memory holds one of them, and whole or not at all."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megainter.conversion.card import NO_CARD, Card, write_card
from megainter.conversion.foreign_files import LazyTensor, open_tensors
from megainter.conversion.mapping import Plan, print_table, require_complete, tensors_of
from megainter.conversion.vocabulary import VocabularyFiles, write_vocabulary
from megainter.errors import DamagedError, UsageError
from megainter.files import aside, write_checksums
from megainter.model.configuration import InterBertConfig
from megainter.model.processor import write_processor_settings
from megainter.model.remote_code import auto_map, write_remote_code
from megainter.progress import Progress
from megainter.weights import Located, locate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Output:
    """Where a conversion goes, and how: ``seed`` draws what is newly initialised."""

    destination: Path
    vocabulary: VocabularyFiles | None = None
    allow_partial: bool = False
    seed: int = 0
    dtype: str = "fp32"
    architecture: str = "InterBertForPreTraining"
    verify: bool = False
    origin: Located | None = None  # the weights it is made from, where they came by name
    card: Card = NO_CARD


def finish(plan: Plan, source: object, output: Output, compare: Callable[[Path], str] | None = None) -> None:
    """Print the plan's table and write its folder; ``output.verify`` compares it before it appears, by ``compare`` or by reading it again.

    Raises ``DamagedError`` where the plan is incomplete and that is not allowed, or a tensor is not finite; nothing is left then.
    """
    print_table(plan)
    require_complete(plan, source, output.allow_partial)
    if plan.missing:
        print(f"note: the {len(plan.missing)} missing tensors begin anew, drawn by the seed: train them before use")
    with new_folder(output.destination) as partial:
        tensors = tensors_of(plan, output.seed)
        write_folder(partial, plan.config, tensors, output)
        name = output.origin.name if output.origin is not None and output.origin.digests else None
        card = replace(output.card, name=name or output.card.name)
        title = card.trained.run.name if card.trained is not None else output.destination.name
        write_card(partial, title, plan.config, plan.parameters, output.dtype, card)
        if output.verify:
            print(compare(partial) if compare is not None and not plan.missing else reread(partial, tensors, DTYPES[output.dtype]))
            if compare is not None and plan.missing:
                print("the source lacks tensors, so that it could not be run beside the result")
    print(f"{source} -> {output.destination}: {plan.parameters:,} parameters, {output.dtype}")


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill beside ``destination``, which it becomes at the end; after an exception nothing is left of it."""
    refuse_existing(destination)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with aside(destination) as partial:
        partial.mkdir()
        yield partial
        write_checksums(partial)


def source_of(source: Path) -> Located:
    """What is converted, a path or weights by name, said where it came by one; raises as ``locate``."""
    found = locate(source, option="SRC")
    if found.told:
        print(found.told, flush=True)
    return found


def refuse_existing(destination: Path) -> None:
    """``UsageError`` where ``destination`` exists: a conversion never writes over something."""
    if destination.exists():
        raise UsageError(f"{destination} exists; give a new name or remove it")


def write_folder(folder: Path, config: InterBertConfig, tensors: Mapping[str, LazyTensor], output: Output) -> None:
    """config.json, model.safetensors, the file by which transformers alone can load them, the vocabulary's files where there is one, and
    origin.json where the weights came by name."""
    config.architectures = [output.architecture]
    config.dtype = DTYPES[output.dtype]
    config.auto_map = auto_map()
    config.save_pretrained(folder)
    write_tensors(folder / "model.safetensors", tensors, DTYPES[output.dtype])
    if output.vocabulary is not None:
        write_vocabulary(folder, output.vocabulary, config.max_position_embeddings)
        stated = {name: getattr(config, name) for name in ("max_text_tokens", "max_regions") if getattr(config, name) is not None}
        write_processor_settings(folder, config.region_feature_size, stated)
    write_remote_code(folder)
    if output.origin is not None:
        output.origin.record(folder)


def reread(written: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> str:
    """Compare what was ``written`` (a folder or a file) with its source, bit by bit; ``DamagedError`` names a tensor that differs."""
    again = open_tensors(written)
    for name, tensor in tensors.items():
        if name not in again or not torch.equal(again[name].read(), tensor.read().to(dtype)):
            raise DamagedError(f"{name} was not written as it was read: nothing is left; is the disk sound?")
    return f"verified: {len(tensors)} tensors read again, bit-equal"


def write_tensors(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> None:
    """Write a safetensors file of ``dtype``, reading one tensor at a time. ``DamagedError`` for NaN, infinity, or a shape that changed."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        end = offset + torch.Size(tensor.shape).numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}  # type: ignore[dict-item]
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file, Progress(f"writing {path.name}", len(tensors), "tensors") as progress:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            file.write(_bytes(name, tensor, dtype))
            progress.update()


def _bytes(name: str, lazy: LazyTensor, dtype: torch.dtype) -> memoryview:
    tensor = lazy.read()
    if tuple(tensor.shape) != lazy.shape:
        raise DamagedError(f"{name} is {list(tensor.shape)} instead of {list(lazy.shape)}; the checkpoint changed while it was read")
    finite = bool(torch.isfinite(tensor).all())
    tensor = tensor.to(dtype).contiguous()
    if not finite:
        raise DamagedError(f"{name} holds NaN or infinite values: the training that wrote it had diverged; take an earlier checkpoint")
    if dtype == torch.float16 and not bool(torch.isfinite(tensor).all()):
        raise DamagedError(f"{name} holds values beyond fp16's largest, 65504; convert to bf16 or fp32 instead")
    return tensor.view(-1).view(torch.uint8).numpy().data
