"""The model card (README.md) of a folder: what is known of the model, for people and for the Hub. What is not known is left out."""

import difflib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import megainter
from megainter.conversion.evaluations import plain, read_evaluations, results, section, table
from megainter.errors import UsageError, one_line
from megainter.files import README, read_json, write_atomically
from megainter.model.remote_code import AUTO_CLASSES
from megainter.weights import HUB, origin_name

PAPER = "2003.13198"
# What a pipeline of the Hub would do with it; other heads may be made for anything.
_PIPELINES = {
    "InterBertForPreTraining": "feature-extraction",
    "InterBertForRetrieval": "feature-extraction",
    "InterBertForMultipleChoice": "visual-question-answering",
}
_SCORING = ("InterBertForPreTraining", "InterBertForRetrieval")  # have the head that scores pairs
_SETTINGS = {"training": ("steps", "epochs", "global_batch", "seed"), "optimizer": ("name", "learning_rate"), "engine": ("precision",)}
_CURVES = re.compile(r"(\w+_)?loss|(\w+_)?accuracy|(\w+_)?r_at_\d+")
# Names that the Hub knows (huggingface.co/docs/hub/repositories-licenses); any other one is "other" there.
LICENSES = frozenset([
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda",
    "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
    "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0",
    "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc",
    "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license",
    "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "unknown",
    "other",
])  # fmt: skip
_PACKAGES = ("megainter", "torch", "deepspeed")


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What only the user knows of a model, for its card."""

    license: str | None = None
    """License of the weights, by its name on the Hub (apache-2.0, cc-by-nc-4.0, other)."""
    dataset: tuple[str, ...] = ()
    """Data set it was trained on, by its name on the Hub; may be given several times."""
    language: tuple[str, ...] = ()
    """Language of its texts, in two or three letters (en, zh); may be given several times."""
    base_model: str | None = None
    """Model it started from, OWNER/NAME. Default: where the weights came by name, that repository."""
    evaluation: tuple[Path, ...] = ()
    """Report of `megainter evaluate` on these weights, whose figures the card then has; may be given several times."""

    def __post_init__(self) -> None:
        if self.license is not None and self.license not in LICENSES:
            near = difflib.get_close_matches(self.license.lower(), LICENSES, n=1)
            hint = f"did you mean {near[0]}?" if near else "give its name on the Hub, such as apache-2.0 or cc-by-nc-4.0, or other"
            raise UsageError(f"--license {self.license!r:.80}: {hint}")
        for language in self.language:
            if not re.fullmatch(r"[a-z]{2,3}|multilingual", language):
                raise UsageError(f"--language {language!r:.80}: give two or three letters, such as en or zh, or multilingual")
        for option, name in (("--base-model", self.base_model), *(("--dataset", name) for name in self.dataset)):
            if name is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", name, flags=re.ASCII):
                raise UsageError(f"{option} {name!r:.80}: give a name of the Hub, OWNER/NAME")


@dataclass(frozen=True)
class TrainedBy:
    """The run that weights come from, and the step they were saved at."""

    run: Path
    step: int


@dataclass(frozen=True)
class Card:
    """What a card is made of besides the model: what the user says, the command, and where the weights come from.

    ``name`` is that of weights that came by name; ``earlier`` the folder they come from, whose card goes on, and ``changed`` whether these
    weights are others than those; ``trained`` their run.
    """

    options: CardOptions = field(default_factory=CardOptions)
    command: str | None = None
    name: str | None = None
    earlier: Path | None = None
    changed: bool = False
    trained: TrainedBy | None = None


@dataclass(frozen=True)
class Use:
    """How a folder is used, as its card says it, and the library that reads it, by its name on the Hub."""

    text: str
    library: str = "transformers"


NO_CARD = Card()  # nothing is said: the card tells of the model alone


def command_of(words: Sequence[str]) -> str:
    """The command line of ``sys.argv`` as a user types it."""
    return shlex.join(["megainter", *words[1:]])


def write_card(folder: Path, title: str, config: Any, parameters: int, dtype: str, card: Card, use: Use | None = None) -> None:
    """Write README.md into a folder that has its weights already: front matter as the Hub reads it, and what is known in words.

    ``use``: where it is not that of a folder for transformers.

    Of the earlier folder's card the front matter goes on (without figures of evaluation, which are those of its weights), and so do
    sections that are not made here. ``UsageError`` for an evaluation of another model, or a file that is none.
    """
    use = use or Use(_use(config))
    reports = read_evaluations(card.options.evaluation, folder, card.earlier, card.changed)
    metadata, opening, sections = _earlier(card.earlier)
    made = {
        "Model": _model(config, parameters, dtype),
        "Use": use.text,
        "Training": _training(card.trained) if card.trained else None,
        "Evaluation": section(reports) if reports else None,
        "How it was made": _how(card),
    }
    kept = {name: text for name, text in sections.items() if name not in made or (name == "Training" and made[name] is None)}
    whole = kept | {name: text for name, text in made.items() if text is not None}
    order = [*(name for name in made if name in whole), *(name for name in whole if name not in made)]
    body = _opening(title, opening, card.earlier.name if card.earlier is not None else None)
    heading = body.partition("\n")[0]
    name = heading.removeprefix("# ").strip() if heading.startswith("# ") else title
    text = "\n".join([body.rstrip() + "\n", *(f"## {name}\n\n{whole[name].strip()}\n" for name in order)])
    write_atomically(folder / README, f"---\n{_front_matter(metadata, name, config, card, reports, use.library)}\n---\n\n{text}")


def _front_matter(metadata: dict[str, Any], title: str, config: Any, card: Card, reports: Sequence[Mapping[str, Any]], library: str) -> str:
    from huggingface_hub import ModelCardData

    options = card.options
    architecture = (config.architectures or [""])[0]
    known = {
        "license": options.license,
        "datasets": list(options.dataset) or None,
        "language": list(options.language) or None,
        "base_model": options.base_model or _base_model(card),
        "library_name": library,
        "pipeline_tag": metadata.get("pipeline_tag") or _PIPELINES.get(architecture),
        "tags": list(dict.fromkeys([*_listed(metadata.get("tags")), "interbert"])),
    }
    merged = metadata | {name: value for name, value in known.items() if value is not None}
    found = [result for report in reports for result in results(report)]
    if found:
        merged |= {"eval_results": found, "model_name": title}
    return ModelCardData(**merged).to_yaml().strip()


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def _base_model(card: Card) -> str | None:
    """OWNER/NAME of the repository that the weights, or those their run started from, came from by name."""
    places = [card.name, origin_name(card.trained.run) if card.trained else None, origin_name(card.earlier) if card.earlier else None]
    name = next((place for place in places if place is not None and place.startswith(HUB)), None)
    return "/".join(name.removeprefix(HUB).partition("@")[0].split("/")[:2]) if name else None


def _earlier(folder: Path | None) -> tuple[dict[str, Any], str, dict[str, str]]:
    """An earlier card's front matter without figures, its text before the first section, and its sections by their titles."""
    if folder is None or not (folder / README).is_file():
        return {}, "", {}
    from huggingface_hub.repocard import metadata_load

    try:
        text = (folder / README).read_text(encoding="utf-8")
        metadata = metadata_load(folder / README) or {}
    except Exception as error:  # YAML's errors are another library's
        raise UsageError(f"{folder / README} cannot be read as a model card ({one_line(str(error)):.160}); mend it or remove it") from None
    body = re.sub(r"\A\s*---\r?\n.*?\r?\n---\r?\n", "", text, flags=re.DOTALL)
    opening, *parts = re.split(r"^## (.+)$", body, flags=re.MULTILINE)
    sections = {title.strip(): content.strip() for title, content in zip(parts[::2], parts[1::2], strict=True)}
    if metadata.get("pipeline_tag") in _PIPELINES.values():
        del metadata["pipeline_tag"]  # as written here; the head may be another now
    return {name: value for name, value in metadata.items() if name != "model-index"}, opening.strip(), sections


