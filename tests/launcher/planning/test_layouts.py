"""The plan's arithmetic against the model itself, against saved tensors, and against brute force."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from launcher.planning.device_memory import CPU_BUCKET, Layout, activations, flops_per_step, memory
from launcher.planning.goodput import Reliability, best_interval, curve, goodput, pace, simulate
from launcher.planning.layouts import Corpus, choices, deepspeed_settings, recommended
from launcher.planning.shape import Load, Shape, forward_flops, load_of, parameters, shape_of, tensors
from launcher.planning.timing import Cluster, communication_bytes, device, step_time
from megainter.config.reading import load_config
from megainter.config.settings import RunConfig
from megainter.data.packed import PackedInputs
from megainter.errors import UsageError
from megainter.model.configuration import InterBertConfig
from megainter.model.flops import BatchCounts
from megainter.model.flops import alone_flops as counted_alone
from megainter.model.flops import forward_flops as counted_flops
from megainter.model.interbert import InterBertForPreTraining
from megainter.training import engine

SIZES = {"base": 157_021_565, "large": 342_074_749, "xl": 1_541_360_125, "10b": 9_875_529_085}
SMALL = Shape(
    vocab_size=500, hidden_size=64, intermediate_size=256, num_attention_heads=4, num_region_attention_heads=2, num_interaction_layers=3,
    num_text_layers=2, num_region_layers=2, region_feature_size=32, targets=20, pooler_size=48, max_position_embeddings=64,
    type_vocab_size=2,
)  # fmt: skip


def recipe(name: str, *settings: str) -> RunConfig:
    """A shipped recipe."""
    return load_config(Path(name), settings)


def configuration(shape: Shape) -> InterBertConfig:
    """The model's own configuration for a shape."""
    others = ("targets", "hidden_dropout", "attention_dropout", "itc_means", "itc_feature")
    values = {name: value for name, value in dataclasses.asdict(shape).items() if name not in others}
    drop = 0.1 if shape.hidden_dropout else 0.0
    return InterBertConfig(
        **values, num_region_classes=shape.targets, itc_pooling="mean" if shape.itc_means else "first",
        itc_regions="mean_feature" if shape.itc_feature else "states",
        hidden_dropout_prob=drop, region_hidden_dropout_prob=drop,
        attention_probs_dropout_prob=0.1 if shape.attention_dropout else 0.0,
    )  # fmt: skip


@pytest.mark.parametrize("name", list(SIZES))
def test_every_recipe_has_the_size_it_says(name: str) -> None:
    shape = shape_of(recipe(name))
    assert parameters(shape) == SIZES[name]
    with torch.device("meta"):
        model = InterBertForPreTraining(configuration(shape))
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]
    assert len(list(model.parameters())) == tensors(shape)


