"""`megainter prepare`: captions, boxes, questions and labelled examples as the tables that training reads, and hard negatives."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Group, Parameter

from preprocessing.prepare.options import USUAL_COLUMNS, ColumnOptions, PairsOptions

if TYPE_CHECKING:
    from preprocessing.prepare.captions import Kind

CAPTIONS = Group("Captions, to a pairs manifest", sort_key=0)
OTHERS = Group("Other tables", sort_key=1)

prepare_app = App(
    name="prepare",
    help="Turn captions, boxes, labelled texts or VCR into tables (Parquet), and pairs of captions and images into hard negatives. "
    "`megainter prepare FORMAT --help` has the options of one.",
)


Table = Annotated[PairsOptions, Parameter(name="*")]
Columns = Annotated[ColumnOptions, Parameter(name="*")]
CaptionColumn = Annotated[
    str | None, Parameter(help='Column that holds the captions in what img2dataset wrote, where it is not "caption".')
]
ImageNames = Annotated[
    str | None,
    Parameter(
        help='How the images of a list of addresses were named, such as "{crc32}.jpg", "{row:09d}.jpg" (rows from 0), '
        '"{line}.jpg" (from 1), "{name}" (the last part of the address), "{stem}.png", "{md5}.jpg", or for img2dataset '
        '"{shard}/{key}.jpg". Several, apart by '
        "commas, are tried in turn."
    ),
]
Encoding = Annotated[
    str | None, Parameter(help="Encoding of a file that is not UTF-8, such as cp1252 (Excel in the West), gb18030 or utf-16.")
]


@prepare_app.command(group=CAPTIONS)
def jsonl(src: Path, /, *, table: Table, columns: Columns = USUAL_COLUMNS, encoding: Encoding = None) -> None:
    """JSON Lines, a line for each image: {"image": "beach.jpg", "captions": ["Two dogs.", "Dogs run."]}.

    Parameters
    ----------
    src
        The file.
    """
    _captions("jsonl", src, table, columns, encoding=encoding)


@prepare_app.command(group=CAPTIONS)
def csv(src: Path, /, *, table: Table, columns: Columns = USUAL_COLUMNS, encoding: Encoding = None) -> None:
    """A table as CSV or TSV, as spreadsheets save it, with a column of file names and one of captions.

    Parameters
    ----------
    src
        The file.
    """
    _captions("csv", src, table, columns, encoding=encoding)


@prepare_app.command(group=CAPTIONS)
def parquet(src: Path, /, *, table: Table, columns: Columns = USUAL_COLUMNS, image_names: ImageNames = None) -> None:
    """Parquet tables with a column of captions, and one of file names or of images themselves; also those that img2dataset wrote.

    Parameters
    ----------
    src
        The file, or a folder of files.
    """
    _captions("parquet", src, table, columns, image_names=image_names)


@prepare_app.command(group=CAPTIONS)
def coco(src: Path, /, *, table: Table) -> None:
    """COCO's captions_*.json, or dataset_coco.json of the Karpathy split.

    Parameters
    ----------
    src
        The file.
    """
    _captions("coco", src, table)


@prepare_app.command(group=CAPTIONS)
def flickr30k(src: Path, /, *, table: Table) -> None:
    """Flickr30k's results_20130124.token, dataset_flickr30k.json, or the *.jsonline of InterBERT's released code.

    Parameters
    ----------
    src
        The file.
    """
    _captions("flickr30k", src, table)


@prepare_app.command(group=CAPTIONS)
def conceptual_captions(src: Path, /, *, table: Table, image_names: ImageNames = None, captions: CaptionColumn = None) -> None:
    """Conceptual Captions' lists of captions and addresses, or what img2dataset made of them.

    Parameters
    ----------
    src
        The list (.tsv), or the file or folder of tables that img2dataset wrote.
    """
    _captions("conceptual-captions", src, table, ColumnOptions(captions=captions), image_names=image_names)


@prepare_app.command(group=CAPTIONS)
def sbu(src: Path, /, *, table: Table, image_names: ImageNames = None, captions: CaptionColumn = None) -> None:
    """SBU's captions and addresses, or what img2dataset made of them.

    Parameters
    ----------
    src
        The JSON document, the folder of SBU's two text files, or the file or folder of tables that img2dataset wrote.
    """
    _captions("sbu", src, table, ColumnOptions(captions=captions), image_names=image_names)


@prepare_app.command(group=CAPTIONS)
def visual_genome(src: Path, /, *, table: Table) -> None:
    """Visual Genome's region_descriptions.json, of any release.

    Parameters
    ----------
    src
        The file.
    """
    _captions("visual-genome", src, table)


def _captions(
    source: "Kind",
    src: Path,
    table: PairsOptions,
    columns: ColumnOptions = USUAL_COLUMNS,
    *,
    image_names: str | None = None,
    encoding: str | None = None,
) -> None:
    from preprocessing.prepare.captions import prepare
    from preprocessing.prepare.reading import Fields
    from preprocessing.prepare.splits import Shares

    fields = Fields(columns.captions, columns.image_field, columns.split_field, columns.id_field, image_names)
    shares = Shares(table.val_share, table.test_share, table.seed) if table.val_share or table.test_share else None
    prepare(
        source, src, table.output, images=table.images, split=table.split, shares=shares, fields=fields, ids=table.ids, store=table.store,
        max_bad=table.max_bad, encoding=encoding, similar_names=table.similar_names, replace_table=table.replace,
        only_stored=table.only_stored,
    )  # fmt: skip


@prepare_app.command(group=OTHERS)
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


@prepare_app.command(group=OTHERS)
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


@prepare_app.command(group=OTHERS)
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


@prepare_app.command(group=OTHERS)
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
