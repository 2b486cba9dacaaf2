"""A TensorFlow.js graph model run node by node in NumPy: what `preprocessing.detector.nanodet` must give, without its code or PyTorch's."""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Arrays = list[np.ndarray]


def run_graph(path: Path, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs "Identity", "Identity_1", ... of the graph for its one input, float32 [1, 3, 416, 416]."""
    document = json.loads(path.read_text())
    values: dict[str, Arrays] = {name: [value] for name, value in _constants(path, document).items()}
    nodes = {node["name"]: node for node in document["modelTopology"]["node"]}

    def value_of(reference: str) -> np.ndarray:
        name, _, number = reference.partition(":")
        if name not in values:
            node = nodes[name]
            if node["op"] == "Placeholder":
                values[name] = [pixels]
            else:
                result = OPERATIONS[node["op"]](node.get("attr", {}), [value_of(entry) for entry in node["input"]])
                values[name] = result if isinstance(result, list) else [result]
        return values[name][int(number or 0)]

    return {name: value_of(name) for name, node in nodes.items() if node["op"] == "Identity"}


def _constants(path: Path, document: dict[str, Any]) -> dict[str, np.ndarray]:
    values, (group,) = {}, document["weightsManifest"]
    with open(path.parent / group["paths"][0], "rb") as file:
        for entry in group["weights"]:
            kind = np.dtype("<f2") if "quantization" in entry else np.dtype(entry["dtype"])
            count = int(np.prod(entry["shape"], dtype=np.int64))
            values[entry["name"]] = np.frombuffer(file.read(count * kind.itemsize), kind).reshape(entry["shape"]).astype(entry["dtype"])
        assert not file.read()
    return values


def _numbers(attributes: Mapping[str, Any], name: str) -> list[int]:
    return [int(value) for value in attributes[name]["list"]["i"]]


def _valid(attributes: Mapping[str, Any]) -> None:
    assert base64.b64decode(attributes["padding"]["s"]) == b"VALID"


def _convolution(attributes: Mapping[str, Any], inputs: Arrays) -> np.ndarray:
    """[S, H, W, I] with weights [h, w, I, O]."""
    _valid(attributes)
    assert _numbers(attributes, "dilations") == [1, 1, 1, 1]
    (image, weight), (_, down, right, _) = inputs, _numbers(attributes, "strides")
    windows = sliding_window_view(image, weight.shape[:2], axis=(1, 2))[:, ::down, ::right]  # [S, H, W, I, h, w]
    return np.tensordot(windows, weight.transpose(2, 0, 1, 3), axes=3).astype(np.float32)


def _largest(attributes: Mapping[str, Any], inputs: Arrays) -> np.ndarray:
    _valid(attributes)
    (_, height, width, _), (_, down, right, _) = _numbers(attributes, "ksize"), _numbers(attributes, "strides")
    return sliding_window_view(inputs[0], (height, width), axis=(1, 2))[:, ::down, ::right].max(axis=(4, 5))


def _resized(attributes: Mapping[str, Any], inputs: Arrays) -> np.ndarray:
    """Bilinear, places at their centres."""
    assert attributes["half_pixel_centers"]["b"]
    assert not attributes["align_corners"]["b"]
    image = inputs[0]
    for axis, wanted in ((1, inputs[1][0]), (2, inputs[1][1])):
        places = np.clip((np.arange(wanted) + 0.5) * image.shape[axis] / wanted - 0.5, 0, image.shape[axis] - 1)
        low = np.floor(places).astype(int)
        share = (places - low).reshape([-1 if each == axis else 1 for each in range(4)])
        high = np.minimum(low + 1, image.shape[axis] - 1)
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image.astype(np.float32)


def _scattered(attributes: Mapping[str, Any], inputs: Arrays) -> np.ndarray:
    places, shape, _, rest = inputs
    assert places.size == 0
    return np.full(shape, rest)


OPERATIONS: dict[str, Callable[[Mapping[str, Any], Arrays], Any]] = {
    "Add": lambda attributes, inputs: inputs[0] + inputs[1],
    "AddV2": lambda attributes, inputs: inputs[0] + inputs[1],
    "ConcatV2": lambda attributes, inputs: np.concatenate(inputs[:-1], axis=int(inputs[-1])),
    "Conv2D": _convolution,
    "Identity": lambda attributes, inputs: inputs[0],
    "LeakyRelu": lambda attributes, inputs: np.where(inputs[0] > 0, inputs[0], inputs[0] * np.float32(attributes["alpha"]["f"])),
    "MaxPool": _largest,
    "Pad": lambda attributes, inputs: np.pad(inputs[0], inputs[1]),
    "PadV2": lambda attributes, inputs: np.pad(inputs[0], inputs[1], constant_values=inputs[2]),
    "Reshape": lambda attributes, inputs: inputs[0].reshape(inputs[1]),
    "ResizeBilinear": _resized,
    "Sigmoid": lambda attributes, inputs: 1 / (1 + np.exp(-inputs[0])),
    "SparseToDense": _scattered,
    "SplitV": lambda attributes, inputs: np.split(inputs[0], np.cumsum(inputs[1])[:-1], axis=int(inputs[2])),
    "Transpose": lambda attributes, inputs: inputs[0].transpose(inputs[1]),
}
