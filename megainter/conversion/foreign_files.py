"""Tensors of foreign files, lazily and without running anything that stands in them.

Torch files go through torch's restricted reader (``weights_only``) and are memory-mapped; safetensors and Hugging Face folders, in one
file or in shards, are opened the same way. Whatever is wrong with a file ends in one line.
"""

import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megainter.errors import DamagedError, UsageError
from megainter.files import followed, read_json, shard
from megainter.weights import WEIGHT_FILES

MERGED = "pytorch_model.bin"  # a folder of this name is what newer zero_to_fp32.py make where they are asked for the file
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # training scripts put the weights under one of these
# What modules around a model put before its names: data parallelism, our training step, torch.compile, Lightning's strategies.
WRAPPERS = ("module.", "model.", "_orig_mod.", "_forward_module.")
_ZIP, _TAR_AT, _TAR = b"PK\x03\x04", 257, b"ustar"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
# What stands in DeepSpeed's files beside tensors; numpy and argparse come from users' own client state.
_INERT_MODULES = ("deepspeed.", "numpy.", "argparse.")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor not read yet: ``read()`` gives it, on the CPU, of this shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """A tensor that is there already (memory-mapped, as a rule)."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


class Inert:
    """Stands for an object of another program: keeps its attributes, can do nothing."""

    def __init__(self, *_: object) -> None:
        """Takes and forgets what the object was made with."""


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a ``.bin``/``.pt`` or ``.safetensors`` file, or of a Hugging Face folder, by name.

    ``UsageError`` where there is nothing to read, ``DamagedError`` where a file is not what it should be.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UsageError(f"{path} does not exist; give a checkpoint file or a Hugging Face folder")
    followed(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    return _checked(_state_dict(load_torch_file(path), path), path)


def _open_folder(folder: Path) -> dict[str, LazyTensor]:
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None and (folder / MERGED).is_dir():
        return open_tensors(folder / MERGED)
    dangling = next((each for each in WEIGHT_FILES if (folder / each).is_symlink()), None) if name is None else None
    if dangling is not None:
        raise UsageError(f"{folder / dangling} is a link to a file that is not there; download the model again")
    if name is None:
        raise UsageError(f"{folder} holds none of {', '.join(WEIGHT_FILES)}; give the folder or the file with the weights")
    if not name.endswith(".json"):
        return open_tensors(folder / name)
    index = read_json(followed(folder / name))
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise DamagedError(f"{folder / name} has no weight_map of names to files; fetch the model again")
    files = [shard(folder, place) for place in sorted(set(places.values()))]
    if (missing := next((file for file in files if not file.is_file()), None)) is not None:
        raise DamagedError(f"{folder / name} names {missing.name}, which is not there or is no file; fetch the model again")
    shards = [open_tensors(file) for file in files]
    return {name: tensor for tensors in shards for name, tensor in tensors.items()}


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is not a whole safetensors file: {_first_line(error)}; fetch or write it again") from None
    unknown = next((name for name, part in slices.items() if part.get_dtype() not in _DTYPES), None)
    if unknown is not None:
        raise DamagedError(f"{path}: {unknown} has the dtype {slices[unknown].get_dtype()}, which is not converted; save it in fp32 first")
    return {
        name: LazyTensor(tuple(part.get_shape()), _DTYPES[part.get_dtype()], lambda name=name: file.get_tensor(name))  # type: ignore[misc]
        for name, part in slices.items()
    }


def load_torch_file(path: Path, inert: bool = False) -> Any:
    """The content of a file written by ``torch.save``, tensors on the CPU and memory-mapped where the format allows.

    Only tensors and plain containers are built; with ``inert``, objects of DeepSpeed, numpy and argparse become ``Inert``.
    ``DamagedError`` says in one line what is wrong, also where the file asks for code to be run: none is.
    """
    zipped = _format(followed(path)) == "zip"
    if zipped:
        _check_archive(path)
    try:
        names = _foreign_names(path) if inert and zipped else []
        with safe_globals([(Inert, name) for name in names]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's word on foreign pickles: the error that follows says it in one line
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a hostile or damaged pickle can raise anything
        raise DamagedError(f"{path}: {_reason(error)}") from None


def _format(path: Path) -> str:
    """ "zip" or "legacy"; ``DamagedError`` for what is neither, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(_TAR_AT + len(_TAR))
    if not head:
        raise DamagedError(f"{path} is empty; fetch it again")
    if head.startswith(_ZIP):
        return "zip"
    if head[_TAR_AT:] == _TAR:
        raise DamagedError(f"{path} is a tar archive; unpack it and give the file with the weights")
    if head.startswith(b"\x1f\x8b"):
        raise DamagedError(f"{path} is compressed by gzip; unpack it and give the file with the weights")
    if head.startswith(b"version https://git-lfs"):
        raise DamagedError(f"{path} is only a pointer of Git LFS; fetch the file itself (git lfs pull)")
    if not head.startswith(b"\x80"):
        raise DamagedError(f"{path} was not written by torch.save (it begins with {head[:12]!r}); is it the right file?")
    return "legacy"