# --- sections -------------------------------------------------------------------------------------------------------------------------


def _opening(title: str, earlier: str, before: str | None) -> str:
    """The title and what stands before the first section: as it was, under the new title where the old one was the folder's name."""
    words = f"An InterBERT ([arXiv:{PAPER}](https://arxiv.org/abs/{PAPER})): a BERT over the words of a text and the regions of an image."
    heading, _, rest = earlier.partition("\n")
    if not earlier:
        return f"# {plain(title)}\n\n{words}"
    return f"# {plain(title)}\n{rest}" if before is not None and heading == f"# {plain(before)}" else earlier


def _model(config: Any, parameters: int, dtype: str) -> str:
    layers = f"{config.num_interaction_layers} interaction, {config.num_text_layers} text and {config.num_region_layers} region layers"
    lines = [
        f"{parameters:,} parameters ({dtype}): {layers}, {config.hidden_size} wide, {config.vocab_size:,} vocabulary entries.",
        f"It takes regions' features of {config.region_feature_size} values and their boxes{_whose(config)}",
    ]
    if config.itc_size:
        lines.append(f"A text alone and an image alone become vectors of {config.itc_size} values.")
    if config.itm_similarity:
        lines.append("Matching also weighs how near such vectors are once text and image have seen each other.")
    if config.itm_vectors:
        lines.append("Matching also weighs how near the vectors of text and image alone are.")
    return "\n".join(lines)


