"""Small files as the real writers make them: what mutation begins with. Where a target takes its first byte for a choice, it is here."""

import base64
import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megainter.data.feature_store.record import RegionRecord, StoreSchema, encode
from megainter.data.feature_store.writer import FeatureStoreWriter, seal_store
from tests.places import ROOT

NAMES = ("__background__", "a", "b", "c", "d")
SCHEMAS = (
    StoreSchema(4, 5, NAMES, "detector"),
    StoreSchema(4, 5, NAMES, "detector", "top-k", 2, feature_dtype="float32", extras={"objects_id": "int64", "objects_conf": "float16"}),
)
FOREIGN_SCHEMA = StoreSchema(4, 5, NAMES, "foreign", extras={"objects_id": "int64", "objects_conf": "float32"})
BOXES = np.array([[0, 0, 9, 8], [1, 2, 3.5, 4]], np.float32)
FEATURES = np.array([[0, 1, 2, 3], [-1, 0.5, 0, 9]], np.float32)
PROBS = np.array([[0.5, 0.5, 0, 0, 0], [0, 0.25, 0.25, 0.25, 0.25]], np.float32)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def made(write: Callable[[Path], object], name: str = "file") -> bytes:
    """What ``write`` leaves in the file it is given."""
    with scratch() as folder:
        write(folder / name)
        return (folder / name).read_bytes()


def with_changes(whole: bytes, changes: bytes) -> bytes:
    """``whole`` with parts written over: each change is a place (3 bytes), a length and the bytes; the first two cut the end."""
    content, at = bytearray(whole), 2
    while at + 4 < len(changes):
        place, length = int.from_bytes(changes[at : at + 3], "little") % len(content), changes[at + 3] % 16
        part = changes[at + 4 : at + 4 + length]
        content[place : place + len(part)] = part[: len(content) - place]
        at += 4 + length
    cut = int.from_bytes(changes[:2], "little")
    return bytes(content[: len(content) - cut] if cut >= 32768 else content)


def changes() -> list[bytes]:
    """For ``with_changes``: nothing, headers of pages, a cut."""
    return [b"\0\0", b"\0\0\x10\0\0\x04\xff\xff\xff\xff", b"\0\0\x0a\x10\0\x02\x10\x00", b"\0\0\x10\x20\0\x04\x00\x10\x00\x00", b"\0\xa0"]


# --- feature stores --------------------------------------------------------------------------------------------------------------------


def _record(schema: StoreSchema) -> RegionRecord:
    extras = {"objects_id": np.array([1, 2]), "objects_conf": np.array([0.5, 0.25], np.float16)} if schema.extras else {}
    return RegionRecord(BOXES, FEATURES, PROBS, 10, 9, extras)


def records() -> list[bytes]:
    whole = [encode("image", _record(schema), schema)[0] for schema in SCHEMAS]
    return [bytes([how | number]) + data for number, data in enumerate(whole) for how in (0, 2, 4)] + [b"\2", b"\2" + whole[0][:48]]


def write_store(path: Path, seal: bool = True) -> Path:
    """A store of three images."""
    with FeatureStoreWriter(path, SCHEMAS[0]) as writer:
        for image_id in ("image", "b", "é/c"):
            writer.add(image_id, _record(SCHEMAS[0]))
    if seal:
        seal_store(path)
    return path


def store_json() -> list[bytes]:
    with scratch() as folder:
        return [(write_store(folder / "s") / "store.json").read_bytes(), b'{"format": "megainter feature store", "version": 1}', b"[]"]


def store_index() -> list[bytes]:
    with scratch() as folder:
        return [(write_store(folder / "s") / "index.arrow").read_bytes()]


# --- features of other programs --------------------------------------------------------------------------------------------------------


def b64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _lxmert() -> dict[str, Any]:
    labels = {"objects_id": np.array([1, 2]), "objects_conf": np.array([0.5, 0.25], np.float32), "attrs_id": np.array([3, 4])}
    row = {"img_id": "image", "img_h": 9, "img_w": 10} | {name: b64(value) for name, value in labels.items()}
    return row | {"attrs_conf": b64(np.zeros(2, np.float32)), "num_boxes": 2, "boxes": b64(BOXES), "features": b64(FEATURES)}


def _row() -> dict[str, Any]:
    return {"image_id": "image", "image_w": 10, "image_h": 9, "num_boxes": 2, "boxes": b64(BOXES), "features": b64(FEATURES)}


