"""`megainter prepare`: captions into a manifest."""

from pathlib import Path
from typing import Literal


def prepare(
    source: Literal["jsonl", "coco", "flickr30k"],
    src: Path,
    /,
    *,
    output: Path,
    images: Path | None = None,
    split: str | None = None,
    captions: str | None = None,
    max_bad: float = 0.01,
) -> None:
    """Turn captions into a pairs manifest (Parquet).

    Parameters
    ----------
    source
        Format of the captions.
    src
        The caption file.
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    images
        Folder of the images; captions whose image is missing there are dropped and counted.
    split
        Keep captions of this split, and give it to those whose source names none.
    captions
        Field that holds the captions, for JSON Lines with other names than "caption" or "captions".
    max_bad
        Share of unusable captions above which the command ends with exit code 3.
    """
    from preprocessing.captions import prepare as prepare_captions

    prepare_captions(source, src, output, images=images, split=split, captions=captions, max_bad=max_bad)
