"""A model's folder in a process that has transformers and no megainter: the same numbers by the file that the folder carries."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForNextSentencePrediction, AutoProcessor

from megainter import (
    InterBertForMultipleChoice,
    InterBertForPreTraining,
    InterBertForRetrieval,
    InterBertForSequenceClassification,
    InterBertModel,
    InterBertProcessor,
)
from megainter.conversion.hugging_face import convert_hugging_face
from megainter.data.feature_store.record import RegionRecord
from megainter.errors import UsageError
from megainter.model import plain
from megainter.model.remote_code import FILE, remote_code
from tests.model.tiny import packed_batch, padded, tiny_model
from tests.places import ROOT

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "red",
    "apple",
    "##s",
    "ca",
    "##fe",
    "crane",
    "鹤",
    "!",
    *(f"w{n}" for n in range(37)),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "first": {"itc_size": 5, "itc_pooling": "first", "fusion": "mul", "region_objective": "class", "tie_objects": True},
    "mean": {"itc_size": 6, "itc_pooling": "mean", "itm_similarity": True, "fusion": "sum", "region_objective": "feature"},
    "feature": {
        "itc_size": 6,
        "itc_pooling": "mean",
        "itc_regions": "first_feature",
        "itm_similarity": True,
        "itm_vectors": True,
        "region_mean": [0.5] * 10,
        "region_deviation": [0.25] * 10,
        "region_feature_dropout_prob": 0.5,
    },
    "flat": {"num_interaction_layers": 0, "num_text_layers": 0, "num_region_layers": 0},
}
TEXTS = ["Red apples", "CAFE café caf\u00e9 [MASK] 鹤鹤!", "", "w1 " * 30, "[SEP] w2\u200bw3\x07 ÀÉ ß"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each variant a folder that `convert hf` wrote; and one with a head for two images."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name, changes in VARIANTS.items():
        model = tiny_model(**changes)
        if name == "first":
            model.config.max_text_tokens, model.config.max_regions = 9, 4
        model.save_pretrained(root / f"{name}-source")
        (root / f"{name}-source" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
        (root / f"{name}-source" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
        convert_hugging_face(root / f"{name}-source", root / name)
        made[name] = root / name
    torch.manual_seed(1)
    config = tiny_model(**VARIANTS["first"]).config
    InterBertForMultipleChoice(config).save_pretrained(root / "choice")
    config.num_images, config.num_labels, config.problem_type = 2, 3, "single_label_classification"
    InterBertForSequenceClassification(config).save_pretrained(root / "two-images")
    return made | {"choice": root / "choice", "two-images": root / "two-images"}


def asked(folder: Path, auto: str, *given: Any, method: str = "", **named: Any) -> dict[str, Any]:
    return {"folder": str(folder), "auto": auto, "method": method, "given": given, "named": named}


def batch(**changes: Any) -> dict[str, torch.Tensor]:
    """Ragged, two columns wider than needed, garbage at padding."""
    return padded(packed_batch(**changes), extra=2, fill=7.0)


def labels() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    shape = batch()
    text, regions = shape["input_ids"].shape, shape["region_features"].shape[1]
    msm = torch.where(torch.rand(text) < 0.4, torch.randint(0, 50, text), -100)
    return {"msm_labels": msm, "mrm_labels": (torch.rand(4, regions - 1) < 0.5).long(), "itm_labels": torch.tensor([0, 1, 0, 0])}


def targets(name: str) -> dict[str, torch.Tensor]:
    width = 7 if name != "mean" else 10
    values = torch.randn(4, batch()["region_features"].shape[1] - 1, width, generator=torch.Generator().manual_seed(4))
    return {"mrm_targets": values if name == "mean" else values.softmax(-1)}


def sides() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    texts = ("input_ids", "attention_mask", "token_type_ids")
    both = batch()
    return {name: both[name] for name in texts}, {name: value for name, value in both.items() if name not in texts}


def choices() -> dict[str, torch.Tensor]:
    """Two examples of two choices, texts that name regions."""
    texts, images = sides()
    named = torch.full_like(texts["input_ids"], -1)
    named[0, 1], named[1, 2], named[3, 0] = 2, 0, 3
    per_choice = {name: value.unflatten(0, (2, 2)) for name, value in (texts | {"text_regions": named}).items()}
    return per_choice | {name: value.unflatten(0, (2, 2)) for name, value in images.items()} | {"labels": torch.tensor([1, 0])}


def two_images() -> dict[str, torch.Tensor]:
    texts, images = sides()
    return (
        {name: value[:2] for name, value in texts.items()}
        | {name: value.unflatten(0, (2, 2)) for name, value in images.items()}
        | {"labels": torch.tensor([2, 0])}
    )


def moved_padding(both: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with its columns in reverse: padding first."""
    return {name: value.flip(1) if "region" not in name else value for name, value in both.items()}


