"""What `megainter index`, `search` and `serve` are asked; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megainter.precision import AskedPrecision

Order = Literal["both", "second", "first"]


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """What `megainter index` is asked."""

    store: Path
    """Feature store of the images."""
    output: Path
    """Folder for the index."""
    pairs: Path | None = None
    """Captions of the images: what `megainter prepare` wrote; default none, and all images of the store are indexed."""
    prefilter_model: Path | None = None
    """Folder that `megainter finetune prefilter` made; default "prefilter" inside the model's folder, else the model's own vectors."""
    images: Path | None = None
    """Folder that the image files are in; it is noted, and read for pages and by `megainter serve`."""
    weights: Path | None = None
    """Weights of the store's detector, noted for searching by photos; known by themselves where the detector comes along."""
    split: str | None = None
    """Split of the manifest to index; default all."""
    other_detector: bool = False
    """Take regions of another detector than the model was trained on, which is refused otherwise."""
    max_bad: float = 0.01
    """Share of images that may lack regions, their captions left out; one may in any case, unless this is 0."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA where there is one."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What a search is asked, in the shell and on the page."""

    order: Order = "both"
    """What the best are ordered by: "second", the model that looks at caption and image together; "first", the vectors alone, which is
    fast; or the sum of both."""
    candidates: int = 100
    """How many of the nearest by their vectors the second stage looks at."""
    precision: AskedPrecision = "auto"
    """Arithmetic of the second stage; auto takes bf16 where the device computes it, else fp16 on a GPU, else fp32."""
    device: str = "auto"
    """Torch device; "auto" takes CUDA where there is one."""
    threads: int | None = None
    """Threads on a CPU; default all cores but one. Two on two busy cores take longer than one."""
    model: Path | None = None
    """The index's model, where it was moved; hf:OWNER/NAME[@REVISION] does as well."""
    prefilter_model: Path | None = None
    """Its first stage, where it was moved."""
    store: Path | None = None
    """Its feature store, where it was moved."""
    images: Path | None = None
    """Folder of the image files, where it was moved or the index does not say."""
    weights: Path | None = None
    """Weights of the store's detector, where they were moved or the index does not say."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where and to whom `megainter serve` answers."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for everyone who reaches this machine: there is no password."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    allow_host: tuple[str, ...] = ()
    """A name that browsers may call this server by, beside localhost and IP addresses; may be given several times."""
    title: str = "Search"
    """Heading of the page."""