def tables() -> list[bytes]:
    rows = [_row(), _row() | {"cls_prob": b64(PROBS)}, _lxmert(), _lxmert() | {"cls_prob": b64(PROBS), "attrs": "", "classes": ""}]
    found = [bytes([kind]) + ("\t".join(map(str, row.values())) + "\r\n").encode() for kind, row in enumerate(rows)]
    found += [bytes([kind]) + ("\t".join(row) + "\n" + "\t".join(map(str, row.values()))).encode() for kind, row in enumerate(rows)]
    objects = [{"rect": box.tolist(), "class": "a", "conf": 0.5, "feature": b64(one)} for box, one in zip(BOXES, FEATURES, strict=True)]
    position = np.concatenate([FEATURES, np.array([[0, 0, 0.5, 0.5, 0.5, 0.5]] * 2, np.float32)], axis=1)
    vinvl: list[Any] = [{"objects": objects, "image_w": 10, "image_h": 9}, objects, {"num_boxes": 2, "features": b64(position)}]
    found += [bytes([4]) + b"image\t" + json.dumps(value).encode() for value in vinvl]
    return [*found, b"\4image\t2\t" + b64(position).encode(), *(bytes([5]) + seed[1:] for seed in found)]


def mmf_info() -> dict[str, Any]:
    """What stands beside MMF's features."""
    return {"bbox": BOXES, "num_boxes": 2, "image_width": 10, "image_height": 9, "cls_prob": PROBS, "objects": np.array([1, 2])}


def _uniter() -> dict[str, np.ndarray]:
    shares = np.array([[0, 0, 0.5, 0.5, 0.5, 0.5]] * 2, np.float16)
    return {"norm_bb": shares, "features": FEATURES, "conf": np.array([[0.5], [0.25]], np.float32), "soft_labels": PROBS}


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lmdb_values() -> list[bytes]:
    import msgpack

    from preprocessing.features.formats.msgpack_arrays import pack

    arrays = {"features": FEATURES, "boxes": BOXES, "cls_prob": PROBS, "image_w": 10, "image_h": 9, "num_boxes": 2}
    volta = arrays | {"obj_id": np.array([1, 2]), "obj_conf": np.array([0.5, 0.25], np.float32), "img_id": "image"}
    point = [FEATURES, PROBS, BOXES, 2, 9, 10, "image", "a caption"]
    packed = [{b"nd": True, b"type": a.dtype.str, b"kind": b"", b"shape": a.shape, b"data": a.tobytes()} for a in (FEATURES, PROBS, BOXES)]
    found = [b"\0" + pickle.dumps(row, protocol) for protocol in (2, 4) for row in (_row(), arrays, volta)]
    found += [b"\1" + pickle.dumps(mmf_info() | {"features": FEATURES}, protocol) for protocol in (0, 2, 5)]
    found += [b"\2" + pack(_uniter()), b"\2" + _npz(**_uniter()), b"\3" + msgpack.packb([*packed, 2, 9, 10, "image", "a caption"])]
    return [*found, b"\3" + pickle.dumps(point, 2), b"\3" + pickle.dumps(volta, 2)]


