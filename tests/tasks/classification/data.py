"""Small labelled sets, a model and a BERT to start from: words that are good or bad, and images of colours that texts ask for."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForMaskedLM

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.data.tables.labelled import Example, TaskFacts, write_examples
from megainter.data.tables.pairs import read_pairs
from megainter.data.text.vocabulary import SPECIALS
from tests.synthetic import CLASSES, FEATURE_SIZE, TINY

GOOD, BAD, NEUTRAL = ("fine", "great", "lovely"), ("awful", "dull", "poor"), ("a", "the", "film", "plot", "actor", "and", "scene")
WORDS = (*GOOD, *BAD, *NEUTRAL, *CLASSES[1:], "is", "there", "what", "colours", "left", "##s", "?", ",")


def write_start(folder: Path) -> Path:
    """A random InterBERT with its vocabulary."""
    _write_vocabulary(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "region_feature_size": FEATURE_SIZE, "num_region_classes": len(CLASSES), "max_position_embeddings": 24}
    config = InterBertConfig(**sizes, initializer_range=0.2, max_regions=6, **TINY)
    InterBertForPreTraining(config).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """A random BERT of the same vocabulary."""
    _write_vocabulary(folder)
    torch.manual_seed(1)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 2}
    BertForMaskedLM(BertConfig(**sizes, max_position_embeddings=24, initializer_range=0.2)).save_pretrained(folder)
    return folder


def _write_vocabulary(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in (*SPECIALS, *WORDS)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))


def write_reviews(path: Path, count: int = 240, regression: bool = False) -> Path:
    """Sentences with one to four judging words; the label says whether more of them are good (or how many more)."""
    rng = np.random.default_rng(5)
    rows = []
    for number in range(count):
        good, bad = 0, 0
        while good == bad:
            good, bad = (int(n) for n in rng.integers(0, 3, 2))
        words = [*rng.choice(GOOD, good), *rng.choice(BAD, bad), *rng.choice(NEUTRAL, rng.integers(2, 7))]
        text = " ".join(rng.permutation(words))
        labels, targets = ((), (float(good - bad),)) if regression else (("good" if good > bad else "bad",), (1.0,))
        rows.append(Example(f"r{number}", text, "", (), labels, targets, split="train" if number % 4 else "val"))
    kind = ("regression", (), "spearman") if regression else ("single_label", ("bad", "good"), "accuracy")
    write_examples(path, rows, TaskFacts("reviews", *kind))  # type: ignore[arg-type]
    return path


def colours(pairs: Path) -> dict[str, set[str]]:
    """The colours of each image, which its captions name."""
    found = read_pairs(pairs)
    return {found.image_id(row): set(found.caption(row).replace(",", "").split()) & set(CLASSES) for row in range(len(found))}


def write_questions(path: Path, pairs: Path) -> Path:
    """What colours an image has, answered by ten people each of whom names one that is there."""
    rng, rows = np.random.default_rng(6), []
    for number, (image, shown) in enumerate(colours(pairs).items()):
        names, counts = np.unique(rng.choice(sorted(shown), 10), return_counts=True)
        targets = tuple(min(int(count) / 3, 1.0) for count in counts)
        kinds = ("answer: other", f"question: {'many' if len(names) > 2 else 'few'}")
        split = "train" if number % 3 else "val"
        answers = {"labels": tuple(map(str, names)), "targets": targets, "counts": tuple(map(int, counts))}
        rows.append(Example(f"q{number}", "what colours are there?", images=(image,), kinds=kinds, split=split, **answers))
    write_examples(path, rows, TaskFacts("questions", "multi_label", CLASSES[1:], "vqa_accuracy"))
    return path


def write_image_pairs(path: Path, pairs: Path, count: int = 160) -> Path:
    """Whether the left image has a colour that the right one lacks; sentences come in groups of four."""
    shown, rng, rows = colours(pairs), np.random.default_rng(7), []
    images = sorted(shown)
    for number in range(count):
        left, right = rng.choice(images, 2, replace=False)
        colour = str(rng.choice(sorted(shown[left] | shown[right])))
        label = str(colour in shown[left] and colour not in shown[right])
        split = "train" if number % 4 else "val"
        rows.append(Example(f"p{number}", f"{colour} is left", "", (left, right), (label,), (1.0,), group=f"g{number // 16}", split=split))
    write_examples(path, rows, TaskFacts("pairs", "single_label", ("False", "True"), "accuracy"))
    return path


def settings(start: Path, examples: Path, output: Path, **changes: object) -> list[str]:
    """Command-line settings of a tiny run; ``changes`` are given with ``__`` for the dot."""
    values: dict[str, object] = {
        "output": output, "data.examples": examples, "data.max_text_tokens": 16, "data.workers": 0, "model.start_from": start,
        "model.hidden_dropout_prob": 0, "model.attention_probs_dropout_prob": 0, "model.region_hidden_dropout_prob": 0,
        "training.steps": 12, "training.global_batch": 16, "training.micro_batch": 4, "training.log_every": 1, "training.seed": 7,
        "optimizer.learning_rate": 0.003, "engine.precision": "fp32", "engine.zero_stage": 1, "checkpoint.every_steps": 1000,
        "validation.every_steps": 0, "tensorboard": "false",
    }  # fmt: skip
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [text for key, value in values.items() for text in (f"--{key}", str(value))]
