"""``python -m benchmarks.retrieval``: pairs scored per second by the grid, by the packed door, as the official evaluation does it, and by
the forward pass of training (with dropout, and all that the backward pass needs kept).

The official evaluation computes the heads of all three objectives for every pair; here that is the padded door of the pretraining
model (which packs, so the cost of padding itself is not counted). All three score the same 8 images with the same 32 captions, in turn;
medians.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import torch

from benchmarks.timing import machine, seconds_of
from megainter.data.packed import PackedInputs
from megainter.model.configuration import InterBertConfig
from megainter.model.grid import embed_captions, embed_images, score_grid
from megainter.model.interbert import MATCHED, InterBertForPreTraining, InterBertForRetrieval

ROUNDS = 5
IMAGES, CAPTIONS = 8, 32
REGIONS = 37  # at most, the global region included
AGREEMENT = 1e-4  # of the log-odds, in fp32


def main() -> None:
    """Measure and print one JSON object; fails where the three ways do not agree."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(options.parse_args().device)
    torch.manual_seed(0)
    config = InterBertConfig(hidden_size=256, num_attention_heads=4, num_region_attention_heads=4, intermediate_size=1024, pooler_size=256,
                             num_interaction_layers=2, num_text_layers=2, num_region_layers=2)  # fmt: skip
    everything = InterBertForPreTraining(config).eval()
    matching = InterBertForRetrieval(config).eval()
    matching.load_state_dict({name: everything.state_dict()[name] for name in matching.state_dict()})
    rows = rows_of(IMAGES, CAPTIONS, device)
    everything, matching = everything.to(device), matching.to(device)  # type: ignore[call-arg]
    ways = {"grid": grid_way(matching, rows), "packed": packed_way(matching, rows), "all heads": _padded(everything, rows)}
    seconds = _measure(ways, _training_forward(copy.deepcopy(matching).train(), rows), device)
    speeds = {name: IMAGES * CAPTIONS / value for name, value in seconds.items()}
    tokens = IMAGES * int(rows.text.sum()) + CAPTIONS * int(rows.regions.sum())
    print(json.dumps({
        "date": date.today().isoformat(), "machine": machine(device), "torch": torch.__version__,
        "pairs_per_second": speeds, "real_tokens_per_second": {name: tokens / value for name, value in seconds.items()},
        "speedup": {name: speeds["grid"] / speed for name, speed in speeds.items()},
    }, indent=2))  # fmt: skip


def _measure(ways: dict[str, Callable[[], torch.Tensor]], training: Callable[[], torch.Tensor], device: torch.device) -> dict[str, float]:
    """Median seconds of each way and of the training forward; the first round is warm-up and checks that all ways give the same scores."""
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, "training forward")}
    with torch.inference_mode():
        first = [way() for way in ways.values()]
    for scores in first[1:]:
        torch.testing.assert_close(scores, first[0], atol=AGREEMENT, rtol=AGREEMENT)
    training()
    for _ in range(ROUNDS):
        with torch.inference_mode():
            for name, way in ways.items():
                seconds[name].append(seconds_of(way, device))
        seconds["training forward"].append(seconds_of(training, device))
    return {name: statistics.median(values) for name, values in seconds.items()}


class Rows(NamedTuple):
    """Captions and images end to end: ``ids`` int64 [Nt] of captions of ``text`` [C] tokens; ``features`` [Nr, F] and ``locations`` [Nr, 5]
    of images of ``regions`` [I] rows."""

    ids: torch.Tensor
    text: torch.Tensor
    features: torch.Tensor
    locations: torch.Tensor
    regions: torch.Tensor

    def every_pair(self) -> PackedInputs:
        """Every pair as a packed sample, all captions of the first image first."""
        images, captions = len(self.regions), len(self.text)
        features, locations = (
            torch.cat([rows for rows in x.split(self.regions.tolist()) for _ in range(captions)]) for x in (self.features, self.locations)
        )
        ids = self.ids.repeat(images)
        return PackedInputs(
            input_ids=ids,
            token_type_ids=torch.zeros_like(ids),
            text_lengths=self.text.repeat(images),
            region_features=features,
            region_locations=locations,
            region_lengths=self.regions.repeat_interleave(captions),
        )


def rows_of(images: int, captions: int, device: torch.device) -> Rows:
    """Drawn captions and images on the device, their lengths on the CPU."""
    text, regions = torch.randint(10, 19, (captions,)), torch.randint(11, REGIONS + 1, (images,))
    ids, features, locations = (
        torch.randint(100, 30000, (int(text.sum()),)),
        torch.rand(int(regions.sum()), 2048),
        torch.rand(int(regions.sum()), 5),
    )
    return Rows(ids.to(device), text, features.to(device), locations.to(device), regions)


def grid_way(model: InterBertForRetrieval, rows: Rows) -> Callable[[], torch.Tensor]:
    """Scores [I, C] by the grid."""
    images = rows.features, rows.locations, rows.regions
    return lambda: score_grid(model, embed_captions(model, rows.ids, rows.text), embed_images(model, *images))


def packed_way(model: InterBertForRetrieval, rows: Rows) -> Callable[[], torch.Tensor]:
    """Scores [I, C], every pair for itself."""
    inputs, shape = rows.every_pair(), (len(rows.regions), len(rows.text))
    return lambda: model.score_packed(inputs).view(shape)


def _training_forward(model: InterBertForRetrieval, rows: Rows) -> Callable[[], torch.Tensor]:
    inputs = rows.every_pair()
    return lambda: model.logits_packed(inputs)


def _padded(model: InterBertForPreTraining, rows: Rows) -> Callable[[], torch.Tensor]:
    """Every pair padded; padding is zeros that attention is masked from, and is dropped before the layers (the model packs)."""
    ids, text, features, locations, regions = rows
    padded_ids = torch.nn.utils.rnn.pad_sequence(list(ids.split(text.tolist())), batch_first=True)
    boxes = [torch.nn.utils.rnn.pad_sequence(list(x.split(regions.tolist())), batch_first=True) for x in (features, locations)]
    text_mask = torch.arange(padded_ids.shape[1]) < text[:, None]
    region_mask = torch.arange(boxes[0].shape[1]) < regions[:, None]
    text_mask, region_mask = text_mask.to(ids.device), region_mask.to(ids.device)

    def score() -> torch.Tensor:
        logits = model(
            input_ids=padded_ids.repeat(IMAGES, 1),
            attention_mask=text_mask.repeat(IMAGES, 1),
            region_features=boxes[0].repeat_interleave(CAPTIONS, 0),
            region_locations=boxes[1].repeat_interleave(CAPTIONS, 0),
            region_mask=region_mask.repeat_interleave(CAPTIONS, 0),
        ).itm_logits
        return (logits[:, MATCHED] - logits[:, 1 - MATCHED]).view(IMAGES, CAPTIONS)

    return score


if __name__ == "__main__":
    main()
