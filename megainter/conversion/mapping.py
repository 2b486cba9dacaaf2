"""What a conversion takes from its source, what it draws anew, what it leaves over: the table, and the rule that nothing is left unsaid."""

import re
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megainter.conversion.foreign_files import LazyTensor
from megainter.errors import DamagedError
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertModel, InterBertPreTrainedModel

HEADS = ("choice_head", "classifier")  # of the downstream models; a folder may hold them beside the pretraining heads


@dataclass(frozen=True)
class Origin:
    """Where one of our tensors comes from: the name it has there, and the tensor."""

    name: str
    tensor: LazyTensor


@dataclass(frozen=True)
class Plan:
    """A conversion before anything is written. Names are ours except in ``left_over`` and ``unknown``.

    ``fresh`` are newly initialised on purpose; ``missing`` should have been in the source; ``left_over`` has no place in an InterBERT
    and is known for it; ``unknown`` has none either, and nobody knows why it is there. ``notes`` tell choices and assumptions.
    """

    config: InterBertConfig
    shapes: Mapping[str, tuple[int, ...]]
    taken: Mapping[str, Origin]
    fresh: tuple[str, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    unknown: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """Values in the target, the tied decoder counted once."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())


def model_class(name: str) -> type[PreTrainedModel]:
    """The model of that class name (``config.architectures``); ``DamagedError`` for a name that is none of ours."""
    known: dict[str, type[PreTrainedModel]] = {
        kind.__name__: kind for kind in InterBertPreTrainedModel.__subclasses__() if kind is not InterBertModel
    }
    if name not in known:
        raise DamagedError(f"the configuration names the architecture {name!r}; known are {', '.join(known)}")
    return known[name]


def expected_shapes(
    config: InterBertConfig, heads: Collection[str] = (), architecture: str = "InterBertForPreTraining"
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, and of the downstream ``heads`` ("choice_head", "classifier") beside it."""
    with torch.device("meta"):
        model = model_class(architecture)(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for head in heads:
        rows = 1 if head == "choice_head" else int(config.num_labels)  # type: ignore[arg-type]
        shapes |= {f"{head}.weight": (rows, config.pooler_size), f"{head}.bias": (rows,)}
    return shapes


def make_plan(
    config: InterBertConfig,
    found: Mapping[str, Origin],
    names: Iterable[str],
    *,
    heads: Collection[str] = (),
    fresh: str = r"(?!)",
    left_over: str = r"(?!)",
    notes: Iterable[str] = (),
    architecture: str = "InterBertForPreTraining",
) -> Plan:
    """Compare what was ``found`` (by our names) with what the model needs.

    ``names`` are all names of the source. ``fresh`` is a pattern of our names that this kind of source never has, ``left_over`` one of
    its names that are known to have no place. ``DamagedError`` where a shape contradicts the others or a tensor holds no numbers.
    """
    shapes = expected_shapes(config, heads, architecture)
    taken = {name: origin for name, origin in found.items() if name in shapes}
    for name, origin in taken.items():
        _require_fit(origin, shapes[name])
    lacking = [name for name in shapes if name not in taken]
    used = {origin.name for origin in taken.values()}
    unused = [name for name in names if name not in used]
    return Plan(
        config=config,
        shapes=shapes,
        taken=taken,
        fresh=tuple(name for name in lacking if re.match(fresh, name)),
        missing=tuple(name for name in lacking if not re.match(fresh, name)),
        left_over=tuple(name for name in unused if re.match(left_over, name)),
        unknown=tuple(name for name in unused if not re.match(left_over, name)),
        notes=tuple(notes),
    )


def _require_fit(origin: Origin, shape: tuple[int, ...]) -> None:
    if origin.tensor.shape != shape:
        raise DamagedError(f"{origin.name} is {list(origin.tensor.shape)}, the others ask for {list(shape)}; the checkpoint is mixed")
    if not origin.tensor.dtype.is_floating_point:
        raise DamagedError(f"{origin.name} holds {origin.tensor.dtype} instead of floating-point values; it is not a weight")


def untied_decoder(tensors: Mapping[str, LazyTensor], decoder: str, word: str, source: object, allow_partial: bool) -> tuple[str, ...]:
    """What is to be said where the decoder is there and is not the word embeddings, with which it is one tensor in an InterBERT; else ().

    ``DamagedError`` there, unless ``allow_partial``: the decoder is left over then.
    """
    if decoder not in tensors or word not in tensors or tensors[decoder] is tensors[word]:
        return ()
    if tensors[decoder].shape == tensors[word].shape and torch.equal(tensors[decoder].read(), tensors[word].read()):
        return ()
    differs = "differs from" if tensors[decoder].shape == tensors[word].shape else "has another shape than"
    fault = f"{decoder} {differs} the word embeddings, with which it is one tensor in an InterBERT"
    if not allow_partial:
        raise DamagedError(f"{source}: {fault}; --allow-partial leaves it out and decodes by the word embeddings")
    return (f"{fault}: it is left out, and texts are decoded by the word embeddings",)


def require_complete(plan: Plan, source: object, allow_partial: bool) -> None:
    """``DamagedError`` where something is missing or unknown, unless ``allow_partial``."""
    if allow_partial or not (plan.missing or plan.unknown):
        return
    parts = []
    if plan.missing:
        parts.append(f"lacks {_count(plan.missing)} ({_some(plan.missing)})")
    if plan.unknown:
        parts.append(f"has {_count(plan.unknown)} not understood ({_some(plan.unknown)})")
    raise DamagedError(f"{source} {' and '.join(parts)}: nothing was written; --allow-partial converts what fits")


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor" + ("s" if len(names) > 1 else "")


def _some(names: Collection[str]) -> str:
    rows = [name for name, _ in grouped(names)] if len(names) > 3 else list(names)
    return ", ".join(rows[:3]) + (", ..." if len(rows) > 3 else "")


def tensors_of(plan: Plan, seed: int) -> dict[str, LazyTensor]:
    """Every tensor of the target by our name, in the model's order: taken, or drawn by ``seed``."""
    return {
        name: plan.taken[name].tensor if name in plan.taken else fresh_tensor(name, shape, plan.config, seed)
        for name, shape in plan.shapes.items()
    }


def fresh_tensor(name: str, shape: tuple[int, ...], config: InterBertConfig, seed: int) -> LazyTensor:
    """Newly initialised fp32 values as the model itself starts: weights N(0, initializer_range), biases 0, norms 1.

    A pure function of seed and name, so that what else is new changes nothing.
    """

    def draw() -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(shape)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed % 2**32))
        return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)

    return LazyTensor(shape, torch.float32, draw)


