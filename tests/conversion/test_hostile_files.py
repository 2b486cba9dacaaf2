"""Files that would run something when unpickled run nothing; malformed ones end in one clear line each."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megainter.conversion.foreign_files import load_torch_file, open_tensors, without_prefix
from megainter.conversion.official import convert_official
from megainter.errors import DamagedError, MegainterError, UsageError
from tests.conversion.test_official import official


class Reduce:
    """Runs a command by __reduce__."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def reduce_pickle(command: str) -> bytes:
    return pickle.dumps({"bert.x": Reduce(command)}, protocol=2)


def build_pickle(command: str) -> bytes:
    """BUILD on a class of the library whose __setstate__ would be given a callable: GLOBAL, EMPTY_TUPLE, NEWOBJ, state, BUILD."""
    return b"\x80\x02cfunctools\npartial\n(cposix\nsystem\nt\x81(cposix\nsystem\n(X" + text(command) + b"t}Nt" + b"b."


def instance_pickle(command: str) -> bytes:
    """INST: the oldest opcode that calls."""
    return b"\x80\x02(X" + text(command) + b"ios\nsystem\n."


def object_pickle(command: str) -> bytes:
    return b"\x80\x02(cposix\nsystem\nX" + text(command) + b"o."


def eval_pickle(command: str) -> bytes:
    code = f"__import__('os').system({command!r})"
    return b"\x80\x02cbuiltins\neval\n(X" + text(code) + b"tR."


def stack_global_pickle(command: str) -> bytes:
    return pickle.dumps(Reduce(command), protocol=4)


def nested_pickle(command: str) -> bytes:
    """A pickle that loads another one."""
    inner = pickle.dumps(Reduce(command), protocol=2)
    return b"\x80\x03cpickle\nloads\n(B" + struct.pack("<I", len(inner)) + inner + b"tR."


