"""Pairs of caption and image scored a second by the base model, in fp32 and bf16, and whether both order them alike."""

import torch

from benchmarks.gpu.part import Report, Setting, run_part
from benchmarks.retrieval import grid_way, packed_way, rows_of
from benchmarks.sizes import BASE, TOY
from benchmarks.timing import seconds_of
from megainter.model.configuration import InterBertConfig
from megainter.model.interbert import InterBertForRetrieval

IMAGES, CAPTIONS, ROUNDS = 8, (64, 256, 1024), 5
OFF, ROUNDED_OFF = 1e-4, 5e-2  # of the log-odds: the grid against pairs in fp32, bf16 against fp32


def check(setting: Setting, report: Report) -> None:
    """The grid, which computes nothing twice, against packed pairs: scores (log-odds) that agree, and pairs a second."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device(setting.device)
    model = InterBertForRetrieval(InterBertConfig(**(TOY if setting.toy else BASE))).eval().to(device)  # type: ignore[call-arg]
    images, captions = (2, (3,)) if setting.toy else (IMAGES, CAPTIONS)
    scores: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            torch.nn.Module.to(model, dtype=dtype)
            for count in captions:
                rows = rows_of(images, count, device)
                ways = {"grid": grid_way(model, rows), "packed pairs": packed_way(model, rows)}
                for way, score in ways.items() if count == captions[0] else (("grid", ways["grid"]),):
                    found = score().float()
                    seconds = min(seconds_of(score, device) for _ in range(1 if setting.toy else ROUNDS))
                    report.tell(**{f"{way}, {name}, {images * count} pairs, pairs/s": images * count / seconds})
                    report.row(
                        f"{way}, {name}, {images * count:,} pairs", f"{images * count / seconds:,.0f} pairs/s, {1000 * seconds:.1f} ms"
                    )
                    if count == captions[0]:
                        scores[f"{way}, {name}"] = found
    _agree(report, scores)


def _agree(report: Report, scores: dict[str, torch.Tensor]) -> None:
    right = scores["packed pairs, fp32"]
    spread = float(right.max() - right.min())
    for name, limit in (("grid, fp32", OFF), ("grid, bf16", ROUNDED_OFF)):
        off = float((scores[name] - right).abs().max())
        report.row(f"{name} against packed pairs, fp32", f"off by at most {off:.1e}; the scores of fresh weights lie within {spread:.1e}")
        if not off <= limit:
            report.tell(failures=[f"{name} is off by {off:.1e}, at most {limit:g} allowed"])


if __name__ == "__main__":
    run_part("scoring", check)
