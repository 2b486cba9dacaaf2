"""Between an image's pixels and its proposals, and between proposals and what the classifier sees in them, no host waits for its GPU.

The proposals themselves make it wait: how many are left after non-maximum suppression decides the shapes of all that follows.
"""

import pytest
import torch

from preprocessing.detector.network import BACKGROUND, Input
from preprocessing.detector.visual_genome import VgConfig, VgNetwork
from preprocessing.detector.visual_genome_regions import VgDetection
from tests.fake_gpu import GPU, fake_gpu

CONFIG = VgConfig((BACKGROUND, "cat", "dog"), ("red",), "caffe", blocks=(1, 1, 1, 1), width=8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.inference_mode()
def test_the_visual_genome_network_waits_for_nothing(dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        network = VgNetwork(CONFIG).eval()
    with fake_gpu():
        detection = VgDetection(CONFIG, network, GPU, dtype)
        inputs = [Input(torch.zeros(3, 64, width, device=GPU), (1.0, 1.0)) for width in (96, 80, 96)]
        maps = detection.maps(inputs)
        logits, deltas = network.rpn(maps[0])
        assert (logits.shape, deltas.shape) == ((1, 4 * 6 * 12), (1, 4 * 6 * 12, 4))
        for found in detection.read(maps, inputs, [torch.zeros(70, 4, device=GPU)] * 3):
            assert (found.features.shape, found.class_probs.device) == ((70, CONFIG.feature_size), GPU)
            attributes, confidences = detection.attributes(found)
            assert (len(attributes), len(confidences)) == (70, 70)
