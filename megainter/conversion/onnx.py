"""ONNX files of a model: what scores a pair, and where it has vectors the encoders of a text alone and of an image alone.

Exported from the plain model (`model.plain`), whose shapes depend on no value: batch, text length and number of regions are free.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megainter.conversion.card import NO_CARD, Card, Use, write_card
from megainter.conversion.folder import new_folder, source_of
from megainter.conversion.vocabulary import find_vocabulary, write_vocabulary
from megainter.errors import DamagedError, UsageError
from megainter.model import plain
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import MATCHED, InterBertForRetrieval
from megainter.model.remote_code import AUTO_CLASSES

TEXT = ("input_ids", "attention_mask", "token_type_ids")
IMAGE = ("region_features", "region_locations", "region_mask")
TOLERANCE = 1e-4  # of scores and vectors, against the model itself
_ONE_FILE = 1_500_000_000  # bytes of weights; a file of ONNX holds 2 GiB at most
_NEEDED = ("onnx", "onnxscript")


class PairScorer(nn.Module):
    """Log-odds that text and image match, [B]: what `InterBertForRetrieval.score` gives."""

    names, output = (*TEXT, *IMAGE), "log_odds"

    def __init__(self, model: plain.InterBertForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        region_features: torch.Tensor,
        region_locations: torch.Tensor,
        region_mask: torch.Tensor,
    ) -> torch.Tensor:
        logits_B2 = self.model(input_ids, attention_mask, token_type_ids, region_features, region_locations, region_mask).logits
        return logits_B2[:, MATCHED] - logits_B2[:, 1 - MATCHED]


class TextEncoder(nn.Module):
    """Vectors of texts, [B, D]."""

    names, output = TEXT, "vectors"

    def __init__(self, model: plain.InterBertForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        return self.model.encode_texts(input_ids, attention_mask, token_type_ids)


class ImageEncoder(nn.Module):
    """Vectors of images' regions, [B, D]."""

    names, output = IMAGE, "vectors"

    def __init__(self, model: plain.InterBertForRetrieval) -> None:
        super().__init__()
        self.model = model

    def forward(self, region_features: torch.Tensor, region_locations: torch.Tensor, region_mask: torch.Tensor) -> torch.Tensor:
        return self.model.encode_images(region_features, region_locations, region_mask)


PARTS: dict[str, type[PairScorer | TextEncoder | ImageEncoder]] = {
    "pair_scorer": PairScorer,
    "text_encoder": TextEncoder,
    "image_encoder": ImageEncoder,
}


@dataclass(frozen=True)
class Exported:
    """The files of a conversion, and by how much each differs from the model on a drawn batch (None: not compared)."""

    files: tuple[str, ...]
    differences: dict[str, float] | None


def convert_onnx(source: Path, destination: Path, *, verify: bool = False, card: Card = NO_CARD) -> Exported:
    """Write the folder ``destination``: ``pair_scorer.onnx``, with vectors ``text_encoder.onnx`` and ``image_encoder.onnx``, config.json,
    the vocabulary, and a card that goes on with the source's. fp32. ``verify`` runs each in onnxruntime beside the model, on a ragged
    batch.

    Raises ``UsageError`` where packages are missing or the model has no matching head, ``DamagedError`` where an outcome differs.
    """
    require_packages(verify)
    found = source_of(source)
    model = _load(found.path)
    config = model.config
    assert isinstance(config, InterBertConfig)
    parts = {name: kind(model).eval() for name, kind in PARTS.items() if kind is PairScorer or config.itc_size}
    with new_folder(destination) as partial:
        for name, part in parts.items():
            _export(part, config, partial / f"{name}.onnx")
        differences = {name: _compared(part, config, partial / f"{name}.onnx") for name, part in parts.items()} if verify else None
        _write_beside(partial, found.path, config)
        found.record(partial)
        told = replace(card, earlier=found.path, name=found.name if found.digests else None)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        write_card(partial, destination.name, config, parameters, "fp32", told, Use(_use(parts), "onnx"))
    for name in parts:
        compared = f", within {differences[name]:.1e} of the model" if differences is not None else ""
        print(f"{destination / name}.onnx: inputs {', '.join(PARTS[name].names)}; output {PARTS[name].output}{compared}")
    return Exported(tuple(f"{name}.onnx" for name in parts), differences)