def npy_of_pickle(content: bytes) -> bytes:
    """An .npy of one object with that pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": ()})
    return buffer.getvalue() + content


def numpy_files() -> list[bytes]:
    info = {"image_id": "image", "objects_id": np.array([1, 2]), "objects_conf": np.array([0.5, 0.25], np.float32)}
    milvlg = {"x": FEATURES, "bbox": BOXES, "num_bbox": 2, "image_h": 9, "image_w": 10}
    plain, objects = io.BytesIO(), np.array({"boxes": BOXES, "features": FEATURES, "image_w": 10, "image_h": 9}, dtype=object)
    np.save(plain, FEATURES)
    return [b"\0" + _npz(**_uniter()), b"\1" + _npz(**milvlg, info=np.array(info, dtype=object)), b"\1" + _npz(**milvlg),
            b"\2" + plain.getvalue(), b"\3" + pickle.dumps(objects, 2), b"\3" + pickle.dumps(objects, 4)]  # fmt: skip


def foreign_lmdb(folder: Path) -> bytes:
    """ViLBERT's LMDB of a few images, as a file."""
    import lmdb

    folder.mkdir()
    with lmdb.open(str(folder), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for name in range(40):
            transaction.put(f"{name:03d}".encode(), pickle.dumps(_row() | {"image_id": str(name)}, 2))
        transaction.put(b"large", pickle.dumps(_row() | {"features": b64(np.zeros((2, 2048), np.float32))}, 2))
        transaction.put(b"keys", pickle.dumps([b"large"], 2))
    return (folder / "data.mdb").read_bytes()


def sizes_and_classes() -> list[bytes]:
    parquet = made(lambda path: pq.write_table(pa.table({"image_id": ["image"], "width": [10], "height": [9]}), path))
    texts = ["image_id,width,height\nimage,10,9\n", 'height\timage_id\twidth\n9\t"a ""b"\t10\n', 'image\t[{"width": 10, "height": 9}]\n']
    return [*(b"\0" + text.encode() for text in texts), b"\0" + parquet, b"\1a\nb,bee\nc\n", b'\1{"label_to_idx": {"a": 0, "b": 1}}']


# --- pickles and weights ---------------------------------------------------------------------------------------------------------------


def pickles() -> list[bytes]:
    objects = np.array([{"a": 1}, [2.5, "x"]], dtype=object)
    value = {"a": FEATURES, "b": np.float32(1.5), "c": [1, None, True, (2, "é")], b"d": np.asfortranarray(BOXES), "e": {1, 2}, "f": objects}
    return [how + pickle.dumps(value, protocol) for protocol in range(6) for how in (b"\0", b"\1")]


def archived(content: bytes) -> bytes:
    """torch's archive around a pickle, with ten storages of 64 bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {"data.pkl": content, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", data)
        for number in range(10):
            archive.writestr(f"archive/data/{number}", np.arange(16, dtype="<f4").tobytes())
    return buffer.getvalue()


def _torch(value: Any) -> bytes:
    """The pickle in the archive that torch writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _tensors() -> dict[str, Any]:
    import torch

    return {"module.a.weight": torch.arange(16.0).reshape(4, 4), "module.a.gamma": torch.zeros(16)}


def weights() -> list[bytes]:
    import torch
    from safetensors.torch import save

    found = [b"\1" + save(_tensors(), {"format": "pt"}), b"\1" + save({"x": torch.zeros(2, dtype=torch.bfloat16)})]
    for zipped in (True, False):
        buffer = io.BytesIO()
        torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, buffer, _use_new_zipfile_serialization=zipped)
        found.append(b"\0" + buffer.getvalue())
    return found


def weight_pickles() -> list[bytes]:
    import torch

    values = [_tensors(), {"model": _tensors()}, {"a": torch.nn.Parameter(torch.zeros(16)), "b": torch.Size([2])}, [1, "a"]]
    return [bytes([kind]) + _torch(value) for kind in (0, 1) for value in values] + [b"\2" + pickle.dumps({"a": 1}, 2)]


def sharded_folder(folder: Path) -> Path:
    """Weights in two files and their index."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for name in ("one", "two"):
        save_file({name: torch.zeros(2)}, folder / f"{name}.safetensors")
    return folder


def weight_folders() -> list[bytes]:
    index = {"metadata": {"total_size": 16}, "weight_map": {"one": "one.safetensors", "two": "two.safetensors"}}
    return [b"\0" + json.dumps(index).encode(), *(b"\1" + one for one in model_configurations())]


def official_file(path: Path) -> Path:
    """Weights of a tiny model under the official names."""
    import torch

    from tests.conversion.test_official import official

    torch.save(dict(official()), path)
    return path


def model_configurations() -> list[bytes]:
    from megainter.conversion.architecture import official_settings
    from tests.model.tiny import tiny_config

    config = tiny_config(initializer_range=0.02)
    return [json.dumps(official_settings(config)).encode(), config.to_json_string().encode()]


@dataclass
class fragment_address:
    """Where a piece of a parameter lies; it has the name that it has in DeepSpeed's files."""

    numel: int
    start: int


def _deepspeed(value: Any) -> bytes:
    ours = f"c{__name__}\nfragment_address\n".encode()
    return _torch(value).replace(ours, b"cdeepspeed.utils.tensor_fragment\nfragment_address\n")


def _zero_states(stage: int) -> dict[str, bytes]:
    """Pickles by file: one parameter of 16 numbers on one rank."""
    import torch

    shapes, flat = [{"a.weight": torch.Size([4, 4])}], torch.arange(16.0)
    module = {"module": {"a.weight": torch.zeros(4, 4)}, "param_shapes": shapes, "shared_params": {"b.weight": "a.weight"}}
    module |= {"frozen_param_shapes": {"c": torch.Size([16])}, "frozen_param_fragments": {"c": torch.zeros(16)}}
    inner = {"partition_count": 1} | (
        {"fp32_flat_groups": [flat]}
        if stage == 3
        else {"single_partition_of_fp32_groups": [flat], "param_slice_mappings": [{"a.weight": fragment_address(16, 0)}]}
    )
    model = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    states = {model: _deepspeed(module)}
    return states | ({"zero_pp_rank_0_mp_rank_00_optim_states.pt": _deepspeed({"optimizer_state_dict": inner})} if stage else {})


