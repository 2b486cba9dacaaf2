"""`megainter convert`: checkpoints in and out."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from megainter.conversion.card import Card, CardOptions, command_of
from megainter.errors import UsageError
from megainter.paths import require_there
from megainter.verbs.as_json import lines_aside, print_object
from megainter.weights import Kind, check_name

if TYPE_CHECKING:
    from megainter.conversion.mapping import Plan

AllowPartial = Annotated[bool, Parameter(name="--allow-partial", negative="--strict")]
About = Annotated[CardOptions | None, Parameter(name="*", negative_iterable=())]
convert_app = App(name="convert", help="Convert checkpoints: ours, InterBERT's, BERT's, DeepSpeed's; to the Hub and to ONNX.")


def require_source(src: Path, dst: Path | None, *files: tuple[str, Path | None], kind: Kind = "model") -> None:
    """``UsageError`` where the source is neither there nor a name, a file that an option names is not, or the destination is."""
    check_name(src, kind, "SRC")
    for option, path in files:
        require_there(path, option)
    if dst is not None and dst.exists():
        raise UsageError(f"{dst} exists; give a new name or remove it")


def _card(about: CardOptions | None) -> Card:
    options = about or CardOptions()
    for path in options.evaluation:
        require_there(path, "--evaluation")
    return Card(options, command_of(sys.argv))


@contextmanager
def _pushed(dst: Path | None, repository: str | None, private: bool | None) -> Iterator[Path]:
    """Where to convert to: ``dst``, or a folder for the time being; at the end it is pushed where that is asked for."""
    if repository is None:
        if dst is None or private is not None:
            raise UsageError("give DST, the folder to write" if dst is None else "--private is for a repository that --push makes")
        yield dst
        return
    from megainter.conversion.push import push_folder, require_hub

    require_hub(repository)
    with tempfile.TemporaryDirectory() as passing:
        folder = dst or Path(passing) / repository.partition("/")[2]
        yield folder
        print(f"pushed: {push_folder(folder, repository, private)}")


def _print_plan(asked: bool, src: Path, dst: Path | str | None, plan: "Plan") -> None:
    from megainter.conversion.mapping import table_of

    if asked:
        print_object({"source": src, "destination": dst, **table_of(plan)})


@convert_app.command(name="official")
def convert_official(
    src: Path,
    dst: Path,
    /,
    *,
    to: Literal["folder", "official"] = "folder",
    config: Path | None = None,
    fusion: Literal["mul", "sum"] | None = None,
    region_objective: Literal["class", "feature"] | None = None,
    interaction_layers: int | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: AllowPartial = False,
    verify: bool = False,
    about: About = None,
    json: bool = False,
) -> None:
    """Turn a released InterBERT checkpoint into a Hugging Face folder, or back.

    Parameters
    ----------
    src
        Official file (pytorch_model_N.bin, pytorch_model_N_ema.bin), or what DeepSpeed's zero_to_fp32.py wrote; with --to official, a
        folder of ours. Also hf:OWNER/NAME/FILE[@REVISION] of the Hub.
    dst
        Folder to write, with --to official the .bin; must not exist.
    to
        "official" writes the official file from a folder, and its settings beside it as NAME.json.
    config
        The official JSON of the checkpoint; what it does not say is read from the tensors, or taken from the released model and said.
    fusion
        How the pooled vectors are joined; it cannot be read from the file. Default: the JSON's, else mul.
    region_objective
        What the region head predicts. Default: features where it is as wide as they are, else classes.
    interaction_layers
        How many of the file's layers are interaction layers. Default: the JSON's, else half.
    vocabulary
        vocab.txt to put beside the model.
    cased
        The vocabulary keeps upper case. Default: as its folder or its entries tell.
    allow_partial
        Convert what fits: what is missing begins anew. Default: strict, an incomplete checkpoint ends with exit code 4 and writes nothing.
    verify
        Run source and result on the same input and compare.
    json
        Print one JSON object for scripts: the table of what was taken, drawn anew and left over, with the notes.
    """
    require_source(src, dst, ("--config", config), ("--vocabulary", vocabulary))
    from megainter.conversion import official

    if to == "official":
        with lines_aside(json):
            plan = official.to_official(src, dst, verify=verify)
        _print_plan(json, src, dst, plan)
        return
    choices = {"fusion": fusion, "region_objective": region_objective, "num_interaction_layers": interaction_layers}
    with lines_aside(json):
        plan = official.convert_official(
            src, dst, config_file=config, choices=choices, vocabulary=vocabulary, cased=cased, allow_partial=allow_partial, verify=verify,
            card=_card(about),
        )  # fmt: skip
    _print_plan(json, src, dst, plan)


@convert_app.command(name="bert")
def convert_bert(
    src: Path,
    dst: Path,
    /,
    *,
    config: Path | None = None,
    interaction_layers: int | None = None,
    region_layers: Literal["fresh", "text"] = "fresh",
    num_region_layers: int | None = None,
    num_region_attention_heads: int | None = None,
    store: Path | None = None,
    region_feature_size: int | None = None,
    num_region_classes: int | None = None,
    pooler_size: int = 1024,
    fusion: Literal["mul", "sum"] = "mul",
    region_objective: Literal["class", "feature"] = "class",
    seed: int = 0,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: AllowPartial = False,
    verify: bool = False,
    about: About = None,
    json: bool = False,
) -> None:
    """Start an InterBERT from a BERT of any size and language, or from a UNITER.

    Parameters
    ----------
    src
        Hugging Face folder, a .bin or .safetensors file, or hf:OWNER/NAME[/FILE][@REVISION] of the Hub.
    dst
        Folder to write; must not exist.
    config
        BERT's config.json. Default: the one in the folder.
    interaction_layers
        How many of BERT's layers become interaction layers; the others become the text stream. Default: half.
    region_layers
        The region stream begins anew ("fresh"), or as copies of the text stream's layers ("text").
    num_region_layers
        Region layers. Default: as many as text layers.
    num_region_attention_heads
        Heads of a region layer. Default: 8 where that divides the width, else BERT's; BERT's with --region-layers text.
    store
        Feature store that the model is to be trained on: its width of a region's feature and its classes are taken.
    region_feature_size
        Width of a region's feature. Default: the store's, else 2048.
    num_region_classes
        Classes of the detector, background included. Default: the store's, else 1601.
    pooler_size
        Width of the pooled vectors.
    fusion
        How the pooled vectors are joined.
    region_objective
        What the region head predicts.
    seed
        Draws everything that begins anew.
    vocabulary
        vocab.txt. Default: the one in the folder.
    cased
        The vocabulary keeps upper case. Default: as its folder or its entries tell.
    allow_partial
        Convert what fits: what is missing begins anew. Default: strict, an incomplete checkpoint ends with exit code 4 and writes nothing.
    verify
        Run BERT and the result on the same text and compare.
    json
        Print one JSON object for scripts: the table of what was taken, drawn anew and left over, with the notes.
    """
    require_source(src, dst, ("--config", config), ("--vocabulary", vocabulary), ("--store", store))
    from megainter.conversion import bert

    start = bert.BertStart(
        interaction_layers=interaction_layers, region_layers=region_layers, num_region_layers=num_region_layers,
        num_region_attention_heads=num_region_attention_heads, pooler_size=pooler_size, fusion=fusion, region_objective=region_objective,
        seed=seed, **bert.region_sizes(store, region_feature_size, num_region_classes),
    )  # fmt: skip
    with lines_aside(json):
        plan = bert.convert_bert(
            src, dst, start, config_file=config, vocabulary=vocabulary, cased=cased, allow_partial=allow_partial, verify=verify,
            card=_card(about),
        )  # fmt: skip
    _print_plan(json, src, dst, plan)


@convert_app.command(name="zero")
def convert_zero(
    run: Path,
    dst: Path,
    /,
    *,
    ema: bool = False,
    config: Path | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    allow_partial: AllowPartial = False,
    verify: bool = False,
    about: About = None,
    json: bool = False,
) -> None:
    """Export a training run to a Hugging Face folder, in fp32.

    Parameters
    ----------
    run
        Run folder (its newest whole checkpoint is taken) or one checkpoint folder; or a folder of DeepSpeed's own checkpoints, or what its
        zero_to_fp32.py wrote.
    dst
        Folder to write; must not exist.
    ema
        Take the averaged weights.
    config
        For DeepSpeed's own checkpoints: the model's JSON, ours or official. Default: config.json beside zero_to_fp32.py's output.
    vocabulary
        vocab.txt. Default: the run's.
    cased
        The vocabulary keeps upper case. Default: the run's.
    allow_partial
        Convert what fits: what is missing begins anew. Default: strict, an incomplete checkpoint ends with exit code 4 and writes nothing.
    verify
        Read the written folder again and compare every tensor.
    json
        Print one JSON object for scripts: the table of what was taken, drawn anew and left over, with the notes.
    """
    for path, option in ((run, "RUN"), (config, "--config"), (vocabulary, "--vocabulary")):
        require_there(path, option)
    from megainter.conversion.zero import convert

    with lines_aside(json):
        plan = convert(
            run, dst, ema=ema, config_file=config, vocabulary=vocabulary, cased=cased, allow_partial=allow_partial, verify=verify,
            card=_card(about),
        )  # fmt: skip
    _print_plan(json, run, dst, plan)


@convert_app.command(name="hf")
def convert_hf(
    src: Path,
    dst: Path | None = None,
    /,
    *,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    resize_vocabulary: int | None = None,
    vocabulary: Path | None = None,
    cased: bool | None = None,
    head: Literal["retrieval", "choice", "classification"] | None = None,
    num_labels: int | None = None,
    config: Path | None = None,
    seed: int = 0,
    allow_partial: AllowPartial = False,
    verify: bool = False,
    push: str | None = None,
    private: bool | None = None,
    about: About = None,
    json: bool = False,
) -> None:
    """Change a folder of ours: dtype, vocabulary, heads, its card; and push it to the Hub.

    Parameters
    ----------
    src
        Hugging Face folder of InterBERT, or what DeepSpeed's zero_to_fp32.py wrote of one: a file, or a folder of shards; also
        hf:OWNER/NAME[/FILE][@REVISION] of the Hub.
    dst
        Folder to write; must not exist. With --push it may be left out.
    dtype
        Precision of the written weights.
    resize_vocabulary
        Number of word embeddings; the first ones are kept, new ones drawn.
    vocabulary
        New vocab.txt: entries that the old one has keep their embedding, the others are drawn.
    cased
        The new vocabulary keeps upper case. Default: as its folder or its entries tell.
    head
        Add this head where it is not there, and name the model that reads it.
    num_labels
        Classes of a new classification head (--head classification); default 2.
    config
        The model's JSON. Default: config.json beside the weights, else sizes are read from the tensors.
    seed
        Draws everything that begins anew.
    allow_partial
        Convert what fits: what is missing begins anew. Default: strict, an incomplete folder ends with exit code 4 and writes nothing.
    verify
        Read the written folder again and compare every tensor.
    push
        Repository of the Hub, OWNER/NAME: all files are committed there (HF_TOKEN; HF_ENDPOINT names another Hub).
    private
        A repository that --push makes is private. Default: as the account's settings say.
    json
        Print one JSON object for scripts: the table of what was taken, drawn anew and left over, with the notes.
    """
    require_source(src, dst, ("--config", config), ("--vocabulary", vocabulary))
    from megainter.conversion.hugging_face import convert_hugging_face

    with lines_aside(json), _pushed(dst, push, private) as folder:
        plan = convert_hugging_face(
            src, folder, dtype=dtype, resize_vocabulary=resize_vocabulary, vocabulary=vocabulary, cased=cased, head=head,
            num_labels=num_labels, config_file=config, seed=seed, allow_partial=allow_partial, verify=verify, card=_card(about),
        )  # fmt: skip
    _print_plan(json, src, dst or push, plan)


@convert_app.command(name="onnx")
def convert_onnx(src: Path, dst: Path, /, *, verify: bool = False, json: bool = False) -> None:
    """Write a model as ONNX files: the scorer of pairs, and where it has vectors the encoders of texts and of images.

    Parameters
    ----------
    src
        Hugging Face folder of InterBERT, or hf:OWNER/NAME[@REVISION] of the Hub.
    dst
        Folder to write; must not exist.
    verify
        Run each file in onnxruntime beside the model, on a ragged batch, and compare.
    json
        Print one JSON object for scripts: the files, and by how much each differs from the model.
    """
    require_source(src, dst)
    from megainter.conversion.onnx import convert_onnx as convert

    with lines_aside(json):
        made = convert(src, dst, verify=verify, card=Card(command=command_of(sys.argv)))
    if json:
        print_object({"source": src, "destination": dst, "files": made.files, "differences": made.differences})


@convert_app.command(name="detector")
def convert_detector(src: Path, dst: Path, /, *, class_names: Path | None = None, json: bool = False) -> None:
    """Turn detector weights of any known kind into one safetensors file of ours, and list what was taken and left over.

    Parameters
    ----------
    src
        A Visual Genome Faster R-CNN (Hugging Face, airsplay's pickles, MILVLG's .pth), torchvision's Faster R-CNN, or a file of ours; also
        a name: vg, torchvision:fasterrcnn_resnet50_fpn_v2, hf:OWNER/NAME[/FILE][@REVISION].
    dst
        File to write; must not exist.
    class_names
        Text file, one class name per line without the background. Default: objects_vocab.txt beside SRC, else "class 1", "class 2", ...
    json
        Print one JSON object for scripts: the table of what was taken by part of the network, and what was left over.
    """
    require_source(src, dst, ("--class-names", class_names), kind="detector")
    from preprocessing.detector.convert import convert_detector as convert
    from preprocessing.detector.convert import taken

    with lines_aside(json):
        weights = convert(src, dst, class_names)
    if json:
        print_object({"source": src, "destination": dst, "origin": weights.origin, "taken": taken(weights), "left_over": weights.left_over})
