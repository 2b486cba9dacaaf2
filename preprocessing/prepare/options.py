"""What `megainter prepare` is asked about captions; light, since the command line reads it for its help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@dataclass(frozen=True, kw_only=True)
class PairsOptions:
    """The table that is made of captions, whatever form these have."""

    output: Path
    """Parquet file to write; what was dropped and why goes to OUTPUT.report.json."""
    images: Path | None = None
    """Folder of the images; captions whose image is missing there are dropped and counted. Images that stand in a Parquet file themselves
    are written there."""
    split: str | None = None
    """Keep captions of this split, and give it to those whose source names none."""
    val_share: float = 0.0
    """Share of the images for validation, drawn by a hash of the image's id, where the source names no splits; the rest is for
    training."""
    test_share: float = 0.0
    """Share of the images that becomes the split test, drawn as --val-share is."""
    seed: int = 0
    """Random seed of the draw by --val-share and --test-share."""
    ids: str | None = None
    """How an image's id is made of the usual one (its path without suffix): parts {id}, {stem} (its last part), {folder} and {number} (of
    COCO_val2014_000000391895: 391895), as in "{number}"."""
    store: Path | None = None
    """Feature store whose ids the images are to have; forms of a name that it may use are tried: without folder, without suffix, COCO's
    number."""
    only_stored: bool = False
    """Leave out captions whose image is not in --store. Without it they stay, and pretraining takes up to --data.max_bad of such images."""
    max_bad: float = 0.01
    """Share of unusable captions above which the command ends with exit code 3; one line may be bad in any case, unless this is 0."""
    similar_names: bool = False
    """Take the one image whose name differs from the path in upper and lower case, backslashes or Unicode form alone."""
    replace: bool = False
    """Put the new table in the place of another that is at --output. Without it a table that differs stays, and exit code 2 says so."""


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Names of a table's columns, or of the fields of JSON Lines."""

    captions: Annotated[str | None, Parameter(name=["--captions", "--caption-field"])] = None
    """Field or column that holds the captions, where it is not "captions", "caption", "text" or "title"."""
    image_field: str | None = None
    """Field or column that holds the image's path, where it is not "image", "file", "file_name", "filename" or "filepath"."""
    split_field: str | None = None
    """Field or column that holds the split, where it is not "split"."""
    id_field: str | None = None
    """Field or column that holds the pair's id, where it is not "pair_id"."""


USUAL_COLUMNS = ColumnOptions()
