"""What `megainter evaluate retrieval` is asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path

from megainter.precision import AskedPrecision


@dataclass(frozen=True, kw_only=True)
class RetrievalEvaluation:
    """What `megainter evaluate retrieval` is asked."""

    pairs: Path
    """Captions: what `megainter prepare` wrote."""
    store: Path
    """Feature store of the captions' images."""
    output: Path
    """JSON file for the scores."""
    split: str = "test"
    """Split of the manifest that makes the gallery."""
    images: int | None = None
    """Number of images in the gallery, the first ones; default all."""
    captions_per_image: int | None = None
    """Use at most so many captions of each image; default all."""
    max_regions: int | None = None
    """Regions per image; default as in training, which the model's config.json says (36 where it does not)."""
    max_text_tokens: int | None = None
    """Tokens per caption; default as in training, which the model's config.json says (36 where it does not)."""
    batch_pairs: int = 256
    """Caption-image pairs per forward."""
    processes: int | None = None
    """Processes that share the work; default one per GPU, or as many cores as the work is worth."""
    precision: AskedPrecision = "auto"
    """Arithmetic of the model; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA where there is one."""
    scores: Path | None = None
    """Also write the whole score matrix (Parquet, a row per caption) to this file; with --prefilter the scored pairs, a row each."""
    prefilter: int | None = None
    """For a large gallery: score only so many images of each caption and captions of each image, the nearest by vectors."""
    prefilter_model: Path | None = None
    """Folder that `megainter finetune prefilter` made; none: the model's own vectors, of pretraining with training.itc_weight."""
    other_detector: bool = False
    """Take regions of another detector than the model was trained on, which is refused otherwise."""
    max_bad: float = 0.01
    """Share of the split's images that may lack regions; one may in any case, unless this is 0. Not checked where --images is given."""
    folds: int | None = None
    """Also give the mean recalls of so many equal parts of the gallery: 5 for COCO's "1K" figures beside its "5K" ones."""
    replace: bool = False
    """Write over what is at --output, whatever that is. Without it a report on other weights stays, and exit code 2 says so."""
