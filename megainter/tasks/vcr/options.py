"""What `megainter evaluate vcr` is asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megainter.precision import AskedPrecision


@dataclass(frozen=True, kw_only=True)
class VcrEvaluation:
    """What `megainter evaluate vcr` is asked."""

    questions: Path
    """Questions: what `megainter prepare vcr` wrote."""
    store: Path
    """Feature store of the detector's boxes."""
    output: Path
    """JSON file for the accuracies; the probabilities of every question go beside it."""
    objects_store: Path | None = None
    """Feature store of the annotated boxes, for a model that was trained with one."""
    mode: Literal["both", "answer", "rationale"] = "both"
    """What is asked: answers, rationales, or both."""
    split: str | None = None
    """Questions of this split alone; default all of the file."""
    other_detector: bool = False
    """Take regions of another detector than the model was trained on, which is refused otherwise."""
    max_bad: float = 0.01
    """Share of images that may lack regions, their questions left out; one may in any case, unless this is 0."""
    batch_questions: int = 16
    """Choices to make per forward: each is four texts with an image."""
    processes: int | None = None
    """Processes that share the work; default one per GPU, or as many cores as the work is worth."""
    precision: AskedPrecision = "auto"
    """Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA where there is one."""
    submission: Path | None = None
    """Also write the CSV that VCR's leaderboard takes."""
    replace: bool = False
    """Write over what is at --output, whatever that is. Without it a report on other weights stays, and exit code 2 says so."""