def zero_folder(folder: Path, stage: int) -> Path:
    """A checkpoint of one rank."""
    folder.mkdir()
    for name, content in _zero_states(stage).items():
        (folder / name).write_bytes(archived(content))
    return folder


def zero() -> list[bytes]:
    found = []
    for place, stage in enumerate((0, 2, 3)):
        found += [bytes([place | number << 2]) + content for number, (_, content) in enumerate(sorted(_zero_states(stage).items()))]
    return found


def safetensors_of(header: bytes) -> bytes:
    """A safetensors file of that header with some numbers behind it."""
    return len(header).to_bytes(8, "little") + header + np.arange(64, dtype="<f4").tobytes()


def detectors() -> list[bytes]:
    from safetensors import safe_open

    from megainter.weights import packaged_weights

    headers = []
    for name in ("photos", "demo"):
        with safe_open(packaged_weights(name), framework="np") as file:
            metadata = dict(file.metadata())
        headers.append({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [64], "data_offsets": [0, 256]}})
    state = {"backbone.stem.conv1.weight": np.zeros((4, 3, 7, 7), np.float32), "roi_heads.box_predictor.cls_score.weight": np.zeros((5, 4))}
    torchvision = {"backbone.body.conv1.weight": _tensors()["module.a.weight"], "rpn.head.conv.weight": _tensors()["module.a.gamma"]}
    torchvision |= {"roi_heads.box_predictor.cls_score.weight": _tensors()["module.a.weight"]}
    found = [b"\0" + pickle.dumps({"model": state, "matching_heuristics": True}, protocol) for protocol in (2, 4)]
    return [*found, b"\1" + _torch({"model": torchvision}), *(b"\2" + json.dumps(header).encode() for header in headers)]


# --- runs ------------------------------------------------------------------------------------------------------------------------------


def checkpoints(root: Path) -> Path:
    """Two checkpoints as the trainer lays them out."""
    import torch
    from safetensors.torch import save_file

    from megainter.files import sha256_of

    for step in (1, 2):
        folder = root / f"step_{step:07d}"
        folder.mkdir(parents=True)
        save_file({"a": torch.arange(4.0)}, folder / "weights-00000-of-00001.safetensors")
        (folder / "trainer.json").write_text(json.dumps({"step": step, "epoch": 0, "sample": 0, "seed": 7}))
        files = [{"file": one.name, "bytes": one.stat().st_size, "sha256": sha256_of(one)} for one in sorted(folder.iterdir())]
        (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    (root / "latest").write_text("step_0000002\n")
    return root


def manifests() -> list[bytes]:
    with scratch() as folder:
        saved = checkpoints(folder / "c") / "step_0000002"
        return [b"\0" + (saved / "manifest.json").read_bytes(), b"\1" + (saved / "trainer.json").read_bytes(), b"\2step_0000001\n"]


def recipes() -> list[bytes]:
    shipped = [(ROOT / "megainter" / "recipes" / f"{name}.toml").read_bytes() for name in ("base", "tiny")
               if (ROOT / "megainter" / "recipes" / f"{name}.toml").is_file()]  # fmt: skip
    short = b'output = "run"\n[data]\npairs = "p"\nstore = "s"\n[training]\nsteps = 1\nglobal_batch = 4\nmicro_batch = 2\n'
    short += b'[optimizer]\ncompat = "official"\n'
    return [short, *shipped]


def hostfiles() -> list[bytes]:
    return [b"worker-1 slots=8\n# a comment\nworker-2 slots=4\n\0worker-1@worker-2:0,2", b"a slots=1\0\0a", b"a slots=2\nb.c slots=1\0a:1"]


def deepspeed_json() -> list[bytes]:
    shipped = [path.read_bytes() for path in sorted((ROOT / "ds_configs").glob("*.json"))]
    sections: dict[str, Any] = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "train_batch_size": "auto", "flops_profiler": {"enabled": False}, "steps_per_print": 10, "wandb": {"enabled": False}, "amp": {},
    }  # fmt: skip
    return [bytes([kind]) + content for kind in range(3) for content in [*shipped, json.dumps(sections).encode()]]


# --- captions, annotations and tables --------------------------------------------------------------------------------------------------

VQA_QUESTIONS = json.dumps({"data_subtype": "val2014", "questions": [{"question_id": 1, "image_id": 2, "question": "Why?"}]}).encode()
_ANSWER = {
    "question_id": 1,
    "question_type": "why",
    "answer_type": "other",
    "multiple_choice_answer": "no",
    "answers": [{"answer": "no"}] * 10,
}
VQA_ANSWERS = json.dumps({"annotations": [_ANSWER]}).encode()