def _whose(config: Any) -> str:
    if not config.detector:
        return "."
    return f", from the detector {f'`{plain(config.detector_name)}` ' if config.detector_name else ''}(`{plain(config.detector)}`)."


def _use(config: Any) -> str:
    """How the folder is loaded, and where it scores pairs how it is called."""
    architecture = (config.architectures or [""])[0]
    other = next((auto for auto, name in AUTO_CLASSES.items() if name == architecture and architecture not in _SCORING), None)
    auto = other or "AutoModelForNextSentencePrediction"
    call = [
        "",
        "# One entry for each pair: a text, and what a detector found in its image (here nothing).",
        'texts, sizes = ["two dogs on a beach"], [(640, 480)]  # width and height in pixels',
        "boxes = [torch.tensor([[0.0, 0.0, 640.0, 480.0]])]  # a row for each region: x1, y1, x2, y2 in pixels",
        f"features = [torch.zeros(1, {config.region_feature_size})]",
        "inputs = processor(text=texts, region_features=features, boxes=boxes, image_sizes=sizes)",
        "with torch.no_grad():",
        "    scores = model(**inputs).scores  # the probability that text and image match",
    ]
    vectors = ["    vectors = model.encode_texts(**processor(text=texts))  # of length 1; encode_images has those of images"]
    lines = [
        "With transformers alone, by the code in this folder:",
        "",
        "```python",
        *([] if other else ["import torch"]),
        f"from transformers import {auto}, AutoProcessor",
        "",
        'folder = "."  # this folder, or OWNER/NAME on the Hub',
        "processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)",
        f"model = {auto}.from_pretrained(folder, trust_remote_code=True).eval()",
        *([] if other else call),
        *(vectors if config.itc_size and not other else []),
        "```",
        "",
        f"With megainter: `{architecture if other else 'InterBertForRetrieval'}.from_pretrained(folder)`.",
    ]
    return "\n".join(lines)


def _training(trained: TrainedBy) -> str | None:
    """The run's settings and the last figures of its curves up to the step that was saved."""
    settings = _object(trained.run / "config.json")
    stated = [
        (f"{part}.{name}", settings[part][name])
        for part, names in _SETTINGS.items()
        for name in names
        if isinstance(settings.get(part), dict) and settings[part].get(name) is not None
    ]
    lines = [f"Saved at step {trained.step:,}.", "", *table(("setting", "value"), stated)]
    for kind, record in _last_figures(trained).items():
        figures = [(name, f"{value:.6g}") for name, value in record.items() if _CURVES.fullmatch(name) and isinstance(value, int | float)]
        lines += ["", *table((f"{kind}, step {record['step']:,}", "last figure"), figures)]
    environment = _object(trained.run / "environment.json")
    packages = environment.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    told = [f"{name} {versions[name]}" for name in _PACKAGES if name in versions]
    command = environment.get("command")
    if isinstance(command, list) and command:
        lines += ["", "```sh", one_line(command_of([str(word) for word in command])), "```"]
    if told:
        lines += ["", f"With {', '.join(map(plain, told))}, Python {plain(str(environment.get('python', '')))}."]
    return "\n".join(lines)


def _last_figures(trained: TrainedBy) -> dict[str, dict[str, Any]]:
    """The last record of training and of validation that is not of a later step than what was saved."""
    path = trained.run / "metrics.jsonl"
    last: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a run that was killed leaves half a line
        if isinstance(record, dict) and record.get("kind") in ("train", "validation") and _within(record.get("step"), trained.step):
            last[record["kind"]] = record
    return last


def _within(step: Any, most: int) -> bool:
    return isinstance(step, int) and step <= most


def _how(card: Card) -> str:
    lines = [f"From the weights `{plain(card.name)}`.", ""] if card.name else []
    if card.command:
        lines += ["```sh", one_line(card.command), "```", ""]
    return "\n".join([*lines, f"With megainter {megainter.__version__}."])


def _object(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}
