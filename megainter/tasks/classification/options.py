"""What `megainter evaluate classification` is asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path

from megainter.precision import AskedPrecision


@dataclass(frozen=True, kw_only=True)
class ClassificationEvaluation:
    """What `megainter evaluate classification` is asked."""

    examples: Path
    """Labelled examples: what `megainter prepare examples` wrote."""
    output: Path
    """JSON file for the figures; the predictions go beside it."""
    store: Path | None = None
    """Feature store of the images, for examples that have some."""
    split: str | None = "val"
    """Examples of this split."""
    max_text_tokens: int | None = None
    """Tokens of a text or pair of texts; default as in training."""
    max_regions: int | None = None
    """Regions per image; default as in training."""
    other_detector: bool = False
    """Take regions of another detector than the model was trained on, which is refused otherwise."""
    max_bad: float = 0.01
    """Share of images that may lack regions, their examples left out; one may in any case, unless this is 0."""
    batch: int = 64
    """Examples per forward."""
    processes: int | None = None
    """Processes that share the work; default one per GPU, or as many cores as the work is worth."""
    precision: AskedPrecision = "auto"
    """Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA where there is one."""
    submission: Path | None = None
    """Also write the file that the task's benchmark takes: vqa (JSON), nlvr2 (CSV), GLUE (TSV)."""
    replace: bool = False
    """Write over what is at --output, whatever that is. Without it a report on other weights stays, and exit code 2 says so."""
