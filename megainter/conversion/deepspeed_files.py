"""DeepSpeed's own checkpoints, ZeRO stages 0 to 3 and the universal format, read without DeepSpeed and without running what stands in them.

At stages 1 and 2 every rank holds one slice of each optimiser group's flat fp32 tensor and says which elements of which parameter lie in
it; at stage 3 every parameter is cut into equal parts, padded, one per rank. Parameters are put together one at a time from memory-mapped
files, so that memory holds one of them.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megainter.conversion.foreign_files import LazyTensor, load_torch_file
from megainter.errors import DamagedError, UsageError
from megainter.files import inside

_SHARD = re.compile(r"(?:.*_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt")


@dataclass(frozen=True)
class DeepSpeedState:
    """fp32 weights by the trained module's names, and what is to be said about them."""

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...]


def find_deepspeed_folder(run: Path) -> Path | None:
    """The folder with DeepSpeed's files: ``run`` itself or the one its ``latest`` names; None where there is none."""
    if not run.is_dir():
        return None
    if _holds_states(run):
        return run
    for pointer in (run / "latest", run / "latest_universal"):
        name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
        if name and _holds_states(inside(run, name)):
            return inside(run, name)
    return None


def _holds_states(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt")) or (folder / "zero").is_dir()


def open_deepspeed(folder: Path) -> DeepSpeedState:
    """The weights of a DeepSpeed checkpoint.

    ``DamagedError`` where files are missing, damaged or hostile, ``UsageError`` for model parallelism.
    """
    if any(re.search(r"mp_rank_(?!00)\d+_", path.name) for path in folder.glob("*_states.pt")):
        raise UsageError(f"{folder} was written under model parallelism, which no InterBERT here knows; merge it with DeepSpeed first")
    model = _model_state(folder)
    notes: list[str] = []
    if (folder / "zero").is_dir():
        found = _universal(folder, _shapes(model, "param_shapes", folder))
    elif any(folder.glob("*_optim_states.pt")):
        found = _sharded(folder, model)
    else:
        found, notes = _unsharded(model, folder)
    shared = model.get("shared_params")
    for alias, original in (shared if isinstance(shared, dict) else {}).items():
        if isinstance(original, str) and original in found and isinstance(alias, str):
            found[alias] = found[original]
    return DeepSpeedState(found, tuple(notes))


def _model_state(folder: Path) -> dict[str, Any]:
    places = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_model_states.pt")
    path = next((folder / name for name in places if (folder / name).is_file()), None)
    if path is None:
        raise DamagedError(f"{folder} has no {places[0]}: the checkpoint is incomplete")
    state = load_torch_file(path, inert=True)
    if not isinstance(state, dict) or not isinstance(state.get("module"), dict):
        raise DamagedError(f"{path} is not a model state of DeepSpeed")
    return state


def _shapes(model: Mapping[str, Any], key: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of all optimiser groups, in DeepSpeed's order, by name."""
    groups = model.get(key) or []
    groups = [groups] if isinstance(groups, dict) else groups
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise DamagedError(f"{folder}: {key} of the model state is malformed")
    shapes = {name: shape for group in groups for name, shape in group.items()}
    sound = all(isinstance(name, str) and isinstance(shape, tuple | list) for name, shape in shapes.items())
    if not sound or len(shapes) != sum(map(len, groups)):
        raise DamagedError(f"{folder}: {key} of the model state is malformed")
    return {name: tuple(int(size) for size in shape) for name, shape in shapes.items()}


def _sharded(folder: Path, model: Mapping[str, Any]) -> dict[str, LazyTensor]:
    ranks = _optimizer_states(folder)
    shapes = _shapes(model, "param_shapes", folder)
    try:
        if "fp32_flat_groups" in ranks[0]:
            found = _stage3(ranks, shapes, folder)
        else:
            found = _stage12(ranks, shapes, folder)
        return found | _frozen(folder, model, stage3="fp32_flat_groups" in ranks[0])
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        raise DamagedError(f"{folder}: the optimiser states are not laid out as DeepSpeed does ({type(error).__name__}: {error})") from None


def _optimizer_states(folder: Path) -> list[Mapping[str, Any]]:
    """Every rank's optimiser state, rank 0 first; ``DamagedError`` where one is missing."""
    paths = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name)) and match[3] == "optim"}
    states = {rank: load_torch_file(path, inert=True) for rank, path in sorted(paths.items())}
    for rank, state in states.items():
        if not isinstance(state, dict) or not isinstance(state.get("optimizer_state_dict"), dict):
            raise DamagedError(f"{paths[rank]} is not an optimiser state of DeepSpeed")
    inner = [state["optimizer_state_dict"] for state in states.values()]
    count = inner[0].get("partition_count") if inner else 1
    count = max(count) if isinstance(count, list) and count else count
    missing = sorted(set(range(int(count))) - set(paths)) if isinstance(count, int) else [0]
    if missing or len(paths) != count:
        raise DamagedError(f"{folder} has the optimiser states of {len(paths)} of {count} ranks; bring all ranks' files together")
    return inner