def table_of(plan: Plan) -> dict[str, Any]:
    """What ``print_table`` says, as JSON types: rows of grouped names with how many tensors each stands for."""
    taken = [{"from": theirs, "to": ours, "tensors": count} for theirs, ours, count in _grouped_taken(plan)]
    others = {"newly_initialised": plan.fresh, "missing": plan.missing, "left_over": plan.left_over, "not_understood": plan.unknown}
    rows = {title: [{"name": name, "tensors": count} for name, count in grouped(names)] for title, names in others.items()}
    return {"parameters": plan.parameters, "taken": taken, **rows, "notes": list(plan.notes)}


def _grouped_taken(plan: Plan) -> list[tuple[str, str, int]]:
    return _grouped_pairs((origin.name, name) for name, origin in plan.taken.items())


def print_table(plan: Plan) -> None:
    """Say what is taken, newly initialised, missing and left over, names grouped, and every choice that was made."""
    _print_rows("taken", [(f"{theirs} -> {ours}", count) for theirs, ours, count in _grouped_taken(plan)])
    _print_rows("newly initialised", grouped(plan.fresh))
    _print_rows("missing", grouped(plan.missing))
    _print_rows("left over", grouped(plan.left_over))
    _print_rows("not understood", grouped(plan.unknown))
    for note in plan.notes:
        print(f"note: {note}")


def _print_rows(title: str, rows: list[tuple[str, int]]) -> None:
    print(f"{title}: {sum(count for _, count in rows)} tensors")
    for text, count in rows:
        print(f"    {count:4d}  {text}")


def grouped(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names by their module, layer numbers as a range, with their count: ("bert.encoder.layer.0-5", 96)."""
    return [(ours, count) for _, ours, count in _grouped_pairs((name, name) for name in names)]


def _grouped_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    groups: dict[tuple[str, str], list[tuple[int | None, int | None]]] = {}
    for theirs, ours in pairs:
        (left, left_number), (right, right_number) = _module(theirs), _module(ours)
        groups.setdefault((left, right), []).append((left_number, right_number))
    return [
        (left + _range(a for a, _ in numbers), right + _range(b for _, b in numbers), len(numbers))
        for (left, right), numbers in groups.items()
    ]


def _module(name: str) -> tuple[str, int | None]:
    """``("bert.encoder.layer", 3)`` of a numbered module's tensor, else its first two parts and None."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:place]), int(part)
    return ".".join(parts[: max(1, min(2, len(parts) - 1))]), None


def _range(numbers: Iterable[int | None]) -> str:
    present = [number for number in numbers if number is not None]
    if not present:
        return ""
    return f".{min(present)}" if min(present) == max(present) else f".{min(present)}-{max(present)}"
