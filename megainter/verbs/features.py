"""`megainter features`: feature stores looked at, checked, merged, and exchanged with other programs."""

from pathlib import Path
from typing import Literal

from cyclopts import App

from megainter.process import raise_on_signals
from megainter.verbs.as_json import lines_aside, print_object

features_app = App(name="features", help="Show, check, merge, import and export feature stores.")


@features_app.command(name="show")
def show(store: Path, /, *, image: str | None = None, json: bool = False) -> None:
    """Print what a feature store holds, or one of its records.

    Parameters
    ----------
    store
        Feature store.
    image
        Print the regions of the image with this id instead.
    json
        Print one JSON object for scripts instead of lines.
    """
    from preprocessing.features.show import describe_record, describe_store, record_facts, store_facts

    if json:
        print_object(store_facts(store) if image is None else record_facts(store, image))
        return
    print(describe_store(store) if image is None else describe_record(store, image))


@features_app.command(name="check")
def check(store: Path, /, *, json: bool = False) -> None:
    """Verify every record of a feature store; exit code 4 where one is wrong.

    Parameters
    ----------
    store
        Feature store.
    json
        Print one JSON object for scripts: how many records there are, and which are wrong.
    """
    from preprocessing.features.show import check_store, require_whole

    with lines_aside(json):
        checked = check_store(store)
    if json:
        print_object({"store": store, "records": checked.records, "wrong": checked.wrong})
    require_whole(store, checked)
    if not json:
        print(f"{store}: all {checked.records:,} records are as they were written")


@features_app.command(name="merge")
def merge(*stores: Path, output: Path) -> None:
    """Merge feature stores of the same detector and settings into one. The same command goes on after a stop.

    Parameters
    ----------
    stores
        Two or more feature stores. Equal records of one image are merged, different ones refused.
    output
        Feature store to write.
    """
    from preprocessing.features.merging import merge_stores

    raise_on_signals("stopped on request; what was stored is kept, run the same command again")
    print(f"{output}: digest {merge_stores(list(stores), output)}")


@features_app.command(name="redescribe")
def redescribe(
    store: Path,
    /,
    *,
    images: Path,
    output: Path,
    network: str = "efficientnet_lite0",
    side: int = 224,
    grid: int = 0,
    batch: int = 8,
    device: str = "auto",
) -> None:
    """Give the boxes of a store the features of a network that has seen more. The same command goes on after a stop.

    Parameters
    ----------
    store
        Feature store whose boxes and class probabilities are kept.
    images
        Folder of the store's images.
    output
        Feature store to write.
    network
        Network that describes the regions: the mean of its last map over each box. efficientnet_lite0 knows ImageNet;
        efficientnet_lite0+nanodet puts beside it what NanoDet's backbone, trained on COCO's objects, sees.
    side
        Pixels per side that images are brought to, a multiple of 32: more see smaller regions apart, and take longer.
    grid
        Put the whole image and a grid of so many cells on a side before the boxes, as regions; 0: the boxes alone.
    batch
        Images per forward.
    device
        Torch device; "auto" takes CUDA where there is one.
    """
    from preprocessing.extraction.redescribe import redescribe

    raise_on_signals("stopped on request; what was stored is kept, run the same command again")
    digest = redescribe(store, images, output, network=network, side=side, grid=grid, batch=batch, device=device)
    print(f"{output}: digest {digest}")


@features_app.command(name="import")
def import_(
    src: Path,
    dst: Path,
    /,
    *,
    format: str | None = None,
    features: Literal["float16", "float32"] = "float16",
    classes: Path | None = None,
    sizes: Path | None = None,
    background: Literal["first", "last", "none"] | None = None,
    top_k: int = 0,
    detector: str | None = None,
    ids: str | None = None,
    max_bad: float = 0.01,
) -> None:
    """Import another program's region features into a feature store. The same command goes on after a stop.

    Parameters
    ----------
    src
        A TSV, an LMDB (file or folder) or a folder of .npz or .npy files.
    dst
        Feature store to write; what could not be used is listed in DST/failed.tsv.
    format
        lxmert-tsv, butd-tsv, vilbert-tsv, volta-tsv, vinvl-tsv, vilbert-lmdb, tensorpack-lmdb, uniter-lmdb, mmf-lmdb, mmf-npy, uniter-npz
        or milvlg-npz; default: recognised by content.
    features
        Precision to keep. float32 keeps what came in to the bit, in twice the space.
    classes
        Names of the detector's classes without background, one per line (or VinVL's labelmap); default "class 1" and so on.
    sizes
        Image sizes, before any that the format has: CSV, TSV or Parquet with image_id, width, height, or VinVL's hw.tsv.
    background
        Which class probability is the background's, where it is not where the format usually has it; and whether labels without
        probabilities count it (first, last) or not (none), where the first entries do not show it.
    top_k
        Keep only so many class probabilities of a region; default all.
    detector
        What made the features; stores merge where this is the same.
    ids
        How an image's id is made of the format's: parts {id}, {stem} (its last part without suffix), {folder} and {number} (of
        COCO_val2014_000000391895: 391895), as in "val2014/COCO_val2014_{number:012d}".
    max_bad
        Share of unusable entries above which the command ends with exit code 3.
    """
    from preprocessing.features.importing import import_features

    raise_on_signals("stopped on request; what was stored is kept, run the same command again")
    done = import_features(
        src, dst, format=format, features=features, classes=classes, sizes=sizes, background=background, top_k=top_k, detector=detector,
        ids=ids, max_bad=max_bad,
    )  # fmt: skip
    print(f"{dst}: {done.stored:,} images, digest {done.digest}")


@features_app.command(name="export")
def export(store: Path, dst: Path, /, *, format: Literal["lxmert-tsv", "vilbert-lmdb", "uniter-lmdb", "parquet"]) -> None:
    """Write a feature store in another program's format.

    Parameters
    ----------
    store
        Feature store.
    dst
        File or folder to write; must not exist.
    format
        What to write.
    """
    from preprocessing.features.exporting import export_features

    raise_on_signals("stopped on request; what was stored is kept, run the same command again")
    print(f"{dst}: {export_features(store, dst, format):,} images")