def arrays(seed: int = 0) -> dict[str, Any]:
    """Regions of five images as plain arrays: float16, of one without regions, and of more regions than are taken."""
    draw = np.random.default_rng(seed)
    counts = (3, 0, 7, 1, 5)
    boxes = [np.sort(draw.random((n, 2, 2)), axis=1).reshape(n, 4).astype(np.float32) * 50 for n in counts]
    return {
        "region_features": [draw.standard_normal((n, 10)).astype(np.float16) for n in counts],
        "boxes": boxes,
        "image_sizes": [(50, 60), (51, 61), (70, 50), (55, 55), (64, 99)],
    }


def records(made: dict[str, Any]) -> list[RegionRecord]:
    parts = zip(made["boxes"], made["region_features"], made["image_sizes"], strict=True)
    return [RegionRecord(boxes, features, np.zeros((len(boxes), 7), np.float32), *size) for boxes, features, size in parts]


def flat(made: Any) -> dict[str, torch.Tensor]:
    """What was made by name, the tensors of a tuple each by its own."""
    parts = {key: value for key, value in made.items() if value is not None}
    tuples = {f"{key}.{i}": each for key, value in parts.items() if isinstance(value, tuple) for i, each in enumerate(value)}
    return tuples | {key: value for key, value in parts.items() if not isinstance(value, tuple)}


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each case's name, what the stranger's process answered, and what the package says."""
    cases: list[tuple[str, dict[str, Any], Any]] = []
    texts, images = sides()
    for name in VARIANTS:
        folder = folders[name]
        whole = InterBertForPreTraining.from_pretrained(folder)
        named = batch() | labels() | targets(name)
        cases.append((f"{name}: all", asked(folder, "AutoModelForPreTraining", **named), whole(**named)))
        base, pair = InterBertModel.from_pretrained(folder), InterBertForRetrieval.from_pretrained(folder)
        cases.append((f"{name}: states", asked(folder, "AutoModel", **batch()), base(**batch())))
        matched = batch(seed=5) | {"labels": torch.tensor([0, 0, 1, 1])}
        cases.append((f"{name}: pairs", asked(folder, "AutoModelForNextSentencePrediction", **matched), pair(**matched)))
        looks = batch() | {"output_attentions": True}
        for auto, model in (("AutoModel", base), ("AutoModelForPreTraining", whole), ("AutoModelForNextSentencePrediction", pair)):
            cases.append((f"{name}: looks", asked(folder, auto, **looks), model(**looks)))
        turned = moved_padding(batch())
        cases.append((f"{name}: padding first", asked(folder, "AutoModelForPreTraining", **turned), whole(**turned)))
        cases.append((f"{name}: text alone", asked(folder, "AutoModel", **texts), base(**texts)))
        cases.append((f"{name}: regions alone", asked(folder, "AutoModel", **images), base(**images)))
        if name != "flat":
            of_texts, of_images = packed_batch(regions=(0,) * 4), packed_batch(text=(0,) * 4)
            for auto in ("AutoModelForPreTraining", "AutoModelForNextSentencePrediction"):
                vectors = {"made": whole.vectors_packed(of_texts)[0]}
                alone = padded(of_texts, extra=1)
                text_names = {key: alone[key] for key in texts}
                cases.append((f"{name}: texts", asked(folder, auto, method="encode_texts", **text_names), vectors))
                vectors = {"made": whole.vectors_packed(of_images)[1]}
                alone = padded(of_images, extra=1)
                image_names = {key: alone[key] for key in images}
                cases.append((f"{name}: images", asked(folder, auto, method="encode_images", **image_names), vectors))
        ours = InterBertProcessor.from_pretrained(folder, max_text_tokens=9 if name == "first" else 12)
        plainly = {key: value.long() if key == "region_mask" else value for key, value in ours(TEXTS, records(arrays())).items()}
        cases.append((f"{name}: processor", asked(folder, "AutoProcessor", TEXTS, **arrays()), plainly))
    named = choices() | {"output_attentions": True}
    model: Any = InterBertForMultipleChoice.from_pretrained(folders["choice"])
    cases.append(("choice", asked(folders["choice"], "AutoModelForMultipleChoice", **named), model(**named)))
    model, named = InterBertForSequenceClassification.from_pretrained(folders["two-images"]), two_images()
    cases.append(("two images", asked(folders["two-images"], "AutoModelForSequenceClassification", **named), model(**named)))

    # the stranger's process
    place = tmp_path_factory.mktemp("stranger")
    torch.save([one for _, one, _ in cases], place / "asked.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "tests" / "model" / "stranger.py"), str(place / "asked.pt"), str(place / "answers.pt")]
    done = subprocess.run(script, cwd=place, env=environment | {"PYTHONPATH": str(place)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers, ours_beside = torch.load(place / "answers.pt", weights_only=False)
    for key, value in InterBertForPreTraining.from_pretrained(folders["first"]).state_dict().items():
        assert torch.equal(ours_beside[key], value), key
    return [(name, flat(answered), flat(right)) for (name, _, right), answered in zip(cases, answers, strict=True)]


def test_without_megainter_the_numbers_are_the_same(pairs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    for name, answered, right in pairs:
        assert set(answered) == set(right), name
        for key, value in right.items():
            told = f"{name}, {key}"
            assert answered[key].dtype == value.dtype, told
            torch.testing.assert_close(answered[key], value.detach(), rtol=0, atol=1e-5, msg=lambda text, told=told: f"{told}: {text}")


@pytest.mark.parametrize("name", VARIANTS)
def test_in_double_precision_nothing_but_rounding_is_left(name: str) -> None:
    ours = tiny_model(**VARIANTS[name]).double()
    theirs = plain.InterBertForPreTraining(ours.config).double().eval()
    theirs.load_state_dict(ours.state_dict())
    given = {key: value.double() if value.is_floating_point() else value for key, value in (batch() | labels() | targets(name)).items()}
    right, found = ours(**given), theirs(**given)
    for key in ("loss", "mrm_loss", "text_logits", "region_logits", "itm_logits"):
        tolerance = 1e-5 if "loss" in key else 1e-13  # losses are summed in float32
        torch.testing.assert_close(found[key], right[key], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_roughly_the_same_and_can_be_trained(dtype: torch.dtype) -> None:
    ours = tiny_model(**VARIANTS["first"])
    theirs = plain.InterBertForPreTraining(ours.config).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    right, found = ours(**batch()), theirs.eval()(**batch())
    assert found.text_logits.dtype == dtype
    close = 0.08 if dtype == torch.bfloat16 else 0.01  # of logits that spread by 0.53
    torch.testing.assert_close(found.text_logits.float(), right.text_logits, rtol=0, atol=close)

    theirs.train()(**batch(), **labels(), **targets("first")).loss.backward()
    lacking = [name for name, parameter in theirs.named_parameters() if parameter.grad is None]
    assert all(name.startswith("itc_head") for name in lacking), lacking


def test_the_numbers_compared_are_not_all_alike(pairs: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    for name, answered, _ in pairs:
        spread = {key: value for key, value in answered.items() if value.is_floating_point() and value.dim() == 2 and len(value)}
        assert all(value.std(0).max() > 1e-3 for value in spread.values()), name


def test_the_file_is_one_file_of_plain_pytorch(folders: dict[str, Path]) -> None:
    text = (folders["first"] / FILE).read_text()
    assert text == remote_code()
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names}
    roots = {module.partition(".")[0] for module in modules if module}
    assert roots <= {"__future__", "abc", "collections", "contextlib", "dataclasses", "math", "typing", "numpy", "torch", "transformers"}
    undefined = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", str(folders["first"] / FILE)], capture_output=True, text=True
    )
    assert undefined.returncode == 0, undefined.stdout


def test_where_megainter_is_imported_its_own_class_loads(folders: dict[str, Path]) -> None:
    loaded = AutoModelForNextSentencePrediction.from_pretrained(folders["first"], trust_remote_code=True)
    assert type(loaded) is InterBertForRetrieval


def test_what_a_model_saves_by_itself_has_the_file_too(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_text() == remote_code()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_interbert.InterBertModel"


def test_mixed_batches_and_texts_too_long_are_refused() -> None:
    model = plain.InterBertForRetrieval(tiny_model().config).eval()
    both = batch()
    both["region_mask"][2] = 0
    with pytest.raises(UsageError, match="sample 2 has no regions while others have"):
        model(**both)
    with pytest.raises(UsageError, match=r"13 tokens.*max_position_embeddings = 12"):
        model(input_ids=torch.ones(1, 13, dtype=torch.int64))
    with pytest.raises(UsageError, match="itc_size 0"):
        model.encode_texts(torch.ones(1, 3, dtype=torch.int64))


def test_the_processor_says_what_does_not_go_together(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    processor = AutoProcessor.from_pretrained(folders["first"], trust_remote_code=True)
    with pytest.raises(ValueError, match="belong together"):
        processor(text="red", region_features=arrays()["region_features"])
    with pytest.raises(ValueError, match="1 texts and 5 images"):
        processor(text="red", **arrays())
    wrong = arrays()
    wrong["region_features"][0] = wrong["region_features"][0][:, :4]
    with pytest.raises(ValueError, match=r"\[3, 4\], not \[n, 10\]"):
        processor(**wrong)
    as_tensors = {
        "region_features": [torch.from_numpy(features) for features in arrays()["region_features"]],
        "boxes": [torch.from_numpy(boxes) for boxes in arrays()["boxes"]],
        "image_sizes": arrays()["image_sizes"],
    }
    for key, value in processor(**arrays()).items():
        assert torch.equal(processor(**as_tensors)[key], value)
