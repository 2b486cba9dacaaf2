"""The parsers that are fuzzed, each as a function of bytes, and what mutation begins with.

``open(folder)`` imports a parser, so that a process loads only its own, and gives the function; what it needs as a file lies in ``folder``,
which is in memory. Where one target stands for several parsers, the first byte chooses (``of``).
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import seeds
from tests.fuzz.mutating import Mutate, behind, mutate_json, mutate_json_cell, mutate_json_line, mutate_pickle

Parse = Callable[[bytes], object]
FOREIGN_CLASSES = 5  # of the images in ``seeds``


@dataclass(frozen=True)
class Target:
    """One parser. ``tokens`` are pieces for mutation to put in; ``mutate`` changes an input and leaves it of its format, where it can;
    ``slow``: an input takes milliseconds, so that fewer of them are tried.
    """

    name: str
    open: Callable[[Path], Parse]
    seeds: Callable[[], list[bytes]]
    tokens: tuple[bytes, ...] = ()
    mutate: tuple[Mutate, ...] = ()
    slow: bool = False
    longest: int = 4096
    corpus: Path = field(default=Path(__file__).parent / "corpus")

    def inputs(self) -> list[bytes]:
        """The seeds, and what earlier runs found."""
        found = sorted((self.corpus / self.name).glob("*")) if (self.corpus / self.name).is_dir() else []
        return [*self.seeds(), *(path.read_bytes() for path in found)]


def of(data: bytes, parsers: list[Parse]) -> object:
    """The parser that the first byte chooses, on the rest."""
    return parsers[data[0] % len(parsers)](data[1:]) if data else None


def placed(folder: Path, name: str, content: bytes) -> Path:
    """A file of that content."""
    path = folder / name
    path.write_bytes(content)
    return path


# --- feature stores --------------------------------------------------------------------------------------------------------------------


def records(folder: Path) -> Parse:
    """A record's bytes, read whole and in part; where bit 1 of the first byte is set, with the checksum that they should have."""
    import zlib

    import numpy as np

    from megainter.data.feature_store.first_regions import FirstRegions
    from megainter.data.feature_store.record import HEADER
    from megainter.data.feature_store.views import decode

    def parse(data: bytes) -> None:
        if not data:
            return
        schema, body = seeds.SCHEMAS[data[0] & 1], data[1:]
        if data[0] & 2 and len(body) >= HEADER.size:
            crc = zlib.crc32(body[HEADER.size :], zlib.crc32(body[: HEADER.size - 4]))
            body = body[: HEADER.size - 4] + crc.to_bytes(4, "little") + body[HEADER.size :]
        if not data[0] & 4:
            decode(body, "image", schema, "shard")
            return

        # As training reads it: header and boxes, then features and probabilities, without a checksum over all.
        def read(i: int, out: memoryview, at: int) -> int:
            place, part = out.cast("B"), body[at : at + out.nbytes]
            place[: len(part)] = part
            return len(part)

        numbers = np.array([len(body)]), np.array([2]), np.array([int.from_bytes(body[44:48], "little")], np.uint32)
        first = FirstRegions([b"image"], *numbers, 2, schema, {}, read, lambda i: "shard")
        first.features(0, np.empty((2, schema.feature_size), np.float32))
        first.class_probs(np.array([0, 0]), np.array([0, 1]))

    return parse


def store_json(folder: Path) -> Parse:
    """A store's description."""
    from megainter.data.feature_store import FeatureStore

    store = seeds.write_store(folder / "store")

    def parse(data: bytes) -> None:
        (store / "store.json").write_bytes(data)
        with FeatureStore(store) as opened:
            for _ in opened.damaged():
                pass

    return parse


