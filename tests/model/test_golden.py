"""The model against numbers written by the original implementation (its weights drawn by the stated recipe)."""

import json
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from megainter import InterBertConfig, InterBertForPreTraining
from megainter.conversion.official_names import official_names
from tests.places import ROOT

GOLDEN = ROOT / "tests" / "assets" / "interbert_tiny_mul.npz"
OURS_OF_OFFICIAL = {
    "num_hidden_layers": "num_interaction_layers",
    "t_num_hidden_layers": "num_text_layers",
    "v_num_hidden_layers": "num_region_layers",
    "v_num_attention_heads": "num_region_attention_heads",
    "v_feature_size": "region_feature_size",
    "v_target_size": "num_region_classes",
    "bi_hidden_size": "pooler_size",
}


def drawn_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)
    if key.endswith("LayerNorm.weight"):
        return torch.from_numpy(1 + np.float32(0.1) * x)
    return torch.from_numpy((0.1 if key.endswith("bias") else 0.08) * x)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def model(golden: dict[str, np.ndarray]) -> InterBertForPreTraining:
    meta = json.loads(str(golden["meta"]))
    sizes = {OURS_OF_OFFICIAL.get(k, k): v for k, v in meta["config"].items() if k not in ("v_hidden_size", "v_intermediate_size")}
    model = InterBertForPreTraining(InterBertConfig(**sizes, fusion=meta["fusion"])).eval()
    names = official_names([name for name, _ in model.named_parameters()], model.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn_weight(names[name], tuple(parameter.shape)))
    return model


@pytest.fixture(scope="module")
def batch(golden: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    batch = {name.removeprefix("in_"): torch.from_numpy(array) for name, array in golden.items() if name.startswith("in_")}
    batch["msm_labels"] = batch["msm_labels"].masked_fill(batch["msm_labels"] == -1, -100)
    return batch


def assert_near(ours: torch.Tensor, theirs: np.ndarray) -> None:
    torch.testing.assert_close(ours.detach(), torch.from_numpy(theirs), atol=2e-5, rtol=2e-5)


def test_logits_at_real_positions(golden: dict[str, Any], model: InterBertForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    out = model(**batch)
    text, regions = batch["attention_mask"].bool(), batch["region_mask"].bool()
    assert_near(out.text_logits[text], golden["out_text_logits"][text.numpy()])
    assert_near(out.region_logits[regions], golden["out_region_logits"][regions.numpy()])
    assert_near(out.itm_logits, golden["out_itm_logits"])
    # the original computes padded positions too (their values depend on nothing real); here they are zeros
    assert not out.text_logits[~text].any()
    assert not out.region_logits[~regions].any()


@pytest.mark.parametrize("output_logits", [True, False])
def test_losses(golden: dict[str, Any], model: InterBertForPreTraining, batch: dict[str, torch.Tensor], output_logits: bool) -> None:
    out = model(**batch, output_logits=output_logits)
    for name in ("msm_loss", "mrm_loss", "itm_loss"):
        assert_near(out[name].reshape(1), golden[f"out_{name}"])
    torch.testing.assert_close(out.loss, out.msm_loss + out.mrm_loss + out.itm_loss)


def test_gradient_norm_of_every_parameter(golden: dict[str, Any], model: InterBertForPreTraining, batch: dict[str, torch.Tensor]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()
    names = official_names([name for name, _ in model.named_parameters()], model.config)
    expected = dict(zip(map(str, golden["out_grad_names"]), golden["out_grad_norms"].tolist(), strict=True))
    assert set(names.values()) == set(expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # a constant added to all keys changes no attention weight: those gradients are rounding noise around 0
        noise = 1e-7 if name.endswith("key.bias") else 0.0
        assert float(parameter.grad.norm()) == pytest.approx(expected[names[name]], rel=1e-4, abs=noise), name