def _check_archive(path: Path) -> None:
    """Every record stored as torch stores it, once, and equal to its CRC-32; ``DamagedError`` otherwise."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if any(record.compress_type != zipfile.ZIP_STORED for record in records):
                raise DamagedError(f"{path} is a compressed archive, which torch.save does not write; unpack it and give the file inside")
            if len({record.filename for record in records}) != len(records):
                raise DamagedError(f"{path} names a record twice; it was not written by torch.save")
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise DamagedError(f"{path} is truncated or not a torch file: {_first_line(error)}; fetch it again") from None
    if broken is not None:
        raise DamagedError(f"{path}: record {broken} does not match its CRC-32: the file is damaged; fetch it again")


def _foreign_names(path: Path) -> list[str]:
    return [name for name in get_unsafe_globals_in_checkpoint(str(path)) if name.startswith(_INERT_MODULES)]


def _reason(error: Exception) -> str:
    text = str(error)
    asked = re.search(r"GLOBAL (\S+)|reduce for unrecognized function (.+)", text)
    if asked:
        return f"it asks to run {(asked[1] or asked[2]).strip()[:80]}, which weights never need: refused, and nothing of it was run"
    detail = text.rpartition("WeightsUnpickler error:")[2] or text
    return f"it cannot be read as weights ({type(error).__name__}: {_first_line(detail)}): damaged, or not a checkpoint"


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:160] if lines else "no further detail"


def _state_dict(content: Any, path: Path) -> dict[Any, Any]:
    """The dictionary of weights in what a file holds; training scripts wrap it, some twice."""
    for _ in range(3):
        wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), None)
        if wrapper is None:
            break
        content = content[wrapper]
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds a {type(content).__name__} instead of weights by name; save model.state_dict()")
    if not content:
        raise DamagedError(f"{path} holds no weights at all; save model.state_dict()")
    return content


def _checked(weights: dict[Any, Any], path: Path) -> dict[str, LazyTensor]:
    for name, tensor in weights.items():
        wrong = _wrong_entry(name, tensor)
        if wrong is not None:
            raise DamagedError(f"{path}: entry {str(name)[:80]!r} {wrong}")
    return {name: LazyTensor.of(tensor.detach()) for name, tensor in weights.items()}


def _wrong_entry(name: object, tensor: object) -> str | None:
    if not isinstance(name, str):
        return f"is named by a {type(name).__name__} instead of text; save model.state_dict()"
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__} instead of a tensor; save model.state_dict()"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        return "is sparse, quantised, complex or without data; save ordinary dense tensors"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"claims {math.prod(tensor.shape):,} values, more than the file holds for it"
    return None


def without_prefix(tensors: dict[str, LazyTensor], prefixes: Iterable[str] = WRAPPERS) -> dict[str, LazyTensor]:
    """Drop prefixes that every name has (those of modules around a model), and give gamma and beta their later names."""
    prefixes = tuple(prefixes)
    while (prefix := next((each for each in prefixes if tensors and all(name.startswith(each) for name in tensors)), None)) is not None:
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    renamed = {re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name)): tensor for name, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise DamagedError("the checkpoint names a weight both as gamma or beta and as weight or bias; keep one of them")
    return renamed
