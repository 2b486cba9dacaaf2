"""What is read from a folder of weights: links inside a Hugging Face cache are followed, others are not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from megainter import InterBertForPreTraining, InterBertProcessor
from megainter.conversion.bert import BertStart, convert_bert
from megainter.conversion.foreign_files import open_tensors
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.errors import UsageError
from megainter.files import followed, require_own_files, shard
from megainter.model.folder import read_config
from megainter.tasks.scoring.models import load_model
from tests.model.tiny import tiny_model

SMALL = BertStart(region_feature_size=10, num_region_classes=7, pooler_size=16)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"tok{number}" for number in range(15))]


def cached(folder: Path, cache: Path, name: str = "models--x--bert", snapshot: str = "snapshots/abc") -> Path:
    """A folder as the Hub's client keeps it: files under ``blobs`` by a number, and a revision of links to them."""
    repository = cache / name
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(repository / "blobs" / str(number))
        link = repository / snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(repository / "blobs" / str(number), link.parent))
    return repository / snapshot


def bert(folder: Path, shards: bool = True) -> BertModel:
    """A small BERT as transformers saves it, in shards or not, with a vocabulary."""
    torch.manual_seed(3)
    model = BertModel(BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36))
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model


def ours(folder: Path) -> InterBertForPreTraining:
    model = tiny_model()
    model.save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(45))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return model


@pytest.mark.parametrize("shards", [True, False])
def test_a_bert_in_a_cache_converts(shards: bool, tmp_path: Path) -> None:
    model = bert(tmp_path / "bert", shards)
    snapshot = cached(tmp_path / "bert", tmp_path / "hub")
    assert (snapshot / "model.safetensors.index.json").is_symlink() == shards
    convert_bert(snapshot, tmp_path / "hf", SMALL, verify=True)
    word = InterBertForPreTraining.from_pretrained(tmp_path / "hf").interbert.text_embeddings.word.weight
    assert torch.equal(word, model.embeddings.word_embeddings.weight)


def test_a_cache_reached_through_a_link_and_a_single_file_of_it(tmp_path: Path) -> None:
    bert(tmp_path / "bert", shards=False)
    snapshot = cached(tmp_path / "bert", tmp_path / "hub")
    (tmp_path / "here").symlink_to(snapshot)
    convert_bert(tmp_path / "here", tmp_path / "a", SMALL)
    convert_bert(snapshot / "model.safetensors", tmp_path / "b", SMALL)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


def test_a_model_in_a_folder_of_a_cached_repository(tmp_path: Path) -> None:
    bert(tmp_path / "repository" / "text_encoder")
    snapshot = cached(tmp_path / "repository", tmp_path / "hub")
    convert_bert(snapshot / "text_encoder", tmp_path / "hf", SMALL, verify=True)


def test_an_older_downloads_links_into_the_cache_are_followed(tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    snapshot = cached(tmp_path / "bert", tmp_path / "hub")
    (tmp_path / "local").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "local" / path.name).symlink_to(path.resolve())
    convert_bert(tmp_path / "local", tmp_path / "hf", SMALL, verify=True)


def test_our_own_folder_in_a_cache_is_read_by_every_door(tmp_path: Path) -> None:
    model = ours(tmp_path / "ours")
    snapshot = cached(tmp_path / "ours", tmp_path / "hub", "models--team--interbert")
    assert read_config(snapshot).hidden_size == model.config.hidden_size
    assert InterBertProcessor.from_pretrained(snapshot, max_text_tokens=12).vocabulary.size == 50
    convert_hugging_face(snapshot, tmp_path / "hf", verify=True)
    loaded = load_model(snapshot, InterBertForPreTraining)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


Door = Callable[[Path, Path], object]
DOORS: dict[str, Door] = {
    "open_tensors": lambda folder, _: open_tensors(folder),
    "convert hf": lambda folder, target: convert_hugging_face(folder, target),
    "read_config": lambda folder, _: read_config(folder),
    "load_model": lambda folder, _: load_model(folder, InterBertForPreTraining),
    "processor": lambda folder, _: InterBertProcessor.from_pretrained(folder),
}


@pytest.mark.parametrize("door", DOORS)
def test_weights_that_leave_the_cache_are_not_read(door: str, tmp_path: Path) -> None:
    ours(tmp_path / "ours")
    snapshot = cached(tmp_path / "ours", tmp_path / "hub")
    secret = tmp_path / "secret.safetensors"
    (snapshot / "model.safetensors").resolve().rename(secret)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(secret)
    with pytest.raises(UsageError, match="leaves its"):
        DOORS[door](snapshot, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model-00001-of-{}.safetensors", "model.safetensors.index.json"])
def test_no_file_beside_the_weights_may_leave_the_cache(name: str, tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    snapshot = cached(tmp_path / "bert", tmp_path / "hub")
    link = next(snapshot.glob(name.replace("{}", "*")))
    outside = tmp_path / "outside"
    link.resolve().rename(outside)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(UsageError, match="leaves its"):
        convert_bert(snapshot, tmp_path / "hf", SMALL)


def test_a_shard_of_a_plain_folder_is_no_link_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "model" / "a.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UsageError, match="leaves its folder"):
        shard(tmp_path / "model", "a.safetensors")
    for name in ("../elsewhere.safetensors", "/etc/passwd", "a\0b"):
        with pytest.raises(UsageError, match="leaves its folder"):
            shard(tmp_path / "model", name)


def test_the_users_own_link_to_the_weights_is_followed_outside_a_cache(tmp_path: Path) -> None:
    bert(tmp_path / "bert", shards=False)
    (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "big.safetensors")
    (tmp_path / "bert" / "model.safetensors").symlink_to(tmp_path / "big.safetensors")
    require_own_files(tmp_path / "bert")
    assert followed(tmp_path / "bert" / "model.safetensors").name == "model.safetensors"
    convert_bert(tmp_path / "bert", tmp_path / "hf", SMALL)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    """As the Hub's client once left them, relative to the place it was called from."""
    snapshot = tmp_path / "models--x--bert" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot / "pytorch_model.bin").symlink_to("tmp/models--x--bert/blobs/123")
    with pytest.raises(UsageError, match="link to a file that is not there"):
        open_tensors(snapshot)
