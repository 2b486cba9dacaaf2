"""Weights by name: what may stand where a file or folder of weights is taken, and the local path that it becomes.

A path that exists always wins (of a detector's weights a file: a folder ``photos`` is one of photos). Else a name is
``hf:OWNER/NAME[/FILE][@REVISION]`` (the Hugging Face Hub); for detectors also ``torchvision:MODEL`` (torchvision's own table), ``vg``
(the usual Visual Genome weights) and those that come along. What is fetched stays in the cache of its client, and is read only where its
digest is the one that its source states.
"""

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Literal, NoReturn

from megainter.errors import DamagedError, MegainterError, NoSpaceError, UsageError
from megainter.files import is_full, read_json, sha256_of, write_json
from megainter.paths import near_paths

Kind = Literal["model", "detector"]
# Weights of a Hugging Face folder, in one file or in shards; the first that is there is read, and no other fetched.
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".pkl")
# Weights that come with the package (preprocessing/assets), by the names that stand for them.
PACKAGED: Mapping[str, str] = MappingProxyType({"photos": "photo_detector.safetensors", "demo": "demo_detector.safetensors"})
USUAL: Mapping[str, str] = MappingProxyType({"vg": "hf:unc-nlp/frcnn-vg-finetuned/pytorch_model.bin"})
TORCHVISION = ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2")  # models of torchvision whose form our detector reads
HUB, TABLE = "hf:", "torchvision:"
ORIGIN = "origin.json"  # in a store, a run or a model's folder: which weights by name it was made from
HUB_FORM = "hf:OWNER/NAME[/FILE][@REVISION]"
SECONDS = 10.0  # to wait for the Hub's answer
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_HUB_NAME = re.compile(rf"hf:({_PART}/{_PART})(?:/([^@]+))?(?:@([^@\s]+))?")
_BESIDE = (".json", ".txt")  # settings and vocabularies


@dataclass(frozen=True)
class Located:
    """Weights on this machine: their ``path``, the ``name`` that gives the same ones again (a branch has become its commit), and the
    SHA-256 of every file that was asked for by name, by its name there; none of a plain path."""

    path: Path
    name: str
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def again(self) -> Path:
        """What another process opens to have the same weights: the name, where they came by one."""
        return Path(self.name)

    @property
    def told(self) -> str | None:
        """One line for the log, of weights that came by name."""
        weights = [f"{name} {digest}" for name, digest in self.digests.items() if name.endswith(WEIGHT_SUFFIXES)]
        return f"weights {self.name}: SHA-256 {', '.join(weights)}" if weights else None

    def record(self, folder: Path) -> None:
        """Write ``origin.json`` into what was made from these weights; nothing of a plain path."""
        if self.digests:
            write_json(folder / ORIGIN, self.facts)

    @property
    def facts(self) -> dict[str, Any]:
        """What ``origin.json`` holds."""
        return {"name": self.name, "sha256": dict(self.digests)}


def locate(name: str | Path, kind: Kind = "model", option: str = "") -> Located:
    """The weights that ``name`` stands for, fetched where they are not in the cache: of a detector a file, of a model a file or a folder.

    ``option`` opens the line that a mistake ends in. Raises ``UsageError`` for what is neither a path nor a known name, for a repository,
    revision or file that is not there or not open to this user, and where the network is needed and not there: the line says what to
    download by hand and where to put it. ``DamagedError`` where content is not what its source states, ``NoSpaceError``.
    """
    check_name(name, kind, option)
    text = str(name)
    if _is_path(Path(name), kind):
        return Located(Path(name), text)
    if kind == "detector" and text in PACKAGED:
        return _packaged(text)
    if text.startswith(TABLE):
        return _from_table(text)
    return _from_hub(USUAL.get(text, text), text, kind)


def as_packaged(found: Located) -> Located:
    """The same weights under their name in ``PACKAGED``, where a plain path is a file with that content."""
    if found.digests or not found.path.is_file():
        return found
    alike = [name for name in PACKAGED if packaged_weights(name).stat().st_size == found.path.stat().st_size]
    digest = sha256_of(found.path) if alike else ""
    return next((each for each in map(_packaged, alike) if digest in each.digests.values()), found)


def origin_name(folder: Path) -> str | None:
    """The name of the weights that ``folder`` (a store, a run, a model) was made from, where they came by one (``Located.record``)."""
    path = folder / ORIGIN
    facts = read_json(path) if path.is_file() else None
    name = facts.get("name") if isinstance(facts, dict) else None
    return name if isinstance(name, str) else None


