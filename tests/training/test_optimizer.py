"""Parameter groups, per-tensor clipping and the schedule, against what they are said to be."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megainter import InterBertConfig
from megainter.config.reading import load_config
from megainter.config.settings import OptimizerConfig, RunConfig, TrainingConfig, as_dict
from megainter.conversion.official_names import official_name
from megainter.errors import UsageError
from megainter.model.interbert import InterBertForPreTraining
from megainter.training.clipping import clip_each
from megainter.training.ema import EMA, decay_at, update_average
from megainter.training.optimizer import build_optimizer, describe, first_step_count, learning_rate, parameter_groups, rate_factors
from tests.model.tiny import tiny_config

GOOD = ["--output", "run", "--data.pairs", "p.parquet", "--data.store", "s", "--training.steps", "10"]


@pytest.mark.parametrize(("decay_groups", "decaying"), [("right", 2), ("swapped", 1)])
def test_every_parameter_is_in_one_group_and_the_right_kind_decays(decay_groups: str, decaying: int) -> None:
    model = InterBertForPreTraining(tiny_config())
    decayed, plain = parameter_groups(model, OptimizerConfig(weight_decay=0.1, decay_groups=decay_groups))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(id(p) for group in (decayed, plain) for p in group["params"]) == sorted(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {parameter.ndim for parameter in decayed["params"]} == {decaying}
    assert {parameter.ndim for parameter in plain["params"]} == {3 - decaying}


def test_what_does_not_decay_is_the_official_list() -> None:
    """The official code's rule on the official names: no decay where "bias", "LayerNorm.bias" or "LayerNorm.weight" is in it."""
    model = InterBertForPreTraining(tiny_config())
    names = {id(parameter): official_name(name, model.config) for name, parameter in model.named_parameters()}
    for group in parameter_groups(model, OptimizerConfig(weight_decay=0.1)):
        for parameter in group["params"]:
            listed = any(part in names[id(parameter)] for part in ("bias", "LayerNorm.bias", "LayerNorm.weight"))
            assert listed == (group["weight_decay"] == 0), names[id(parameter)]


def test_the_start_rate_is_for_the_197_names_of_a_bert() -> None:
    """In the default model, counted as the official list of names is: embeddings and the 12 layers of encoder.layer."""
    with torch.device("meta"):
        model = InterBertForPreTraining(InterBertConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    factors = rate_factors(list(sizes), OptimizerConfig(start_rate=0.1))
    slow = [name for name, factor in factors.items() if factor == 0.1]
    assert all(official_name(name, model.config).startswith(("bert.embeddings.", "bert.encoder.layer.")) for name in slow)
    assert (len(slow), sum(sizes[name] for name in slow)) == (197, 108_891_648)
    assert set(factors.values()) == {0.1, 1.0}


def test_rates_fall_with_the_depth_below_the_heads() -> None:
    model = InterBertForPreTraining(tiny_config(num_interaction_layers=2, num_text_layers=1, num_region_layers=3))
    factors = rate_factors([f"model.{name}" for name, _ in model.named_parameters()], OptimizerConfig(layer_decay=0.5))
    depths = {
        "itm_head.weight": 0, "msm_head.norm.bias": 0, "interbert.text_pooler.dense.weight": 0,
        "interbert.encoder.region.2.output.weight": 1, "interbert.encoder.region.0.output.bias": 3,
        "interbert.encoder.text.0.attention.query.weight": 1,
        "interbert.encoder.interaction.1.attention_norm.weight": 4, "interbert.encoder.interaction.0.output.weight": 5,
        "interbert.text_embeddings.word.weight": 6, "interbert.region_embeddings.location.bias": 6,
    }  # fmt: skip
    assert {name: factors[f"model.{name}"] for name in depths} == {name: 0.5**depth for name, depth in depths.items()}


def test_other_models_have_one_rate() -> None:
    layer = nn.Linear(3, 2)
    groups = parameter_groups(layer, OptimizerConfig(layer_decay=0.5, start_rate=0.1))
    assert [group["rate_factor"] for group in groups] == [1.0, 1.0]


@pytest.mark.parametrize("corrected", [True, False])
def test_a_step_is_the_textbook_one(corrected: bool) -> None:
    """One update with decoupled decay, by hand; without bias correction, the moments of the first step are 0.1 g and 0.001 g^2."""
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    settings = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, epsilon=1e-6, bias_correction=corrected)
    optimizer = build_optimizer(layer, settings, torch.device("cpu"))
    for parameter in layer.parameters():
        moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(first_step_count(settings)), **moments}
    layer(torch.ones(1, 3)).sum().backward()
    gradient = layer.weight.grad
    assert gradient is not None
    optimizer.step()
    m, v = (gradient, gradient.square()) if corrected else (0.1 * gradient, 0.001 * gradient.square())
    expected = before * (1 - 0.1 * 0.5) - 0.1 * m / (v.sqrt() + 1e-6)
    assert torch.allclose(layer.weight, expected, atol=1e-6)


