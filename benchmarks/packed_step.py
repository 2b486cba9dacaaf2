"""``python -m benchmarks.packed_step``: a training step on packed tokens against the same step with padding, A B A B, medians.

The padded side is the model's own padded door with every row kept real (all-ones masks), as a trainer without packing computes it.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import date

import torch

from benchmarks.timing import machine, seconds_of
from megainter.data.packed import PackedInputs
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForPreTraining

ROUNDS = 7
SAMPLES, TEXT, REGIONS = 16, 36, 37


def main() -> None:
    """Measure and print one JSON object."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = torch.device(options.parse_args().device)
    torch.manual_seed(0)
    config = InterBertConfig(hidden_size=256, num_attention_heads=4, num_region_attention_heads=4, intermediate_size=1024, pooler_size=256,
                             num_interaction_layers=3, num_text_layers=3, num_region_layers=3)  # fmt: skip
    model = InterBertForPreTraining(config).train().to(device)  # type: ignore[call-arg]
    text = torch.randint(8, TEXT + 1, (SAMPLES,))
    regions = torch.randint(11, REGIONS + 1, (SAMPLES,))
    full = torch.full_like(text, TEXT), torch.full_like(regions, REGIONS)
    steps = {"packed": _step(model, text, regions), "padded": _step(model, *full)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(ROUNDS + 1):
        for name, step in steps.items():
            spent = seconds_of(step, device)
            if round_number:  # the first is warm-up
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    real = int(text.sum() + regions.sum())
    print(json.dumps({
        "date": date.today().isoformat(), "machine": machine(device), "torch": torch.__version__,
        "real_tokens": real, "padded_tokens": SAMPLES * (TEXT + REGIONS), "seconds": medians,
        "real_tokens_per_second": {name: real / value for name, value in medians.items()}, "speedup": medians["padded"] / medians["packed"],
    }, indent=2))  # fmt: skip


def _step(model: InterBertForPreTraining, text: torch.Tensor, regions: torch.Tensor) -> Callable[[], None]:
    """Forward and backward over a batch with these lengths, an eighth of the rows masked."""
    tokens, rows = int(text.sum()), int(regions.sum())
    inputs = PackedInputs(
        input_ids=torch.randint(100, 30000, (tokens,)),
        token_type_ids=torch.zeros(tokens, dtype=torch.int64),
        text_lengths=text,
        region_features=torch.rand(rows, 2048),
        region_locations=torch.rand(rows, 5),
        region_lengths=regions,
    ).to(model.device)
    masked_text, masked_regions = torch.arange(0, tokens, 8, device=model.device), torch.arange(1, rows, 8, device=model.device)

    def step() -> None:
        scores = model.score_packed(inputs, masked_text, masked_regions)
        sum(part.float().logsumexp(-1).mean() for part in scores).backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    main()
