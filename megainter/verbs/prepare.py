"""`megainter prepare`: captions, boxes, questions and labelled examples as the tables that training reads, and hard negatives."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

prepare_app = App(
    name="prepare",
    help="Turn captions, boxes, labelled texts or VCR into tables (Parquet), and pairs of captions and images into hard negatives.",
)


@prepare_app.default
def prepare(
    source: Literal["coco", "flickr30k", "conceptual-captions", "sbu", "visual-genome", "jsonl", "csv", "parquet"],
    src: Path,
    /,
    *,
    output: Path,
    images: Path | None = None,
    split: str | None = None,
    captions: Annotated[str | None, Parameter(name=["--captions", "--caption-field"])] = None,
    image_field: str | None = None,
    split_field: str | None = None,
    id_field: str | None = None,
    image_names: str | None = None,
    ids: str | None = None,
    store: Path | None = None,
    val_share: float = 0.0,
    test_share: float = 0.0,
    seed: int = 0,
    max_bad: float = 0.01,
    encoding: str | None = None,
    similar_names: bool = False,
    replace: bool = False,
) -> None:
    """Turn captions into a pairs manifest (Parquet).

    Parameters
    ----------
    source
        Format of the captions.
    src
        The caption file; for sbu also the folder of its two text files; for conceptual-captions, sbu and parquet also the file or folder of
        tables that img2dataset wrote.
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    images
        Folder of the images; captions whose image is missing there are dropped and counted. Images that stand in a Parquet file themselves
        are written there.
    split
        Keep captions of this split, and give it to those whose source names none.
    captions
        Field or column that holds the captions (jsonl, csv, parquet), where it is not "captions", "caption", "text" or "title".
    image_field
        Field or column that holds the image's path (jsonl, csv, parquet), where it is not "image", "file", "file_name", "filename" or
        "filepath".
    split_field
        Field or column that holds the split (jsonl, csv, parquet), where it is not "split".
    id_field
        Field or column that holds the pair's id (jsonl, csv, parquet), where it is not "pair_id".
    image_names
        How the images of a list of addresses were named, such as "{crc32}.jpg", "{row:09d}.jpg" (rows from 0), "{line}.jpg" (from 1),
        "{name}" (the last part of the address), "{stem}.png", "{md5}.jpg", or for img2dataset "{shard}/{key}.jpg". Several, apart by
        commas, are tried in turn.
    ids
        How an image's id is made of the usual one (its path without suffix): parts {id}, {stem} (its last part), {folder} and {number} (of
        COCO_val2014_000000391895: 391895), as in "{number}".
    store
        Feature store whose ids the images are to have; forms of a name that it may use are tried: without folder, without suffix, COCO's
        number.
    val_share
        Share of the images for validation, drawn by a hash of the image's id, where the source names no splits; the rest is for training.
    test_share
        Share of the images that becomes the split test, drawn as --val-share is.
    seed
        Random seed of the draw by --val-share and --test-share.
    max_bad
        Share of unusable captions above which the command ends with exit code 3; one line may be bad in any case, unless this is 0.
    encoding
        Encoding of a text file (jsonl, csv) that is not UTF-8, such as cp1252 (Excel in the West), gb18030 or utf-16.
    similar_names
        Take the one image whose name differs from the path in upper and lower case, backslashes or Unicode form alone.
    replace
        Put the new table in the place of another that is at --output. Without it a table that differs stays, and exit code 2 says so.
    """
    from preprocessing.prepare.captions import prepare as prepare_captions
    from preprocessing.prepare.reading import Fields
    from preprocessing.prepare.splits import Shares

    fields = Fields(captions, image_field, split_field, id_field, image_names)
    shares = Shares(val_share, test_share, seed) if val_share or test_share else None
    prepare_captions(
        source, src, output, images=images, split=split, shares=shares, fields=fields, ids=ids, store=store, max_bad=max_bad,
        encoding=encoding, similar_names=similar_names, replace_table=replace,
    )  # fmt: skip


@prepare_app.command
def boxes(
    src: Path,
    /,
    *,
    output: Path,
    source: Annotated[Literal["coco", "jsonl"], Parameter(name="--format")] = "coco",
    images: Path | None = None,
    split: str | None = None,
    ids: str | None = None,
    val_share: float = 0.0,
    test_share: float = 0.0,
    seed: int = 0,
    max_bad: float = 0.01,
    encoding: str | None = None,
    similar_names: bool = False,
    replace: bool = False,
) -> None:
    """Turn labelled boxes into a manifest of boxes (Parquet), to train a detector on or to extract features at.

    Parameters
    ----------
    src
        COCO's instances (one JSON document), or JSON Lines of {"image", "width", "height", "boxes": [[x1, y1, x2, y2]], "labels"}.
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    source
        Format of the boxes.
    images
        Folder of the images; those missing there are dropped and counted.
    split
        Keep images of this split, and give it to those whose source names none.
    ids
        How an image's id is made of the usual one (its path without suffix): parts {id}, {stem}, {folder} and {number}, as in "{number}".
    val_share
        Share of the images for validation, drawn by a hash of the image's id, where the source names no splits; the rest is for training.
    test_share
        Share of the images that becomes the split test, drawn as --val-share is.
    seed
        Random seed of the draw by --val-share and --test-share.
    max_bad
        Share of unusable boxes above which the command ends with exit code 3; one line may be bad in any case, unless this is 0.
    encoding
        Encoding of a text file (jsonl) that is not UTF-8, such as cp1252 (Excel in the West), gb18030 or utf-16.
    similar_names
        Take the one image whose name differs from the path in upper and lower case, backslashes or Unicode form alone.
    replace
        Put the new table in the place of another that is at --output. Without it a table that differs stays, and exit code 2 says so.
    """
    from preprocessing.prepare.boxes import prepare_boxes
    from preprocessing.prepare.splits import Shares

    shares = Shares(val_share, test_share, seed) if val_share or test_share else None
    prepare_boxes(
        src, output, source=source, images=images, split=split, shares=shares, ids=ids, max_bad=max_bad,
        encoding=encoding, similar_names=similar_names, replace_table=replace,
    )  # fmt: skip


@prepare_app.command
def vcr(
    src: Path,
    /,
    *,
    output: Path,
    images: Path | None = None,
    boxes: Path | None = None,
    split: str | None = None,
    store: Path | None = None,
    max_bad: float = 0.01,
    replace: bool = False,
) -> None:
    """Turn VCR's train.jsonl, val.jsonl or test.jsonl into a table of questions (Parquet).

    Parameters
    ----------
    src
        The JSON Lines file of one split.
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    images
        Folder vcr1images; questions whose image or metadata is missing there are dropped and counted.
    boxes
        Parquet file to write the annotated boxes of the images to, for `megainter extract --boxes`; needs --images.
    split
        Split of the questions, where the file's name does not tell it.
    store
        Feature store whose ids the images are to have; forms of a name that it may use are tried: without folder, without suffix, COCO's
        number.
    max_bad
        Share of unusable questions above which the command ends with exit code 3; one line may be bad in any case, unless this is 0.
    replace
        Put the new tables in the place of others that are at --output and --boxes. Without it one that differs stays, and exit code 2
        says so.
    """
    from preprocessing.prepare.questions import prepare_vcr

    prepare_vcr(src, output, images=images, boxes=boxes, split=split, store=store, max_bad=max_bad, replace_tables=replace)


@prepare_app.command
def examples(
    source: Literal["cola", "sst-2", "mrpc", "qqp", "sts-b", "mnli", "qnli", "rte", "wnli", "tsv", "vqa", "nlvr2", "snli-ve"],
    /,
    *sources: Path,
    output: Path,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    example_id: str | None = None,
    split_field: str | None = None,
    regression: bool = False,
    annotations: list[Path] | None = None,
    image_names: str | None = None,
    targets: Literal["min", "official"] = "min",
    least: int = 9,
    store: Path | None = None,
    split: str | None = None,
    val_share: float = 0.0,
    test_share: float = 0.0,
    seed: int = 0,
    max_bad: float = 0.01,
    encoding: str | None = None,
    replace: bool = False,
) -> None:
    """Turn labelled texts, or texts about images, into a table of examples (Parquet) for `finetune classification`.

    megainter prepare examples mrpc MRPC/train.tsv MRPC/dev.tsv --output mrpc.parquet

    Parameters
    ----------
    source
        Format: one of GLUE's tasks; tsv, lines of columns apart by tabs under a header line; vqa (version 2); nlvr2; snli-ve.
    sources
        The files; their names tell the split (train, dev, test).
    output
        Parquet file to write; what was dropped and why goes to OUTPUT.report.json.
    text
        Column of the text (tsv).
    text_pair
        Column of a second text (tsv).
    label
        Column of the label (tsv).
    example_id
        Column of an id (tsv); else the file's name and the line's number.
    split_field
        Column of the split (tsv), where the file's name does not tell it.
    regression
        The labels are numbers to be predicted as such (tsv).
    annotations
        Files of the answers (vqa); may be repeated. Without them the questions have none.
    image_names
        How an image's id in the feature store is made, where it is not "{source}_{subset}_{id:012d}" (vqa: COCO_test2015_000000262144),
        "{id}-img{number}" (nlvr2), "{id}" (snli-ve).
    targets
        Soft score of an answer that n annotators gave (vqa): min(n / 3, 1), or the evaluation's mean over leaving one annotator out.
    least
        Questions for training that must have an answer as the agreed one to make it a class (vqa).
    store
        Feature store whose ids the images are to have; forms of a name that it may use are tried: without folder, without suffix, COCO's
        number.
    split
        Keep examples of this split, and give it to those whose source names none.
    val_share
        Share of the examples for validation, drawn by a hash of the example's id, where the source names no splits.
    test_share
        Share of the images that becomes the split test, drawn as --val-share is.
    seed
        Random seed of the draw by --val-share and --test-share.
    max_bad
        Share of unusable examples above which the command ends with exit code 3; one line may be bad in any case, unless this is 0.
    encoding
        Encoding of a text file (GLUE's tasks, tsv) that is not UTF-8, such as cp1252 (Excel in the West), gb18030 or utf-16.
    replace
        Put the new table in the place of another that is at --output. Without it a table that differs stays, and exit code 2 says so.
    """
    from megainter.errors import UsageError
    from preprocessing.prepare.labelled import Columns, Options, prepare_examples
    from preprocessing.prepare.labelled_images import ImageOptions
    from preprocessing.prepare.splits import Shares

    if text is None and any((text_pair, label, example_id, split_field, regression)):
        raise UsageError("columns are named for tsv, and --text is the first of them")
    columns = Columns(text, text_pair, label, example_id, split_field) if text is not None else None
    images = ImageOptions(tuple(annotations or ()), image_names, targets, least)
    shares = Shares(val_share, test_share, seed) if val_share or test_share else None
    options = Options(columns, regression, images)
    prepare_examples(
        source, sources, output, options=options, split=split, shares=shares, store=store, max_bad=max_bad,
        encoding=encoding, replace_table=replace,
    )  # fmt: skip


@prepare_app.command
def negatives(
    pairs: Path,
    /,
    *,
    output: Path,
    split: str = "train",
    top: int = 30,
    below: float = 0.5,
    threads: int | None = None,
    replace: bool = False,
) -> None:
    """Find hard negatives for image-text matching: for each caption the most similar ones of other images, by TF-IDF.

    Parameters
    ----------
    pairs
        Pairs manifest.
    output
        Parquet file to write, for the setting data.hard_negatives; it goes with exactly these pairs and this split.
    split
        Split of the pairs, as in data.split.
    top
        Hard negatives of a caption.
    below
        Cosine similarity that a hard negative stays below.
    threads
        Threads that compare (default: one per core).
    replace
        Put the new table in the place of another that is at --output. Without it a table that differs stays, and exit code 2 says so.
    """
    import os

    from preprocessing.prepare.hard_negatives import mine

    threads = threads or len(os.sched_getaffinity(0))
    mine(pairs, output, split=split, top=top, below=below, threads=threads, replace_table=replace)
