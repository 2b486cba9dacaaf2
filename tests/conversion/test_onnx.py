"""ONNX files of a model: in onnxruntime the model's own numbers, for any batch, text length and number of regions."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from megainter import InterBertForMultipleChoice, InterBertForRetrieval, InterBertProcessor
from megainter.conversion import onnx as conversion
from megainter.conversion.onnx import convert_onnx
from megainter.errors import DamagedError, UsageError
from tests.model.tiny import packed_batch, padded, tiny_config, tiny_model

MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
exported = pytest.mark.skipif(bool(MISSING), reason=f"the extra onnx is not installed: {', '.join(MISSING)}")
SHAPES = [((5, 9, 1, 7), (3, 1, 6, 4)), ((2,), (1,)), ((1, 1), (7, 2)), ((12,) * 3, (30, 1, 2))]


def write_model(folder: Path, **changes: Any) -> Path:
    tiny_model(**changes).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" for n in range(45))]) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return folder


def outcome(path: Path, given: dict[str, torch.Tensor]) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: given[name].numpy() for name in names})
    return found


@exported
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"itc_size": 5, "itc_pooling": "first", "fusion": "mul", "tie_objects": True},
        {"itc_size": 6, "itc_pooling": "mean", "fusion": "sum", "region_objective": "feature"},
        {
            "itc_size": 6,
            "itc_pooling": "mean",
            "itc_regions": "mean_feature",
            "itm_similarity": True,
            "itm_vectors": True,
            "region_mean": [0.5] * 10,
            "region_deviation": [0.25] * 10,
        },
    ],
    ids=["first", "mean", "feature"],
)
def test_scores_and_vectors_are_the_models_over_ragged_batches(changes: dict[str, Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", **changes)
    made = convert_onnx(model, tmp_path / "onnx", verify=True)
    assert made.files == ("pair_scorer.onnx", "text_encoder.onnx", "image_encoder.onnx")
    assert made.differences is not None
    assert max(made.differences.values()) < 1e-4
    assert (tmp_path / "onnx" / "vocab.txt").read_text() == (model / "vocab.txt").read_text()

    whole = InterBertForRetrieval.from_pretrained(model).eval()
    for seed, (text, regions) in enumerate(SHAPES):
        pairs = packed_batch(seed, text, regions)
        texts, images = packed_batch(seed, text, (0,) * len(text)), packed_batch(seed, (0,) * len(text), regions)
        right = {
            "pair_scorer": (pairs, whole.score_packed(pairs)),
            "text_encoder": (texts, whole.vectors_packed(texts)[0]),
            "image_encoder": (images, whole.vectors_packed(images)[1]),
        }
        for name, (packed, wanted) in right.items():
            found = outcome(tmp_path / "onnx" / f"{name}.onnx", padded(packed, extra=seed, fill=7.0))
            np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=0, atol=1e-4, err_msg=f"{name} {text} {regions}")


@exported
@pytest.mark.slow
def test_the_card_goes_on_with_the_models_and_its_code_runs(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", itc_size=5)
    (model / "README.md").write_text("---\nlicense: cc-by-4.0\nlibrary_name: transformers\n---\n\n# Ours\n\n## Limits\n\nMany.\n")
    convert_onnx(model, tmp_path / "onnx")
    card = ModelCard.load(tmp_path / "onnx" / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "onnx")
    assert "## Limits\n\nMany." in card.text
    assert "| `text_encoder.onnx` | input_ids, attention_mask, token_type_ids | vectors |" in card.text

    rng = np.random.default_rng(0)
    boxes = [np.array([[0, 0, 5, 5], [2, 2, 9, 8]], np.float32), np.array([[1, 0, 9, 9]], np.float32)]
    given: dict[str, Any] = {
        "folder": tmp_path / "onnx", "texts": ["w1 w2", "w7"], "sizes": [(10, 10), (10, 10)], "boxes": boxes,
        "features": [rng.standard_normal((len(some), 10)).astype(np.float32) for some in boxes],
    }  # fmt: skip
    exec(card.text.split("```python\n")[1].split("```")[0], given)
    whole = InterBertForRetrieval.from_pretrained(model).eval()
    inputs = InterBertProcessor.from_pretrained(model)(
        text=given["texts"], region_features=given["features"], boxes=boxes, image_sizes=given["sizes"]
    )
    with torch.no_grad():
        logits = whole(**inputs).logits
    np.testing.assert_allclose(given["log_odds"], (logits[:, 0] - logits[:, 1]).numpy(), rtol=0, atol=1e-4)


@exported
@pytest.mark.slow
def test_a_model_without_vectors_has_the_scorer_alone_large_ones_two_files_and_a_wrong_outcome_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model")
    monkeypatch.setattr(conversion, "_ONE_FILE", 0)  # as of a model of billions: weights beside the file
    made = convert_onnx(model, tmp_path / "onnx", verify=True)
    assert made.files == ("pair_scorer.onnx",)
    assert made.differences is not None
    assert made.differences["pair_scorer"] < 1e-4
    assert (tmp_path / "onnx" / "pair_scorer.onnx.data").stat().st_size > 80_000
    monkeypatch.setattr(conversion, "TOLERANCE", -1.0)
    with pytest.raises(DamagedError, match=r"pair_scorer.onnx differs from the model"):
        convert_onnx(model, tmp_path / "again", verify=True)
    assert not (tmp_path / "again").exists()


def test_what_must_be_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name.startswith("onnx") else there(name, *rest))
    with pytest.raises(UsageError, match=r"needs onnx, onnxscript: pip install 'megainter\[onnx\]', or pip install onnx onnxscript"):
        convert_onnx(tmp_path / "model", tmp_path / "onnx")


def test_a_model_that_scores_no_pairs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "require_packages", lambda verify: None)
    InterBertForMultipleChoice(tiny_config()).save_pretrained(tmp_path / "choice")
    with pytest.raises(UsageError, match=r"has no itm_head.*scores no pairs"):
        convert_onnx(tmp_path / "choice", tmp_path / "onnx")