def _packaged(name: str) -> Located:
    path = packaged_weights(name)
    return Located(path, name, {path.name: sha256_of(path)})


def packaged_weights(name: str) -> Path:
    """The file of weights that come with the package under a name of ``PACKAGED``."""
    return Path(str(files("preprocessing") / "assets" / PACKAGED[name]))


def check_name(name: str | Path, kind: Kind = "model", option: str = "") -> None:
    """``UsageError`` where ``name`` is neither a path that exists nor of the form of a name; asks no network and imports nothing heavy."""
    text, opening = str(name), f"{option} " if option else ""
    if _is_path(Path(name), kind):
        return
    if text.startswith(TABLE) or (text in PACKAGED or text in USUAL):
        known = text in PACKAGED or text in USUAL or text.removeprefix(TABLE) in TORCHVISION
        if kind == "detector" and known:
            return
        if kind == "model":
            raise UsageError(f"{opening}{text} names a detector, and a model is wanted here: a folder, a file or {HUB_FORM}")
    if text.startswith(HUB):
        if _HUB_NAME.fullmatch(text) and ".." not in re.split("[/@]", text):
            return
        raise UsageError(f"{opening}{text} is no name of the Hub: give {HUB_FORM}")
    if Path(name).is_dir():
        raise UsageError(f"{opening}{text} is a folder; give the file of weights in it")
    raise UsageError(f"{opening}{text} does not exist{_remedy(text, kind)}")


def _is_path(path: Path, kind: Kind) -> bool:
    return path.is_file() if kind == "detector" else path.exists()


def _remedy(text: str, kind: Kind) -> str:
    """The nearest name, a file beside it among them; what has the form of a repository's name, as that."""
    known = [*PACKAGED, *USUAL, *(f"{TABLE}{model}" for model in TORCHVISION)] if kind == "detector" else []
    if near := difflib.get_close_matches(text, known, n=1) or near_paths(Path(text)):
        return f"; did you mean {near[0]}?"
    if is_repository(text):
        return f"; a repository of the Hub is named {HUB}{text}"
    names = f" or {', '.join(known)}" if known else ""
    return f"; give a file or a folder, {HUB_FORM}{names}" if kind == "model" else f"; give a file, {HUB_FORM}{names}"


def is_repository(text: str) -> bool:
    """Whether ``text`` has the form OWNER/NAME of a repository of the Hub, and is no place on this machine."""
    return re.fullmatch(rf"{_PART}/{_PART}", text) is not None and not Path(text).exists() and not Path(text).parent.exists()


# --- torchvision's table -------------------------------------------------------------------------------------------------------------