def test_clipping_each_tensor_is_torchs_for_each() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size) * scale for size, scale in ((5, 0.01), (40, 3.0), (1, 0.0), (7, 1.0))]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
        nn.utils.clip_grad_norm_(parameter, 0.5)
    clip_each(dict(enumerate(gradients)), len(gradients), 0.5, torch.device("cpu"), sharded=False)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_average_follows_the_weights() -> None:
    weights = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.SGD([weights])
    optimizer.state[weights] = {EMA: torch.tensor([0.0, 4.0])}
    update_average(optimizer, 0.75)
    assert torch.equal(optimizer.state[weights][EMA], torch.tensor([0.25, 3.5]))
    assert torch.equal(weights.detach(), torch.tensor([1.0, 2.0]))


def test_the_average_reaches_back_over_a_tenth_of_the_run_until_its_decay_is_long_enough() -> None:
    """Weights that are as large as their step is late tell their mean age: 0.9 n after n steps, and the usual lag once decay is reached."""
    settings = TrainingConfig(steps=1, ema_decay=0.98)
    average, start_share = 0.0, 1.0
    for step in range(1, 5001):
        decay = decay_at(settings, step)
        assert decay <= 0.98
        average, start_share = decay * average + (1 - decay) * step, start_share * decay
        if step <= 400:
            assert average == pytest.approx(0.9 * step)
        if step == 12:
            assert start_share < 1e-5
    assert average == pytest.approx(5000 - 0.98 / 0.02)
    assert {decay_at(replace(settings, ema_warmup=False), step) for step in (1, 2, 1000)} == {0.98}  # as released


def switches(config: RunConfig) -> tuple[bool, str, str, float]:
    """The four switches ``optimizer.compat`` stands for."""
    chosen = config.optimizer
    return chosen.bias_correction, chosen.clip, chosen.decay_groups, chosen.start_rate


def test_compat_official_from_a_bert(tmp_path: Path) -> None:
    config = load_config(None, [*GOOD, "--optimizer.compat", "official", "--model.start_from", "bert"])
    assert switches(config) == (False, "tensor", "swapped", 0.1)
    assert "compat" not in as_dict(config)["optimizer"]  # the run records what it stands for


def test_compat_official_from_fresh_weights() -> None:
    """As in the released code, whose swapped groups and slower rate are in the branch for pretrained weights."""
    assert switches(load_config(None, [*GOOD, "--optimizer.compat", "official"])) == (False, "tensor", "right", 1.0)


def test_what_is_given_beside_compat_stays(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[optimizer]\ncompat = "official"\nclip = "global"\n[model]\nstart_from = "bert"\n')
    config = load_config(recipe, [*GOOD, "--optimizer.decay_groups", "right"])
    assert switches(config) == (False, "global", "right", 0.1)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["--optimizer.compat", "bert"], "optimizer.compat: 'bert' is unknown; choose official"),
        (["--optimizer.start_rate", "0.1"], "give model.start_from"),
        (["--optimizer.layer_decay", "0"], "optimizer.layer_decay"),
        (["--training.ema_decay", "1"], "training.ema_decay"),
    ],
)
def test_mistakes_are_one_clear_line(tokens: list[str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, [*GOOD, *tokens])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_log_says_what_is_unusual() -> None:
    model = InterBertForPreTraining(tiny_config())
    usual, official = OptimizerConfig(), OptimizerConfig(bias_correction=False, clip="tensor", decay_groups="swapped", start_rate=0.1)
    assert describe(usual, parameter_groups(model, usual)) == "AdamW, decay 0.01 on matrices, one rate, clipping the whole gradient to 1"
    said = describe(official, parameter_groups(model, official))
    assert all(part in said for part in ("BertAdam", "swapped", "x 0.1 to 1", "each tensor"))


@pytest.mark.parametrize("total", [1, 7, 100, 1001])
def test_schedule_rises_to_the_peak_and_falls_to_the_end(total: int) -> None:
    settings = OptimizerConfig(learning_rate=2.0, warmup=0.1, final_fraction=0.25)
    rates = [learning_rate(settings, step, total) for step in range(total)]
    peak = rates.index(max(rates))
    assert max(rates) == 2.0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert learning_rate(settings, total, total) == pytest.approx(0.5)
    assert min(rates) > 0