@pytest.mark.parametrize(("feature", "vectors"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("means", "similarity"), [(False, False), (True, False), (False, True), (True, True)])
def test_operations_are_those_the_trainer_counts(means: bool, similarity: bool, feature: bool, vectors: bool) -> None:
    load = Load(samples=4, text=9, regions=6, masked_text=2, masked_regions=1)
    lengths = torch.full((4,), 9), torch.full((4,), 6)
    pairs = counted_flops(configuration(SMALL), BatchCounts.of(*lengths, 8, 4))
    assert forward_flops(SMALL, load) == pairs
    contrast = dataclasses.replace(SMALL, itc_size=24, itc_means=means, itc_feature=feature, itm_similarity=similarity, itm_vectors=vectors)
    pairs = counted_flops(configuration(contrast), BatchCounts.of(*lengths, 8, 4))
    assert forward_flops(contrast, load) == pairs + counted_alone(configuration(contrast), *lengths)
    step = flops_per_step(contrast, load, Layout(0, 1, accumulation=2))
    assert step == 2 * (3 * pairs + 4 * counted_alone(configuration(contrast), *lengths)), "both sides alone run once more, before"
    with torch.device("meta"):
        model = InterBertForPreTraining(configuration(contrast))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters(contrast)
    assert len(list(model.parameters())) == tensors(contrast)


@pytest.mark.parametrize("dropout", [True, False])
def test_activations_are_what_autograd_keeps(dropout: bool) -> None:
    """Within 5 %: every storage saved for the backward pass, parameters and logits aside, counted once."""
    shape = dataclasses.replace(SMALL, hidden_dropout=dropout, attention_dropout=dropout)
    load = Load(samples=8, text=24, regions=16, masked_text=0, masked_regions=0)
    expected = activations(shape, load, Layout(0, 1, "fp32"), cpu=True)
    assert expected == pytest.approx(kept_by_autograd(shape, load), rel=0.05)


@pytest.mark.parametrize(
    ("means", "similarity", "feature", "vectors"),
    [
        (False, False, False, False),
        (True, False, False, False),
        (True, True, False, False),
        (True, True, True, False),
        (True, True, False, True),
    ],
)
def test_activations_of_contrast_are_what_autograd_keeps(means: bool, similarity: bool, feature: bool, vectors: bool) -> None:
    """Within 6 %: both sides alone beside the pairs; with means the last layers keep all rows."""
    shape = dataclasses.replace(SMALL, itc_size=24, itc_means=means, itc_feature=feature, itm_similarity=similarity, itm_vectors=vectors)
    load = Load(samples=8, text=24, regions=16, masked_text=0, masked_regions=0)
    expected = activations(shape, load, Layout(0, 1, "fp32"), cpu=True)
    assert expected == pytest.approx(kept_by_autograd(shape, load), rel=0.06)


def kept_by_autograd(shape: Shape, load: Load) -> int:
    """Bytes of the storages that one forward pass on the CPU leaves for the backward pass, with contrast of both its passes."""
    model = InterBertForPreTraining(configuration(shape)).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    tokens, regions = int(load.samples * load.text), int(load.samples * load.regions)
    inputs = PackedInputs(
        torch.randint(5, shape.vocab_size, (tokens,)), torch.zeros(tokens, dtype=torch.int64),
        torch.full((load.samples,), int(load.text)), torch.rand(regions, shape.region_feature_size), torch.rand(regions, 5),
        torch.full((load.samples,), int(load.regions)),
    )  # fmt: skip
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if shape.itc_size:
            vectors = model.vectors_packed(each_alone(inputs))
        scores = model.score_packed(inputs, torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    assert scores.itm_logits.requires_grad
    assert not shape.itc_size or vectors[0].requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def each_alone(inputs: PackedInputs) -> PackedInputs:
    """The batch's texts alone, and then its images alone."""
    nothing = torch.zeros_like(inputs.text_lengths)
    texts, regions = torch.cat([inputs.text_lengths, nothing]), torch.cat([nothing, inputs.region_lengths])
    return dataclasses.replace(inputs, text_lengths=texts, region_lengths=regions)


def test_states_add_up_to_what_zero_promises() -> None:
    """18 bytes a parameter without division (2 + 4 + 12); at stage 3 a 64th of all but the layers in use."""
    shape = shape_of(recipe("10b"))
    count = parameters(shape)
    load = load_of(recipe("10b"), 1)
    alone = memory(shape, load, Layout(2, 1))
    assert alone.weights + alone.gradients + alone.optimizer == 18 * count
    many = memory(shape, load, Layout(3, 64))
    assert many.gradients + many.optimizer == 16 * count / 64
    assert many.weights < 2 * count
    assert memory(shape, load, Layout(3, 64, offload=True)).host == 12 * count / 64


def test_the_copy_for_a_checkpoint_is_the_host_s_and_shared_out() -> None:
    shape, load, count = SMALL, load_of(recipe("base"), 8), parameters(SMALL)
    plain, averaged = (memory(shape, load, Layout(2, 4, averaged=kept)) for kept in (False, True))
    assert (plain.copy, averaged.copy) == (12 * count / 4, 16 * count / 4)
    assert plain.device == averaged.device


def test_a_save_beside_training_is_not_asked_for_more_often_than_it_can_be_written() -> None:
    quick = Reliability(mtbf=50_000 * 3600, stall=0.01, restart=300)
    slow = dataclasses.replace(quick, write=600.0)
    assert best_interval(quick, 1024) < best_interval(slow, 1024) == 600
    assert goodput(slow, 1024, 600) < goodput(quick, 1024, 600)


def test_more_devices_never_need_more_memory_each() -> None:
    shape, load = shape_of(recipe("xl")), load_of(recipe("xl"), 8)
    for stage in range(4):
        sizes = [memory(shape, load, Layout(stage, ranks)).device for ranks in (2, 4, 8, 64)]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("stage", "expected"), [(0, 8), (1, 10), (2, 8 * 4 + 2), (3, (4 + 2 * 2) * 4)])
def test_bytes_sent(stage: int, expected: int) -> None:
    """Per parameter and rank, for many ranks and four micro-batches."""
    ranks = 10**6
    layout = Layout(stage, ranks, accumulation=4)
    assert communication_bytes(SMALL, layout) / parameters(SMALL) == pytest.approx(expected, rel=1e-4)


def test_the_recommended_layout_is_among_the_fastest_that_fit() -> None:
    config = recipe("xl")
    options = choices(config, 8, Cluster(device("a100-40g")), Corpus(10**6, 16, 37))
    best = recommended(options)
    fastest = min(choice.time.total for choice in options if choice.fits)
    assert best.fits
    assert best.memory.device < 40 * 2**30
    assert best.time.total <= 1.03 * fastest
    assert config.training.global_batch == best.micro_batch * best.layout.accumulation * 8


def test_nothing_fits_is_said() -> None:
    config = recipe("10b", "--training.global_batch", "1", "--training.micro_batch", "1")
    with pytest.raises(UsageError, match="nothing fits"):
        recommended(choices(config, 1, Cluster(device("a100-40g")), Corpus(10**6, 16, 37)))


@pytest.mark.parametrize("name", ["v100", "a100-40g", "a100-80g", "h100", "h200", "b200", "mi300x"])
def test_every_device_has_what_a_plan_needs_and_a_source(name: str) -> None:
    found = device(name)
    assert found.source
    assert step_time(SMALL, Load(8, 16, 37, 2, 2), Layout(2, 8, "fp16"), Cluster(found)).total > 0


def test_devices_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[mine]\nmemory = 10\nbf16 = 1\nhbm = 2\nlink = 3\n")
    assert device(str(tmp_path / "mine.toml")).flops == {"bf16": 1e12}
    (tmp_path / "broken.toml").write_text("[mine]\nmemory = 10\n")
    for wrong in (str(tmp_path / "broken.toml"), "h1000"):
        with pytest.raises(UsageError):
            device(wrong)


@pytest.mark.parametrize(("gpu", "precision"), [("v100", "fp16"), ("a100-40g", "bf16"), ("h100", "bf16"), ("mi300x", "bf16")])
def test_auto_is_planned_as_the_gpu_computes(gpu: str, precision: str) -> None:
    options = choices(recipe("base"), 8, Cluster(device(gpu)), Corpus(10**6, 16, 37))
    assert {choice.layout.precision for choice in options} == {precision}
    assert {choice.layout.stage for choice in options} == ({1, 2, 3} if precision == "fp16" else {0, 1, 2, 3})


def test_a_v100_has_no_bf16() -> None:
    with pytest.raises(UsageError, match="bf16"):
        step_time(SMALL, Load(8, 16, 37, 2, 2), Layout(2, 8, "bf16"), Cluster(device("v100")))


@pytest.mark.parametrize("ranks", [1, 64, 4096])
def test_simulation_agrees_with_the_closed_form(ranks: int) -> None:
    reliability = Reliability(mtbf=50_000 * 3600, stall=60, restart=300)
    interval = best_interval(reliability, ranks)
    work = (300 if ranks == 1 else 4000) * reliability.job_mtbf(ranks)
    assert simulate(reliability, ranks, interval, work) == pytest.approx(goodput(reliability, ranks, interval), abs=0.005)


def test_goodput_of_published_targets() -> None:
    """First-order figures of Young and Daly for a stall of 0.3 s and a restart of 30 s."""
    for hours, share in ((8, 0.994), (1, 0.979), (1 / 6, 0.918)):
        reliability = Reliability(hours * 3600, 0.3, 30)
        assert goodput(reliability, 1, best_interval(reliability, 1)) == pytest.approx(share, abs=0.006)


def test_youngs_interval_is_near_the_best() -> None:
    reliability = Reliability(mtbf=3600, stall=5, restart=60)
    young = goodput(reliability, 1, best_interval(reliability, 1))
    best = max(goodput(reliability, 1, seconds) for seconds in range(20, 2000))
    assert young == pytest.approx(best, rel=0.001)


def test_the_slowest_of_many_is_slower() -> None:
    """The median of the largest of n normal deviates, by drawing it."""
    torch.manual_seed(0)
    drawn = torch.randn(2000, 256).amax(1).median().item()
    assert (pace(Reliability(1, 1, 1, straggle=0.1), 256) - 1) / 0.1 == pytest.approx(drawn, abs=0.05)


def test_the_curve_falls_with_the_number_of_ranks() -> None:
    rows = curve(Reliability(mtbf=5e6, stall=20, restart=300, straggle=0.02), [1, 16, 256, 4096])
    assert [row["formula"] for row in rows] == sorted((row["formula"] for row in rows), reverse=True)
    for row in rows:
        assert row["simulated"] == pytest.approx(row["formula"], abs=0.03)
        assert math.isfinite(row["interval"])


def test_the_engine_takes_what_plan_writes(tmp_path: Path) -> None:
    from megainter.training.engine import deepspeed_config

    for stage in range(4):
        for offload in (False, True) if stage else (False,):
            layout = Layout(stage, 2, offload=offload)
            (tmp_path / "ds.json").write_text(json.dumps(deepspeed_settings(layout)))
            words = ("--engine.zero_stage", str(stage), "--engine.precision", "bf16", "--engine.deepspeed", str(tmp_path / "ds.json"))
            config = recipe("base", *words, "--engine.offload_optimizer", str(offload))
            settings = deepspeed_config(config.engine, config.optimizer, config.training, 2)
            assert settings["zero_optimization"]["stage"] == stage


def test_the_plan_knows_the_trainers_bucket_on_the_cpu() -> None:
    assert CPU_BUCKET == engine.CPU_BUCKET