def text(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def zipped(content: bytes, extra: dict[str, bytes] | None = None) -> bytes:
    """A torch archive around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": content, "version": b"3\n", "byteorder": b"little", **(extra or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def legacy(content: bytes) -> bytes:
    """torch's format before archives: magic number, protocol, system info, the object, storage keys."""
    header = [pickle.dumps(part, protocol=2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return b"".join(header) + content + pickle.dumps([], protocol=2)


def tarred(content: bytes) -> bytes:
    """torch's oldest format: a tar with pickles in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def nested(content: bytes) -> bytes:
    """An archive whose pickle is itself an archive, which has the pickle beside it once more."""
    return zipped(zipped(content), {"inner.bin": zipped(content), "data/0": content})


PICKLES = [reduce_pickle, build_pickle, instance_pickle, object_pickle, eval_pickle, stack_global_pickle, nested_pickle]
WRAPPERS = [zipped, legacy, tarred, nested, bytes]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("make", PICKLES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("inert", [False, True])
def test_a_hostile_file_runs_nothing(make: Callable[[str], bytes], wrap: Callable[[bytes], bytes], inert: bool, tmp_path: Path) -> None:
    sentinel, path = tmp_path / "ran", tmp_path / "pytorch_model_0.bin"
    content = make(f"touch {sentinel}")
    assert content
    path.write_bytes(wrap(content))
    with pytest.raises(DamagedError) as raised:
        load_torch_file(path, inert)
    assert "\n" not in str(raised.value)
    assert not sentinel.exists()


def test_the_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """Each of them does run under an ordinary unpickler, or the test above would prove nothing."""
    for make in PICKLES:
        sentinel = tmp_path / make.__name__
        try:
            pickle.loads(make(f"touch {sentinel}"))
        except Exception:
            assert make is build_pickle  # only sets the stage: its object is called by whoever uses it
        assert sentinel.exists() or make is build_pickle, make.__name__


def test_a_hostile_file_is_refused_by_the_command_with_the_name_of_what_it_asks_for(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(zipped(eval_pickle(f"touch {tmp_path / 'ran'}")))
    with pytest.raises(DamagedError, match=r"asks to run .*eval") as raised:
        convert_official(tmp_path / "m.bin", tmp_path / "hf")
    assert raised.value.exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.bin"]


def test_a_renamed_pickle_in_a_folder_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(zipped(reduce_pickle(f"touch {tmp_path / 'ran'}")))
    with pytest.raises(DamagedError):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(zipped(reduce_pickle(f"touch {tmp_path / 'ran'}")))
    with pytest.raises(DamagedError, match="not a whole safetensors file"):
        open_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_shard_outside_its_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.save({"x": torch.zeros(1)}, tmp_path / "secret.bin")
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../secret.bin"}}')
    with pytest.raises(UsageError, match="leaves its folder"):
        open_tensors(tmp_path / "model")


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def whole() -> bytes:
    return saved(dict(official()))


def with_change(name: str, tensor: Any) -> bytes:
    return saved(dict(official()) | {name: tensor})


def without(*names: str) -> bytes:
    return saved({name: tensor for name, tensor in official().items() if name not in names})


def flipped() -> bytes:
    content = bytearray(whole())
    content[len(content) // 2] ^= 0x10
    return bytes(content)


def compressed() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole())) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
    return buffer.getvalue()


def endless() -> bytes:
    """A state dict that holds itself."""
    content: dict[str, Any] = {}
    content["model"] = content
    return saved(content)


WORD, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.weight"
MALFORMED: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (bytes, "is empty"),
    "text": (lambda: b"<html>404 not found</html>", "not written by torch.save"),
    "lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS"),
    "gzip": (lambda: b"\x1f\x8b\x08\x00" + bytes(40), "compressed by gzip"),
    "tar": (lambda: tarred(b""), "tar archive"),
    "cut in half": (lambda: whole()[: len(whole()) // 2], "truncated"),
    "last byte missing": (lambda: whole()[:-1], "truncated"),
    "one bit flipped": (flipped, "CRC-32|truncated|cannot be read"),
    "compressed archive": (compressed, "compressed archive"),
    "zip without pickle": (lambda: zipped(b"")[:0] + _zip_of({"readme.txt": b"hello"}), "cannot be read as weights"),
    "legacy cut": (lambda: legacy(pickle.dumps({}, 2))[:-20], "cannot be read|holds no weights"),
    "a list": (lambda: saved([torch.zeros(2)]), "holds a list"),
    "a tensor": (lambda: saved(torch.zeros(2)), "holds a Tensor"),
    "no weights": (lambda: saved({}), "holds no weights"),
    "holds itself": (endless, "is a dict instead of a tensor"),
    "numbers as names": (lambda: saved({1: torch.zeros(2)}), "named by a int"),
    "a number as weight": (lambda: with_change(WORD, 3.0), "is a float instead of a tensor"),
    "sparse": (lambda: with_change(WORD, torch.zeros(50, 24).to_sparse()), "sparse"),
    "complex": (lambda: with_change(WORD, torch.zeros(50, 24, dtype=torch.complex64)), "complex"),
    "integers": (lambda: with_change(QUERY, torch.zeros(24, 24, dtype=torch.int64)), "instead of floating-point"),
    "values from nothing": (lambda: with_change(QUERY, torch.zeros(1).expand(24, 24)), "more than the file holds"),
    "wrong shape": (lambda: with_change(QUERY, torch.zeros(24, 23)), r"is \[24, 23\], the others ask for \[24, 24\]"),
    "flat embeddings": (lambda: with_change(WORD, torch.zeros(1200)), "shape"),
    "a layer far away": (lambda: with_change(QUERY.replace("layer.1", "layer.9000"), torch.zeros(24, 24)), "9000"),
    "no layers' norm": (lambda: without("bert.encoder.layer.1.output.LayerNorm.weight"), "lacks 1 tensor "),
    "no word embeddings": (lambda: without(WORD), "neither an InterBERT nor a BERT"),
    "a stranger": (lambda: with_change("roberta.x.weight", torch.zeros(2)), "not understood"),
    "infinite": (lambda: with_change(QUERY, torch.full((24, 24), float("inf"))), "NaN or infinite"),
}


def _zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_ends_in_one_clear_line(name: str, tmp_path: Path) -> None:
    make, words = MALFORMED[name]
    path = tmp_path / "m.bin"
    path.write_bytes(make())
    with pytest.raises(MegainterError, match=words) as raised:
        convert_official(path, tmp_path / "hf", choices={"num_interaction_layers": 2}, config_file=_heads(tmp_path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
    assert raised.value.exit_code in (2, 4)
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob(".*"))


def _heads(folder: Path) -> Path:
    (folder / "c.json").write_text('{"num_attention_heads": 4, "v_num_attention_heads": 3}')
    return folder / "c.json"


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    """Whatever a broken download leaves, also with torch's format from before archives."""
    state = {"x.weight": torch.arange(40.0), "y.bias": torch.ones(3)}
    path = tmp_path / "m.bin"
    for modern in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=modern)
        content = path.read_bytes()
        for length in range(0, len(content), 7):
            path.write_bytes(content[:length])
            with pytest.raises(DamagedError):
                open_tensors(path)


def test_gamma_beside_weight_is_refused(tmp_path: Path) -> None:
    torch.save({"a.gamma": torch.ones(2), "a.weight": torch.ones(2)}, tmp_path / "m.bin")
    with pytest.raises(DamagedError, match="both"):
        without_prefix(open_tensors(tmp_path / "m.bin"))


def test_a_missing_file_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        open_tensors(tmp_path / "no.bin")
    with pytest.raises(UsageError, match="holds none of"):
        open_tensors(tmp_path)