def annotations() -> list[bytes]:
    image = {"id": 1, "file_name": "a.jpg", "width": 10, "height": 9}
    coco = {"images": [image], "annotations": [{"id": 5, "image_id": 1, "caption": "a dog"}]}
    karpathy = {"images": [{"filename": "a.jpg", "filepath": "x", "split": "restval", "sentences": [{"raw": "a dog", "sentid": 3}]}]}
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 0}
    instances = {"images": [image], "annotations": [box], "categories": [{"id": 2, "name": "dog"}]}
    ours = {"image": "a.jpg", "width": 10, "height": 9, "boxes": [[1, 2, 3, 4]], "labels": ["dog"], "split": "val", "image_id": "a"}
    genome = [{"id": 1, "regions": [{"region_id": 2, "phrase": "a dog"}]}]
    gqa = {"07": {"imageId": "2370799", "question": "Is it?", "answer": "yes"}}
    lxmert = [{"question_id": 1, "img_id": "COCO_val2014_000000000002", "sent": "Why?", "label": {"no": 1.0, "yes": 0.3}}]
    tokens = ["Is", [0], "happy", "?"]
    vcr = {"annot_id": "val-0", "img_fn": "a/b.jpg", "metadata_fn": "a/b.json", "objects": ["person"], "question": tokens,
           "answer_choices": [tokens] * 4, "rationale_choices": [tokens] * 4, "answer_label": 1, "rationale_label": 2}  # fmt: skip
    values: list[Any] = [
        coco, karpathy, {"img_path": "a.jpg", "sentences": ["a dog"] * 5}, genome,
        {"image": "a.jpg", "captions": ["a dog"], "split": "dev"}, {"image_urls": ["http://a/b.jpg"], "captions": ["a dog"]},
        instances, ours, json.loads(VQA_QUESTIONS), gqa, {"annotations": [_ANSWER]},
        {"identifier": "dev-1-2-0", "sentence": "Two dogs.", "label": "True"},
        {"Flickr30K_ID": "1.jpg", "pairID": "1#0", "sentence2": "A dog.", "gold_label": "neutral"}, vcr,
    ]  # fmt: skip
    return [bytes([kind]) + json.dumps(value).encode() for kind, value in enumerate(values)] + [b"\x09" + json.dumps(lxmert).encode()]


def delimited() -> list[bytes]:
    glue = "index\tgenre\tsentence1\tsentence2\tscore\n0\tmain\tA plane.\tAn air plane.\t4.250\n"
    texts = [
        'image,caption\na.jpg,"a ""b"" dog"\nb.jpg,"open\nc.jpg,x\n',
        "a dog\thttp://a/b.jpg\nhttp://a/c.jpg\ta cat\n",
        "1.jpg#0\ta dog\n",
        glue,
        "gj\t1\t\tIt is.\n",
    ]
    return [bytes([kind]) + text.encode() for kind, text in enumerate(texts)]


def parquet() -> list[bytes]:
    from megainter.data.tables.boxes import ImageBoxes, write_boxes
    from megainter.data.tables.labelled import Example, TaskFacts, write_examples
    from megainter.data.tables.pairs import Pair, write_pairs
    from megainter.data.tables.questions import Question, write_questions

    example, task = (
        Example("1", "a", "b", ("image",), ("x",), (1.0,), kinds=("k",), split="val"),
        TaskFacts("t", "single_label", ("x", "y"), "accuracy"),
    )
    tokens = ("Is", (0,), "happy")
    question = Question("1", "a", "a.jpg", "a.json", "val", ("person",), tokens, (tokens,) * 4, (tokens,) * 4, 1, 2)
    writers: list[Callable[[Path], object]] = [
        lambda path: write_pairs(path, [Pair("1", "image", "a.jpg", "a dog", "val"), Pair("2", "b", "b.jpg", "a cat")]),
        lambda path: write_boxes(path, [ImageBoxes("image", "a.jpg", 10, 9, BOXES, ["a", "b"], "val")]),
        lambda path: write_examples(path, [example], task),
        lambda path: write_questions(path, [question]),
    ]
    found = [bytes([kind]) + made(write, "t.parquet") for kind, write in enumerate(writers)]
    plain = pa.table({"image": ["a.jpg"], "caption": ["a dog"]})
    return [*found, b"\4" + made(lambda path: pq.write_table(plain, path, compression="none", use_dictionary=False))]