def store_index(folder: Path) -> Parse:
    """A store's index, of the size and checksum that its description asks for."""
    from megainter.data.feature_store import FeatureStore

    store = seeds.write_store(folder / "store")
    description = json.loads((store / "store.json").read_text())

    def parse(data: bytes) -> None:
        (store / "index.arrow").write_bytes(data)
        description["index"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (store / "store.json").write_text(json.dumps(description))
        with FeatureStore(store) as opened:
            for _ in opened.damaged():
                pass

    return parse


def shards(folder: Path) -> Parse:
    """A shard, opened as LMDB in this process: as a store is that was not sealed."""
    from megainter.data.feature_store import FeatureStore
    from megainter.data.feature_store.shard import count_records, entries

    store = seeds.write_store(folder / "store", seal=False)
    (shard,) = store.glob("shard-*.lmdb")
    whole = shard.read_bytes()

    def parse(data: bytes) -> None:
        shard.write_bytes(seeds.with_changes(whole, data))
        count_records(shard)
        list(entries(shard))
        with FeatureStore(store, allow_partial=True) as opened:
            for _ in opened.damaged():
                pass

    return parse


# --- features of other programs --------------------------------------------------------------------------------------------------------


def _imported(regions: Any, image_id: str = "image") -> None:
    """What the import does with an entry that was decoded."""
    from megainter.data.feature_store.record import encode
    from preprocessing.features.formats.complete import Completion, complete, fitted

    how = Completion(FOREIGN_CLASSES, ("a", "b", "c", "d"), {"sized": (9, 9)}, None)
    record, _ = fitted(complete(image_id, regions, how), seeds.FOREIGN_SCHEMA.extras)
    encode(image_id, record, seeds.FOREIGN_SCHEMA)


def _entries(source: Any) -> None:
    from preprocessing.features.formats.entry import BadEntryError

    for entry in source.entries():
        with contextlib.suppress(BadEntryError):
            _imported(entry.load(), entry.image_id)


def tables(folder: Path) -> Parse:
    """The five kinds of TSV; the last chooses by content, as the import does."""
    from preprocessing.features.formats import READERS, recognise

    def table(name: str) -> Parse:
        return lambda data: _entries(READERS[name](placed(folder, "features.tsv", data)))

    def recognised(data: bytes) -> None:
        path = placed(folder, "features.tsv", data)
        name = recognise(path)
        if name.endswith("-tsv"):
            _entries(READERS[name](path))

    parsers = [*(table(name) for name in ("butd-tsv", "vilbert-tsv", "lxmert-tsv", "volta-tsv", "vinvl-tsv")), recognised]
    return lambda data: of(data, parsers)


def lmdb_values(folder: Path) -> Parse:
    """Values of the LMDBs of ViLBERT, MMF, UNITER and tensorpack."""
    from preprocessing.features.formats import mmf, tensorpack, uniter, vilbert_lmdb

    def datapoint(data: bytes) -> None:
        row = tensorpack.datapoint(data)
        _imported(vilbert_lmdb.array_regions(row) if isinstance(row, dict) else tensorpack._regions(row))

    decoders: list[Parse] = [
        *(lambda data, decode=decode: _imported(decode(data)) for decode in (vilbert_lmdb._regions, mmf._regions, uniter._decode)),
        datapoint,
    ]
    return lambda data: of(data, decoders)


def numpy_files(folder: Path) -> Parse:
    """.npz of UNITER and MILVLG, .npy of MMF; the last is the pickle of an .npy of objects."""
    import numpy as np

    from preprocessing.features.formats import READERS

    def read(name: str, file: str) -> Parse:
        place = folder / name
        place.mkdir(exist_ok=True)
        if name == "mmf-npy":
            np.save(place / "image_info.npy", np.array(seeds.mmf_info(), dtype=object), allow_pickle=True)

        def parse(data: bytes) -> None:
            (place / file).write_bytes(data)
            _entries(READERS[name](place))

        return parse

    npy = read("mmf-npy", "image.npy")
    parsers = [read("uniter-npz", "image.npz"), read("milvlg-npz", "image.npz"), npy, lambda data: npy(seeds.npy_of_pickle(data))]
    return lambda data: of(data, parsers)


def lmdb_files(folder: Path) -> Parse:
    """A whole LMDB of another program, read by a process of its own."""
    from preprocessing.features.formats import READERS, recognise

    whole = seeds.foreign_lmdb(folder / "written")

    def parse(data: bytes) -> None:
        path = placed(folder, "foreign.lmdb", seeds.with_changes(whole, data))
        _entries(READERS[recognise(path)](path))

    return parse


def sizes_and_classes(folder: Path) -> Parse:
    """Files of image sizes and of class names."""
    from preprocessing.features.formats.complete import read_classes, read_sizes

    parsers: list[Parse] = [
        lambda data: read_sizes(placed(folder, "sizes.csv", data)),
        lambda data: read_classes(placed(folder, "classes.txt", data)),
    ]
    return lambda data: of(data, parsers)


# --- pickles and weights ---------------------------------------------------------------------------------------------------------------


def pickles(folder: Path) -> Parse:
    """The restricted unpickler."""
    from preprocessing.detector.restricted_pickle import load_restricted

    parsers: list[Parse] = [load_restricted, lambda data: load_restricted(data, stand_in=True, encoding="bytes")]
    return lambda data: of(data, parsers)


def weights(folder: Path) -> Parse:
    """Files of weights for conversion: torch's and safetensors, whole."""
    from megainter.conversion.foreign_files import open_tensors, without_prefix

    def opened(name: str) -> Parse:
        def parse(data: bytes) -> None:
            for tensor in without_prefix(open_tensors(placed(folder, name, data))).values():
                tensor.read()

        return parse

    parsers = [opened("model.bin"), opened("model.safetensors")]
    return lambda data: of(data, parsers)


def weight_pickles(folder: Path) -> Parse:
    """The pickle in torch's archive, and in the format before archives."""
    from megainter.conversion.foreign_files import load_torch_file, open_tensors
    from tests.conversion.test_hostile_files import legacy

    def read(data: bytes) -> None:
        for tensor in open_tensors(placed(folder, "model.bin", data)).values():
            tensor.read()

    parsers: list[Parse] = [
        lambda data: read(seeds.archived(data)),
        lambda data: load_torch_file(placed(folder, "model.bin", seeds.archived(data)), inert=True),
        lambda data: read(legacy(data)),
    ]
    return lambda data: of(data, parsers)


def weight_folders(folder: Path) -> Parse:
    """The index of weights in shards, and the JSON beside weights."""
    from megainter.conversion.architecture import stated_sizes
    from megainter.conversion.foreign_files import open_tensors
    from megainter.files import require_own_files

    model = seeds.sharded_folder(folder / "model")

    def index(data: bytes) -> None:
        (model / "model.safetensors.index.json").write_bytes(data)
        require_own_files(model)
        open_tensors(model)

    parsers: list[Parse] = [index, lambda data: stated_sizes(placed(folder, "config.json", data))]
    return lambda data: of(data, parsers)


def configurations(folder: Path) -> Parse:
    """The plan of a conversion from a configuration in the official names, or ours, and weights that belong to another."""
    from megainter.conversion.foreign_files import open_tensors
    from megainter.conversion.official import plan_weights

    source = seeds.official_file(folder / "official.bin")
    tensors = open_tensors(source)
    return lambda data: plan_weights(tensors, source, placed(folder, "config.json", data), {}, False)


def zero(folder: Path) -> Parse:
    """DeepSpeed's checkpoints: the pickle of the model's state, or of one rank's optimiser."""
    from megainter.conversion.deepspeed_files import find_deepspeed_folder, open_deepspeed

    stages = [seeds.zero_folder(folder / f"stage{stage}", stage) for stage in (0, 2, 3)]

    def parse(data: bytes) -> None:
        if not data:
            return
        place = stages[data[0] % 3]
        name = sorted(path.name for path in place.iterdir())[(data[0] >> 2) % len(list(place.iterdir()))]
        kept = (place / name).read_bytes()
        (place / name).write_bytes(seeds.archived(data[1:]))
        try:
            found = find_deepspeed_folder(place)
            for tensor in open_deepspeed(found).tensors.values() if found is not None else ():
                tensor.read()
        finally:
            (place / name).write_bytes(kept)

    return parse


def detectors(folder: Path) -> Parse:
    """Weights of detectors: safetensors and their header, torch's, pickled dictionaries."""
    from preprocessing.detector.weights import read_weights

    parsers: list[Parse] = [
        lambda data: read_weights(placed(folder, "detector.pkl", data)),
        lambda data: read_weights(placed(folder, "detector.pth", seeds.archived(data))),
        lambda data: read_weights(placed(folder, "detector.safetensors", seeds.safetensors_of(data))),
    ]
    return lambda data: of(data, parsers)


# --- runs ------------------------------------------------------------------------------------------------------------------------------


def manifests(folder: Path) -> Parse:
    """A checkpoint's manifest, its state, and the file that names the latest."""
    from megainter.training import checkpoint

    root = seeds.checkpoints(folder / "checkpoints")
    saved = root / "step_0000002"
    kept = {name: (saved / name).read_bytes() for name in ("manifest.json", "trainer.json")}

    def read() -> None:
        found = checkpoint.newest(root, lambda text: None)
        assert found is not None
        found.step  # noqa: B018 - a property that reads
        with checkpoint.reader(found) as tensor:
            for name in checkpoint.weight_names(found):
                tensor("weights", name)

    def manifest(data: bytes) -> None:
        (saved / "manifest.json").write_bytes(data)
        read()

    def state(data: bytes) -> None:
        description = json.loads(kept["manifest.json"])
        for entry in description["files"]:
            if entry["file"] == "trainer.json":
                entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (saved / "trainer.json").write_bytes(data)
        (saved / "manifest.json").write_text(json.dumps(description))
        read()

    def latest(data: bytes) -> None:
        (root / "latest").write_bytes(data)
        read()

    def parse(data: bytes) -> None:
        for name, content in kept.items():
            (saved / name).write_bytes(content)
        of(data, [manifest, state, latest])

    return parse


def recipes(folder: Path) -> Parse:
    """TOML of pretraining and of fine-tuning."""
    from megainter.config.reading import load_config

    return lambda data: load_config(placed(folder, "recipe.toml", data))


def hostfiles(folder: Path) -> Parse:
    """A hostfile, and the filters of its hosts behind the first NUL."""
    from launcher.hostfile import format_hostfile, parse_hostfile, select

    def parse(data: bytes) -> None:
        content, _, chosen = data.partition(b"\0")
        hosts = parse_hostfile(content, "hostfile")
        include, _, exclude = chosen.decode("latin-1").partition("\0")
        format_hostfile(select(hosts, include, exclude))

    return parse


def deepspeed_json(folder: Path) -> Parse:
    """A DeepSpeed JSON, laid over a run's settings."""
    from dataclasses import replace

    from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
    from megainter.training.engine import deepspeed_config

    optimizer, training = OptimizerConfig(), TrainingConfig(steps=1)
    engines = [replace(EngineConfig(), deepspeed=folder / "ds.json", precision=kind, zero_stage=2) for kind in ("fp32", "bf16", "fp16")]

    def parse(data: bytes) -> None:
        path = placed(folder, "ds.json", data[1:])
        deepspeed_config(replace(engines[(data or b"0")[0] % 3], deepspeed=path), optimizer, training, 2)

    return parse


# --- captions, annotations and tables --------------------------------------------------------------------------------------------------


def annotations(folder: Path) -> Parse:
    """JSON and JSON Lines of COCO, Karpathy, Flickr30K, Visual Genome, VQA, GQA, NLVR2, SNLI-VE and VCR, in the order of the seeds."""
    from preprocessing.prepare import boxes, labelled, questions
    from preprocessing.prepare.caption_sources import addresses, annotations
    from preprocessing.prepare.labelled_images import ImageOptions, open_files
    from preprocessing.prepare.reading import Fields, json_object, read_lines

    def items(name: str, read: Callable[[Path], Any]) -> Parse:
        def parse(data: bytes) -> None:
            for _ in read(placed(folder, name, data)).items:
                pass

        return parse

    def examples(source: str, answers: bool = False) -> Callable[[Path], Any]:
        options = ImageOptions(annotations=(placed(folder, "answers.json", seeds.VQA_ANSWERS),)) if answers else ImageOptions()
        return lambda path: open_files(source, [path], options, labelled.split_of)[0]

    def answers(data: bytes) -> None:
        options = ImageOptions(annotations=(placed(folder, "answers.json", data),))
        for _ in open_files("vqa", [placed(folder, "v2_val2014.json", seeds.VQA_QUESTIONS)], options, labelled.split_of)[0].items:
            pass

    parsers = [
        items("captions_val2017.json", annotations.coco),
        items("dataset_flickr30k.json", annotations.flickr30k),
        items("flickr_train.jsonline", annotations.flickr30k),
        items("regions.json", annotations.visual_genome),
        items("captions.jsonl", lambda path: annotations.jsonl(path, Fields())),
        items("captions.json", lambda path: addresses.sbu(path, Fields())),
        items("instances_val2017.json", boxes._coco),
        items("boxes.jsonl", lambda path: read_lines(path, boxes._line)),
        items("v2_val2014.json", examples("vqa", answers=True)),
        items("val.json", examples("vqa")),
        answers,
        items("dev.jsonl", examples("nlvr2")),
        items("dev.jsonl", examples("snli-ve")),
        items("val.jsonl", lambda path: read_lines(path, lambda number, line: questions._question(json_object(line), "val"))),
    ]
    return lambda data: of(data, parsers)


def delimited(folder: Path) -> Parse:
    """Tables of text: CSV, Conceptual Captions, Flickr30K's tokens, GLUE."""
    from preprocessing.prepare import labelled
    from preprocessing.prepare.caption_sources import addresses, annotations, tables
    from preprocessing.prepare.reading import Fields

    def items(name: str, read: Callable[[Path], Any]) -> Parse:
        def parse(data: bytes) -> None:
            for _ in read(placed(folder, name, data)).items:
                pass

        return parse

    def glue(source: str) -> Callable[[Path], Any]:
        return lambda path: labelled._table(source, path, labelled.GLUE[source])

    parsers = [
        items("captions.csv", lambda path: tables.table_of_csv(path, Fields())),
        items("Train_GCC-training.tsv", lambda path: addresses.conceptual_captions(path, Fields())),
        items("results.token", annotations.flickr30k),
        items("dev.tsv", glue("sts-b")),
        items("train.tsv", glue("cola")),
    ]
    return lambda data: of(data, parsers)


def parquet(folder: Path) -> Parse:
    """Our tables, and captions in Parquet."""
    from megainter.data.tables.boxes import read_boxes
    from megainter.data.tables.labelled import read_examples
    from megainter.data.tables.pairs import read_pairs
    from megainter.data.tables.questions import read_questions
    from preprocessing.prepare.caption_sources.tables import table_of_parquet
    from preprocessing.prepare.reading import Fields

    def read(data: bytes) -> None:
        for _ in table_of_parquet(placed(folder, "captions.parquet", data), Fields()).items:
            pass

    readers: list[Callable[[Path], object]] = [read_pairs, read_boxes, read_examples, read_questions]
    parsers: list[Parse] = [lambda data, one=one: one(placed(folder, "table.parquet", data)) for one in readers]
    return lambda data: of(data, [*parsers, read])


JSON_TOKENS = (b'{"', b'":', b"[[", b"]}", b"null", b"true", b"1e999", b"NaN", b"-Infinity", b'"\\ud800"', b"9" * 30)
PICKLE_TOKENS = (
    b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n",
    b"ccollections\nOrderedDict\n",
    b"\x80\x04",
    b"\x93",
    b"tR",
    b"b.",
)
TOML_TOKENS = (
    b"[data]",
    b"[training]",
    b"[model]",
    b"[engine]",
    b"[optimizer]",
    b"steps = ",
    b"pairs = ",
    b'"""',
    b"{ ",
    b"[[",
    b"1e3",
    b"inf",
    b"2020-01-01",
)
HOST_TOKENS = (b" slots=", b"\nworker-1", b"#", b"\r\n", b"@", b":0,2", b"\0")

JSON_AND_CELLS = (behind(1, mutate_json), behind(1, mutate_json_cell))
PICKLE_AND_JSON = (behind(1, mutate_pickle), behind(1, mutate_json))

TARGETS = [
    Target("records", records, seeds.records, (b"MIRR", b"image", b"\x00\x7c", b"\xff\xff\xff\xff")),
    Target("store-json", store_json, seeds.store_json, JSON_TOKENS, (mutate_json,)),
    Target("store-index", store_index, seeds.store_index, (b"ARROW1", b"\xff\xff\xff\xff"), longest=16384),
    Target("shards", shards, seeds.changes, slow=True),
    Target("feature-tables", tables, seeds.tables, (b"\t", b"\r\n", b"AAAA", b"==", b"num_boxes"), (behind(1, mutate_json_cell),)),
    Target("lmdb-values", lmdb_values, seeds.lmdb_values, PICKLE_TOKENS, (behind(1, mutate_pickle),)),
    Target("numpy-files", numpy_files, seeds.numpy_files, (*PICKLE_TOKENS, b"PK\x03\x04", b"\x93NUMPY"), (behind(1, mutate_pickle),)),
    Target("lmdb-files", lmdb_files, seeds.changes, slow=True),
    Target("sizes-and-classes", sizes_and_classes, seeds.sizes_and_classes, (b"image_id,width,height", *JSON_TOKENS), JSON_AND_CELLS),
    Target("pickles", pickles, seeds.pickles, PICKLE_TOKENS, (behind(1, mutate_pickle),)),
    Target("weights", weights, seeds.weights, (b"PK\x03\x04", b"PK\x01\x02", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}')),
    Target("weight-pickles", weight_pickles, seeds.weight_pickles, PICKLE_TOKENS, (behind(1, mutate_pickle),)),
    Target("weight-json", weight_folders, seeds.weight_folders, JSON_TOKENS, (behind(1, mutate_json),)),
    Target("model-configurations", configurations, seeds.model_configurations, JSON_TOKENS, (mutate_json,), slow=True),
    Target("deepspeed-checkpoints", zero, seeds.zero, PICKLE_TOKENS, (behind(1, mutate_pickle),)),
    Target("detector-weights", detectors, seeds.detectors, PICKLE_TOKENS + JSON_TOKENS, PICKLE_AND_JSON, slow=True),
    Target("checkpoint-manifests", manifests, seeds.manifests, JSON_TOKENS, (behind(1, mutate_json),)),
    Target("recipes", recipes, seeds.recipes, TOML_TOKENS),
    Target("hostfiles", hostfiles, seeds.hostfiles, HOST_TOKENS),
    Target("deepspeed-json", deepspeed_json, seeds.deepspeed_json, JSON_TOKENS, (behind(1, mutate_json),)),
    Target("annotations", annotations, seeds.annotations, JSON_TOKENS, (behind(1, mutate_json), behind(1, mutate_json_line))),
    Target("text-tables", delimited, seeds.delimited, (b'"', b"\t", b",", b"\r\n", b"http://", b"image,caption")),
    Target("parquet", parquet, seeds.parquet, (b"PAR1",), slow=True, longest=16384),
]  # fmt: skip


def named(name: str) -> Target:
    """The target of that name."""
    return next(target for target in TARGETS if target.name == name)


def in_memory(name: str) -> Path:
    """A new folder in the host's memory, where it has such a place, for the files of a target."""
    import tempfile

    shm = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=shm if shm.is_dir() else None))


def forget(folder: Path) -> None:
    """Remove what ``in_memory`` gave."""
    shutil.rmtree(folder, ignore_errors=True)