def _stage12(ranks: list[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, LazyTensor]:
    if "param_slice_mappings" not in ranks[0]:
        raise DamagedError(
            f"{folder} was written by a DeepSpeed too old to say where parameters lie; run its zero_to_fp32.py and give what it writes"
        )
    pieces: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for state in ranks:
        for flat, places in zip(state["single_partition_of_fp32_groups"], state["param_slice_mappings"], strict=True):
            for name, place in places.items():
                pieces[name].append(flat.detach().narrow(0, int(place.start), int(place.numel)))
    return {name: _joined(name, pieces[name], shape, folder) for name, shape in shapes.items()}


def _stage3(ranks: list[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, LazyTensor]:
    flats = [[flat.detach() for flat in state["fp32_flat_groups"]] for state in ranks]
    found, start = {}, 0
    for name, shape in shapes.items():
        part = math.ceil(math.prod(shape) / len(ranks))
        found[name] = _joined(name, [piece for flat in flats for piece in _span(flat, start, part)], shape, folder)
        start += part
    held = sum(len(flat) for flat in flats[0])
    if start != held:
        raise DamagedError(f"{folder}: the parameters take {start:,} elements of each rank, the files hold {held:,}; they are mixed")
    return found


def _span(flats: list[Tensor], start: int, length: int) -> list[Tensor]:
    """Elements [start, start + length) of flat tensors laid end to end, as views."""
    parts, offset = [], 0
    for flat in flats:
        low, high = max(start - offset, 0), min(start + length - offset, len(flat))
        if low < high:
            parts.append(flat[low:high])
        offset += len(flat)
    return parts


def _joined(name: str, pieces: list[Tensor], shape: tuple[int, ...], folder: Path) -> LazyTensor:
    """One parameter from its pieces in rank order; the last one's padding is cut off."""
    held, numel = sum(map(len, pieces)), math.prod(shape)
    if held < numel or not pieces:
        raise DamagedError(f"{folder}: {held:,} of the {numel:,} values of {name} are there; the checkpoint is incomplete")
    return LazyTensor(shape, pieces[0].dtype, lambda: torch.cat(pieces)[:numel].view(shape))


def _frozen(folder: Path, model: Mapping[str, Any], stage3: bool) -> dict[str, LazyTensor]:
    """Parameters that were not trained: whole in the model state, at stage 3 cut as the others are."""
    shapes = _shapes(model, "frozen_param_shapes", folder)
    if not shapes:
        return {}
    paths = {int(match[1]): path for path in folder.iterdir() if (match := _SHARD.fullmatch(path.name)) and match[3] == "model"}
    states = [load_torch_file(paths[rank], inert=True) for rank in sorted(paths)] if stage3 else [model]
    fragments = [state["frozen_param_fragments"] for state in states]
    return {name: _joined(name, [part[name].detach().flatten() for part in fragments], shape, folder) for name, shape in shapes.items()}


def _universal(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    """The universal format: a folder per parameter; stage 3 leaves it flat and padded there."""
    missing = [name for name in shapes if not (inside(folder / "zero", name) / "fp32.pt").is_file()]
    if missing or not shapes:
        raise DamagedError(f"{folder / 'zero'} lacks {len(missing)} of {len(shapes)} parameters ({missing[:1]}); convert it again")
    paths = {name: folder / "zero" / name / "fp32.pt" for name in shapes}
    return {name: LazyTensor(shape, torch.float32, _universal_reader(paths[name], shape)) for name, shape in shapes.items()}


def _universal_reader(path: Path, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    def read() -> Tensor:
        content = load_torch_file(path)
        tensor = content.get("param") if isinstance(content, dict) else content
        if not isinstance(tensor, Tensor) or tensor.numel() < math.prod(shape):
            raise DamagedError(f"{path} does not hold the {math.prod(shape):,} values of its parameter")
        return tensor.detach().flatten()[: math.prod(shape)].view(shape).float()

    return read


def _unsharded(model: Mapping[str, Any], folder: Path) -> tuple[dict[str, LazyTensor], list[str]]:
    tensors = {name: LazyTensor.of(tensor.detach()) for name, tensor in model["module"].items() if isinstance(tensor, Tensor)}
    if not tensors or any(not tensor.shape or 0 in tensor.shape for tensor in tensors.values()):
        raise DamagedError(f"{folder} holds placeholders of weights only: the optimiser states with the weights themselves are missing")
    half = sorted({str(tensor.dtype) for tensor in tensors.values()} - {"torch.float32"})
    return tensors, [f"the files hold {', '.join(half)} weights: fp32 ones were not saved at this stage"] if half else []