def require_packages(verify: bool = False) -> None:
    """``UsageError`` naming what must be installed for an export."""
    wanted = (*_NEEDED, "onnxruntime") if verify else _NEEDED
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}: pip install 'megainter[onnx]', or pip install {' '.join(missing)}")


def _load(folder: Path) -> plain.InterBertForRetrieval:
    """The plain model with a folder's weights in fp32; ``UsageError`` where they have no matching head."""
    ours, report = InterBertForRetrieval.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"]:
        raise UsageError(f"{folder} has no {min(report['missing_keys'])}: it scores no pairs of text and image, which ONNX is made of")
    with torch.device("meta"):
        model = plain.InterBertForRetrieval(ours.config)
    model.load_state_dict(ours.state_dict(), assign=True)
    return model.eval()


def _batch(config: InterBertConfig, lengths: tuple[int, ...], regions: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A drawn padded batch of these numbers of tokens and regions."""
    draw = torch.Generator().manual_seed(0)
    rows, tokens, boxes = len(lengths), max(lengths), max(regions)
    return {
        "input_ids": torch.randint(config.vocab_size, (rows, tokens), generator=draw),
        "attention_mask": (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long(),
        "token_type_ids": torch.zeros(rows, tokens, dtype=torch.int64),
        "region_features": torch.randn(rows, boxes, config.region_feature_size, generator=draw),
        "region_locations": torch.rand(rows, boxes, 5, generator=draw),
        "region_mask": (torch.arange(boxes) < torch.tensor(regions)[:, None]).long(),
    }


def _export(part: Any, config: InterBertConfig, path: Path) -> None:
    """Write one file. Traced by itself first, where a length that became a constant is an error: the exporter alone would keep it."""
    axes = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens" if name in TEXT else "regions")} for name in part.names}
    given = _batch(config, (3, 5), (4, 2))
    size = sum(parameter.numel() * parameter.element_size() for parameter in part.parameters())
    with _quiet():
        program = torch.export.export(part, tuple(given[name] for name in part.names), dynamic_shapes=axes)
        torch.onnx.export(
            program,
            (),
            path,
            input_names=list(part.names),
            output_names=[part.output],
            dynamic_shapes=axes,
            dynamo=True,
            external_data=size > _ONE_FILE,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own log and its warnings of what it will call otherwise one day."""
    loggers = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)


def _compared(part: Any, config: InterBertConfig, path: Path) -> float:
    """The largest difference between onnxruntime's outcome and the model's on a ragged batch; ``DamagedError`` above the tolerance."""
    import onnxruntime

    most = min(config.max_position_embeddings, 7)
    given = _batch(config, (most, 2, 1), (1, 6, 3))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outcome,) = session.run(None, {name: given[name].numpy() for name in part.names})
    with torch.inference_mode():
        right = part(*(given[name] for name in part.names))
    worst = float((torch.from_numpy(outcome) - right).abs().max())
    if not worst <= TOLERANCE:
        raise DamagedError(f"{path.name} differs from the model by {worst:.1e}: nothing was written; please report it")
    return worst


def _use(parts: dict[str, PairScorer | TextEncoder | ImageEncoder]) -> str:
    """The files, and how the scorer of pairs is called."""
    rows = [(f"`{name}.onnx`", ", ".join(part.names), part.output) for name, part in parts.items()]
    lines = [
        *("| file | takes | gives |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)),
        "",
        "Batch, text length and number of regions are free; masks say what is padding.",
        "",
        "```python",
        "import onnxruntime",
        "from megainter import InterBertProcessor",
        "",
        "processor = InterBertProcessor.from_pretrained(folder)",
        'session = onnxruntime.InferenceSession(f"{folder}/pair_scorer.onnx")',
        "inputs = processor(text=texts, region_features=features, boxes=boxes, image_sizes=sizes)  # of each pair; boxes in pixels, xyxy",
        "(log_odds,) = session.run(None, {each.name: inputs[each.name].numpy() for each in session.get_inputs()})",
        "```",
    ]
    return "\n".join(lines)


def _write_beside(folder: Path, source: Path, config: InterBertConfig) -> None:
    """config.json, which says sizes and lengths, and the vocabulary."""
    files, _ = find_vocabulary(source, None)
    if files is not None:
        write_vocabulary(folder, files, config.max_position_embeddings)
    config.auto_map = {}
    config.architectures = [AUTO_CLASSES["AutoModelForNextSentencePrediction"]]
    config.save_pretrained(folder)
