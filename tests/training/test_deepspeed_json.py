"""DeepSpeed JSONs as public repositories have them: accepted where the run decides, else all that is wrong in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megainter.config.settings import EngineConfig, OptimizerConfig, TrainingConfig
from megainter.deepspeed_json import read_deepspeed_json
from megainter.errors import UsageError
from megainter.precision import Units, automatic_in_training
from tests.places import ROOT
from tests.synthetic import environment

TRAINING = TrainingConfig(global_batch=4, micro_batch=2, steps=1)

# As transformers' documentation gives it and hundreds of repositories have it.
TRAINERS = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": "auto",
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


def laid_over(content: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """The whole configuration of a run with this file, as the loop asks for it."""
    from megainter.training.engine import deepspeed_config

    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    automatic_in_training([Units("x", frozenset({"fp32", "bf16"}))], 2, path)
    engine = EngineConfig(**{"precision": "bf16", "zero_stage": 2, "deepspeed": path, **changes})
    return deepspeed_config(engine, OptimizerConfig(), TRAINING, 2)


# Files of public repositories, on which a run of ZeRO stage 2 in bf16 once went wrong.
CASES: dict[str, dict[str, Any]] = {
    "zero_true": {"zero_optimization": True},
    "bf16_true": {"bf16": True},
    "unknown_inside": {"zero_optimization": {"stage": 2, "ignore_missing_optim_state": True}},
    "offload_against_setting": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "auto_precision": {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": 2}},
    "nvme": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/local_nvme"}}},
    "monitors": {"tensorboard": {"enabled": True}, "zero_optimization": {"stage": 2}},
}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zero_true", r'zero_optimization is true instead of a section; write "zero_optimization": \{"stage": 2\}'),
        ("bf16_true", r'bf16 is true instead of a section; write "bf16": \{"enabled": true\}'),
        (
            "unknown_inside",
            r"unknown DeepSpeed setting zero_optimization.ignore_missing_optim_state; did you mean 'ignore_unused_parameters'",
        ),
        ("offload_against_setting", r"offload_optimizer is on here, engine.offload_optimizer is false; make them agree"),
        ("monitors", r"tensorboard is on, but trackers are the run's"),
    ],
)
def test_a_wrong_file_is_the_users_mistake_and_said_in_one_line(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        laid_over(CASES[name], tmp_path)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_auto_leaves_the_precision_to_the_run(tmp_path: Path) -> None:
    merged = laid_over(CASES["auto_precision"], tmp_path)
    assert merged["bf16"]["enabled"] is True
    assert "enabled" not in merged["fp16"]
    assert laid_over(CASES["auto_precision"], tmp_path, precision="fp32").get("bf16", {}) == {}


def test_nvme_says_what_is_missing_or_is_taken(tmp_path: Path) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    content = CASES["nvme"]
    if AsyncIOBuilder().is_compatible(verbose=False):
        merged = laid_over(content, tmp_path, offload_optimizer=True)
        assert merged["zero_optimization"]["offload_optimizer"]["device"] == "nvme"
        return
    with pytest.raises(UsageError, match="libaio-dev"):
        laid_over(content, tmp_path, offload_optimizer=True)


def test_transformers_own_file_is_accepted_and_the_run_fills_it_in(tmp_path: Path) -> None:
    merged = laid_over(TRAINERS, tmp_path)
    assert "auto" not in json.dumps(merged)
    assert not {"optimizer", "scheduler"} & set(merged)
    assert (merged["train_batch_size"], merged["train_micro_batch_size_per_gpu"], merged["gradient_clipping"]) == (4, 2, 1.0)
    assert merged["zero_optimization"]["allgather_bucket_size"] == 2e8
    from megainter.training.engine import CPU_BUCKET

    assert merged["zero_optimization"]["reduce_bucket_size"] in (CPU_BUCKET, 500_000_000)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", {"type": "AdamW", "params": {"lr": 3e-5, "betas": "auto"}}),
        ("optimizer", {"type": "Lamb", "params": {"lr": "auto"}}),
        ("scheduler", {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}}),
        ("train_batch_size", 32),
        ("gradient_clipping", 0.5),
    ],
)
def test_what_the_run_decides_is_not_decided_by_the_file(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=rf"{name} is .*the run's own \[training\] and \[optimizer\] settings decide that"):
        laid_over({name: value}, tmp_path)


def test_all_wrong_keys_are_named_at_once_with_the_nearest_ones(tmp_path: Path) -> None:
    content = {
        "zero_optimisation": {"stage": 2},
        "zero_optimization": {"stage": 3, "overlap_com": True, "offload_optimizer": {"device": "cpu", "pin_memmory": True}},
        "offload_param": {"device": "cpu"},
        "fp16": {"enabled": True, "loss_scael": 0},
        "wall_clock_breakdown": "yes",
        "flops_profiler": {"enabled": False, "top_module": 1},
        "train_batch_size": 7,
    }
    with pytest.raises(UsageError) as raised:
        laid_over(content, tmp_path)
    text = str(raised.value)
    for said in (
        "train_batch_size is 7", "'zero_optimisation'; did you mean 'zero_optimization'",
        "zero_optimization.overlap_com; did you mean 'overlap_comm'",
        "zero_optimization.offload_optimizer.pin_memmory; did you mean 'pin_memory'", "did you mean zero_optimization.offload_param",
        "fp16.loss_scael; did you mean 'loss_scale'", 'wall_clock_breakdown is "yes"; write true or false',
        "flops_profiler.top_module; did you mean 'top_modules'", "says ZeRO stage 3, engine.zero_stage says 2", "disagree about fp16",
        "offload_optimizer is on here",
    ):  # fmt: skip
        assert said in text, said
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size.* is -1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}}, 'offload_optimizer.device is "disk"'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, "zero_optimization.offload_optimizer is true"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, "offload_optimizer is on here"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param is for ZeRO stage 3"),
        ({"zero_optimization": {"stage": 2, "mics_shard_size": 8}}, "removed zero_optimization.mics_shard_size"),
        ({"fp16": {"enabled": False, "loss_scale": -1}}, "fp16.loss_scale"),
        ({"amp": {"enabled": True, "opt_level": "O1"}}, "removed amp"),
        ({"wandb": {"enabled": True}}, "wandb is on"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency is not for this trainer"),
        ({"steps_per_print": "often"}, "steps_per_print"),
        ({"data_types": {"grad_accum_dtype": 7}, "zero_optimization": {"stage": True}}, "ZeRO stage|zero_optimization.stage"),
        # Reports of users: deepspeedai/DeepSpeed#2721, FlagOpen/FlagEmbedding#1487, Lightning-AI/pytorch-lightning#17790.
        (
            {"zero_optimization": {"stage": 2, "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1}}},
            "zero_optimization.aio; it stands beside that section",
        ),
        (
            {"bf16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "loss_scale_window": 1000, "hysteresis": 2}},
            "bf16.loss_scale; did you mean fp16.loss_scale.*bf16.hysteresis; did you mean fp16.hysteresis",
        ),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu",} "contiguous_gradients": true}}',
            "offload_optimizer is on here",  # DeepSpeed\'s own reader does without the comma
        ),
        ([1, 2], "instead of an object of settings"),
        ('{"bf16": {"enabled": true}, "bf16": {"enabled": false}}', "'bf16' is there twice"),
        ('{"zero_optimization": {"stage": 2', "not valid JSON"),
    ],
)  # fmt: skip
def test_other_projects_mistakes_end_in_one_line(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        laid_over(content, tmp_path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 700


def test_what_is_switched_off_asks_for_nothing(tmp_path: Path) -> None:
    off = {
        "amp": {"enabled": False}, "elasticity": {"enabled": False}, "sparse_gradients": False, "tensorboard": {"enabled": False},
        "curriculum_learning": {"enabled": False}, "checkpoint": {}, "autotuning": {"enabled": False}, "wandb": {"enabled": "auto"},
    }  # fmt: skip
    assert not set(off) & set(laid_over(off, tmp_path))


def test_comments_and_the_older_name_of_bf16_are_read_as_deepspeed_reads_them(tmp_path: Path) -> None:
    merged = laid_over('{\n  // half precision\n  "bfloat16": {"enabled": true},\n  "zero_optimization": {"stage": 2,},\n}\n', tmp_path)
    assert merged["bf16"]["enabled"] is True
    assert "bfloat16" not in merged


def test_an_offload_that_both_ask_for_is_taken(tmp_path: Path) -> None:
    for part in ({"offload_optimizer": {"device": "cpu"}}, {"offload_optimizer": {"device": "cpu", "buffer_count": 5}}, {}):
        merged = laid_over({"zero_optimization": {"stage": 2, **part}}, tmp_path, offload_optimizer=True)
        assert merged["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(UsageError, match=r"offload_optimizer is off here, engine\.offload_optimizer is true"):
        laid_over({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, tmp_path, offload_optimizer=True)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_own_files_hold_no_key_twice_and_nothing_unknown(path: Path) -> None:
    from megainter.deepspeed_json import wrong_settings
    from megainter.training.engine import OURS, SECTIONS

    assert list(wrong_settings(read_deepspeed_json(path), SECTIONS, OURS)) == []


def test_a_hidden_output_can_be_written_flushed_and_asked_for_its_encoding(capfd: pytest.CaptureFixture[str]) -> None:
    from megainter.training.engine import hidden_output

    with hidden_output():
        print("hidden")
        sys.stdout.flush()
        assert sys.stdout.encoding
        os.fstat(sys.stdout.fileno())
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_an_op_is_built_while_the_output_is_hidden(tmp_path: Path) -> None:
    code = (
        "import torch.utils.cpp_extension as ext\n"
        "from megainter.training.engine import hidden_output\n"
        "with hidden_output():\n"
        "    built = ext.load_inline('seven', 'int seven() { return 7; }', functions=['seven'], verbose=True)\n"
        "assert built.seven() == 7\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"TORCH_EXTENSIONS_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