def _from_table(name: str) -> Located:
    """The weights file of torchvision's table, in torch.hub's cache; its name holds the first digits of its digest."""
    from torch import hub
    from torchvision.models import get_model_weights

    url: str = get_model_weights(name.removeprefix(TABLE))["DEFAULT"].url  # type: ignore[index]
    path = Path(hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    found = re.search(r"-([0-9a-f]{8,})\.", path.name)
    prefix = found[1] if found else ""
    if not path.is_file():
        by_hand = f"download {url} by hand to {path}, or give the file itself"
        if is_offline():
            raise UsageError(f"{name} is not in the cache, and HF_HUB_OFFLINE forbids the network: {by_hand}")
        _fetch_from_table(name, url, path, prefix, by_hand)
    digest = sha256_of(path)
    if not digest.startswith(prefix):
        raise DamagedError(f"{path} has the SHA-256 {digest[:16]}, and its name says {prefix}: remove it and run again")
    return Located(path, name, {path.name: digest})


def _fetch_from_table(name: str, url: str, path: Path, prefix: str, by_hand: str) -> None:
    from torch import hub

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.download_url_to_file(url, str(path), hash_prefix=prefix or None)
    except RuntimeError as error:  # torch.hub's word for another digest, also where the connection was cut
        raise DamagedError(
            f"{name}: what {url} sent is cut off or has another SHA-256 ({_short(error)}); run again, or {by_hand}"
        ) from None
    except OSError as error:
        if is_full(error):
            raise NoSpaceError(f"{name}: no space left for {path}; free space and run the same command") from None
        raise UsageError(f"{name} cannot be fetched ({_short(error)}): {by_hand}") from None


# --- the Hugging Face Hub --------------------------------------------------------------------------------------------------------------


def _from_hub(name: str, asked: str, kind: Kind) -> Located:
    """The file or the snapshot's folder of a repository, in the Hub's cache."""
    parts = _HUB_NAME.fullmatch(name)
    assert parts is not None  # as ``check_name`` saw to
    repository, inside, revision = parts[1], (parts[2] or "").rstrip("/"), parts[3] or "main"
    commit = _cached_commit(repository, revision)
    if is_offline():
        snapshot, wanted = _in_cache(repository, commit, inside, kind, asked, "HF_HUB_OFFLINE forbids the network")
    elif commit == revision and (kept := _whole_in_cache(repository, commit, inside, kind, asked)):
        snapshot, wanted = kept  # a commit never changes
    else:
        snapshot, wanted = _fetch(repository, revision, inside, kind, asked)

    digests = {each: _verified(snapshot / each, asked) for each in wanted}
    pinned = f"{HUB}{repository}{'/' * bool(inside)}{inside}@{snapshot.name}"
    usual = PurePosixPath(wanted[0]).name in WEIGHT_FILES and inside not in wanted
    path = snapshot / inside if kind == "model" and usual else snapshot / wanted[0]
    return Located(path, pinned, digests)


def _fetch(repository: str, revision: str, inside: str, kind: Kind, asked: str) -> tuple[Path, list[str]]:
    """The snapshot with the wanted files in it, the weights first. Where the Hub is out of reach, the cache's, said."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(repository, revision=revision, timeout=SECONDS)
    except Exception as error:  # the network library's errors are not the Hub's, and change with its versions
        if reason := out_of_reach(error):
            found = _in_cache(repository, _cached_commit(repository, revision), inside, kind, asked, reason)
            print(f"warning: {asked}: {reason}; the copy in the cache is taken, commit {found[0].name}", flush=True)
            return found
        _refuse(error, repository, revision, asked)

    wanted = _wanted([each.rfilename for each in info.siblings or ()], inside, kind, asked)
    commit = str(info.sha)
    known = _cached_commit(repository, revision) == commit
    try:  # weights last: where they are, all is; the first by the revision's own name, which the cache then knows without a network
        last, *others = reversed(wanted)
        path = Path(hf_hub_download(repository, last, revision=commit if known else revision))
        snapshot = path.parents[len(PurePosixPath(last).parts) - 1]
        for each in others:
            hf_hub_download(repository, each, revision=snapshot.name)
    except Exception as error:
        _refuse(error, repository, revision, asked)
    return snapshot, wanted


def _wanted(present: Iterable[str], inside: str, kind: Kind, asked: str) -> list[str]:
    """The weights among a repository's files, in the safer form where there are two, and the settings and vocabulary beside them."""
    present = sorted(present)
    if inside in present:
        weights, folder = [inside], inside.rpartition("/")[0]
    else:
        folder = inside
        here = [name for name in present if name.rpartition("/")[0] == folder]
        if not here:
            near = difflib.get_close_matches(inside, present, n=1, cutoff=0.4)
            raise UsageError(f"{asked}: the repository has no {inside or 'files'}" + (f"; did you mean {near[0]}?" if near else ""))
        weights = _weights_in(here, kind, asked)
    beside = [name for name in present if name.rpartition("/")[0] == folder and name.endswith(_BESIDE) and name not in weights]
    return [*weights, *beside]


def _weights_in(here: Sequence[str], kind: Kind, asked: str) -> list[str]:
    """The one weights file of a folder, or its index and shards."""
    by_name = {name.rpartition("/")[2]: name for name in here}
    first = next((by_name[name] for name in WEIGHT_FILES if name in by_name), None)
    if first is not None and not first.endswith(".index.json"):
        return [first]
    if first is not None and kind == "model":
        stem, suffix = first.removesuffix(".index.json").rsplit(".", 1)
        return [first, *(name for name in here if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+\.{suffix}", name))]
    for suffix in (".safetensors", *WEIGHT_SUFFIXES):
        alike = [name for name in here if name.endswith(suffix)]
        if len(alike) == 1:
            return alike
        if alike:
            raise UsageError(f"{asked}: the repository has {len(alike)} files {suffix}, first {alike[0]}; name one: {HUB_FORM}")
    raise UsageError(f"{asked}: the repository has no weights there (none of {', '.join(WEIGHT_FILES[::2])})")


def _repository_folder(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def _cached_commit(repository: str, revision: str) -> str | None:
    """The commit that the cache knows a revision as."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    kept = _repository_folder(repository) / "refs" / revision
    return kept.read_text(encoding="utf-8").strip() if kept.is_file() else None


def _whole_in_cache(repository: str, commit: str | None, inside: str, kind: Kind, asked: str) -> tuple[Path, list[str]] | None:
    """The snapshot of a commit where its weights are there."""
    snapshot = _repository_folder(repository) / "snapshots" / str(commit)
    present = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()] if snapshot.is_dir() else []
    try:
        return snapshot, _complete(snapshot, _wanted(present, inside, kind, asked))
    except UsageError:
        return None


def _complete(snapshot: Path, wanted: list[str]) -> list[str]:
    """``wanted``, where all shards that their index names are there; ``UsageError`` where not."""
    if wanted[0].endswith(".index.json"):
        index = read_json(snapshot / wanted[0])
        places = index.get("weight_map") if isinstance(index, dict) else None
        folder = PurePosixPath(wanted[0]).parent
        missing = {str(folder / str(place)) for place in (places or {}).values()} - set(wanted)
        if missing:
            raise UsageError(f"{min(missing)} is missing")
    return wanted


def _in_cache(repository: str, commit: str | None, inside: str, kind: Kind, asked: str, reason: str) -> tuple[Path, list[str]]:
    found = _whole_in_cache(repository, commit, inside, kind, asked) if commit else None
    if found is None:
        raise UsageError(f"{asked} is not whole in the cache, and {reason}: {_by_hand(repository, inside, kind)}")
    return found


def _by_hand(repository: str, inside: str, kind: Kind) -> str:
    """What to download where there is no network for the Hub's client."""
    from huggingface_hub import constants

    if inside:
        place = "put it on this machine and give its path" + " (a model's config.json and vocab.txt beside it)" * (kind == "model")
        return f"download {constants.ENDPOINT}/{repository}/resolve/main/{inside} by hand, {place} instead of the name"
    return f"download the files of {constants.ENDPOINT}/{repository}/tree/main by hand into a folder and give its path instead of the name"


def _verified(path: Path, asked: str) -> str:
    """SHA-256 of a cached file; ``DamagedError``, and the file gone, where it is not what the Hub states: the blob's name says it.

    Large files are named by their SHA-256, small ones by git's SHA-1 of them.
    """
    digest, blob = sha256_of(path), path.resolve()
    stated = blob.name if path.is_symlink() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) else None
    found = digest if stated is None or len(stated) == 64 else _git_digest(blob)
    if stated is not None and found != stated:
        path.unlink()
        blob.unlink()
        raise DamagedError(f"{asked}: {path.name} has the digest {found[:16]}, the Hub states {stated[:16]}; it was removed: run again")
    return digest


def _git_digest(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def status_of(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def out_of_reach(error: Exception) -> str:
    """Why nothing could be asked; empty where the Hub answered."""
    status = status_of(error)
    if status is not None:
        return f"the Hub answers {status}" if status >= 500 or status == 429 else ""
    return "" if isinstance(error, MegainterError | AssertionError) else f"the Hub cannot be reached ({_short(error)})"


def _refuse(error: Exception, repository: str, revision: str, asked: str) -> NoReturn:
    """The Hub's errors in one line."""
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    status = status_of(error)
    if is_full(error):
        raise NoSpaceError(f"{asked}: no space left in {_repository_folder(repository)}; free space and run the same command") from None
    if isinstance(error, GatedRepoError):
        raise UsageError(f"{asked}: {repository} is gated; accept its terms on the Hub and give a token (HF_TOKEN)") from None
    if isinstance(error, RevisionNotFoundError):
        raise UsageError(f"{asked}: {repository} has no revision {revision}") from None
    if status in (401, 403, 404):
        how = "or is private: give a token that may read it (HF_TOKEN)"
        raise UsageError(f"{asked}: there is no repository {repository} on the Hub, {how}") from None
    if "onsistency check" in str(error):
        raise DamagedError(f"{asked}: a file is not as large as the Hub states ({_short(error)}); run again") from None
    raise UsageError(f"{asked} cannot be fetched ({_short(error)}); the same command goes on with what is there") from None


def _short(error: object) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0].strip() if lines else type(error).__name__)[:160]
