"""What a plan prints: the recommendation first, what it rests on, milliseconds, and remedies that work."""

import json
import re
from pathlib import Path

import pytest

from launcher.planning.layouts import Corpus, choices
from launcher.planning.report import tell
from launcher.planning.settings import PlanSettings, count
from launcher.planning.timing import Cluster, device
from megainter.config.reading import load_config
from megainter.errors import UsageError


def plan(*overrides: str, **options: object) -> None:
    tell(PlanSettings(**{"config": Path("base"), "gpus": 8, "gpu": "h100", **options}), overrides)  # type: ignore[arg-type]


def test_the_recommendation_comes_first_and_what_it_rests_on_before_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    plan("--model.vocab_size", "21128", pairs=1_000_000, report=tmp_path / "plan.json")
    out = capsys.readouterr().out
    places = [out.index(words) for words in ("recommended: --engine.zero_stage", "assumed: ", "step times and memory", "    stage")]
    assert places == sorted(places)
    assert "a vocabulary of 21,128 entries (the recipe)" in out
    assert "features of 2,048 numbers a region (--model.region_feature_size)" in out
    assert "1,601 classes of regions (--model.num_region_classes)" in out
    assert "1,000,000 captions (--pairs) of 16 tokens (--text-tokens)" in out
    report = json.loads((tmp_path / "plan.json").read_text())
    assert f"assumed: {'; '.join(report['assumed'])}" in out

    # One time, in milliseconds in three places.
    milliseconds = 1000 * report["step_seconds"]
    assert re.search(rf"^  {milliseconds:.1f} ms a step, ", out, re.M)
    table = [line.split() for line in out.splitlines() if re.match(r" +[0-3] +(yes|no)", line)]
    assert f"{milliseconds:.1f}" in {row[-1] for row in table}
    parts = re.search(r"products ([\d.]+) .*elsewhere ([\d.]+), update ([\d.]+), .*hidden ([\d.]+), .*host ([\d.]+)", out)
    assert parts is not None
    assert sum(map(float, parts.groups())) == pytest.approx(milliseconds, abs=0.3)


def test_classes_are_not_assumed_where_regions_are_described_by_features(capsys: pytest.CaptureFixture[str]) -> None:
    plan("--model.region_objective", "feature")
    assert "classes of regions" not in capsys.readouterr().out


def test_what_is_asked_for_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings that a plan would choose itself bind it where they are typed; a recipe's own do not."""
    report = tmp_path / "plan.json"
    for words, settings in (
        (["--engine.zero_stage", "2"], "--engine.zero_stage 2 --training.micro_tokens 16384"),
        (["--training.micro_batch", "16", "--engine.offload_optimizer", "true"],
         "--engine.zero_stage 1 --training.micro_batch 16 --engine.offload_optimizer true"),
        (["--model.gradient_checkpointing", "true", "--engine.zero_stage", "3"],
         "--engine.zero_stage 3 --training.micro_tokens 16384 --model.gradient_checkpointing true"),
    ):  # fmt: skip
        plan(*words, report=report)
        assert json.loads(report.read_text())["settings"] == settings
        stages = {line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r" +[0-3] +(yes|no)", line)}
        assert len(stages) == (1 if "--engine.zero_stage" in words else 3)
    with pytest.raises(UsageError, match="micro_batch 7 does not divide the 64 samples that each of 8 devices has of a step: give 4 or 8"):
        plan("--training.micro_batch", "7")
    with pytest.raises(UsageError, match=r"no layout has --engine\.zero_stage 0"):
        plan("--engine.zero_stage", "0", gpu="v100")  # fp16


def test_devices_of_a_node_are_said_and_a_family_is_told_its_members(capsys: pytest.CaptureFixture[str]) -> None:
    plan(per_node=3)
    assert "3 devices a node (--per-node), 2 in the last; 25 GB/s between nodes (--network)" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"did you mean a100-40g or a100-80g\?"):
        plan(gpu="a100")


def test_steps_are_told_with_the_epochs_that_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    plan(pairs=5_000_000)
    assert "  146,484 steps (15 epochs of 5,000,000 pairs, 512 pairs a step) in " in capsys.readouterr().out
    plan("--training.steps", "1000", pairs=512_000)
    assert "  1,000 steps (1 epoch of 512,000 pairs, 512 pairs a step) in " in capsys.readouterr().out


@pytest.mark.parametrize(("text", "number"), [("5M", 5_000_000), ("2.5m", 2_500_000), ("500k", 500_000), ("5e6", 5_000_000), ("7", 7),
                                              ("5,000,000", 5_000_000), ("5_000", 5_000)])  # fmt: skip
def test_large_numbers_may_be_short(text: str, number: int) -> None:
    assert count(text) == number


@pytest.mark.parametrize("text", ["5X", "1,5M", "1.5", "", "-5", "M", "nan", "1e400", "5 M"])
def test_other_numbers_are_told_the_form(text: str) -> None:
    with pytest.raises(ValueError, match="give one such as 5000000, 5M, 500k or 5e6"):
        count(text)


def test_what_an_offloaded_update_rests_on_is_said_where_one_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    plan(host_memory=80.0)
    assert "moves 80 GB/s of host memory for each device (--host-memory) and 25 GB/s to it (--host-link)" in capsys.readouterr().out
    plan("--engine.zero_stage", "0")
    assert "--host-memory" not in capsys.readouterr().out


def test_a_file_of_a_device_that_is_not_there_is_told_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    with pytest.raises(UsageError, match=r"mien\.toml does not exist or is not a file; did you mean .*mine\.toml\?"):
        plan(gpu=str(tmp_path / "mien.toml"))


CARDS = [("t4", "fp16", 1), ("l4", "bf16", 0), ("rtx3090", "bf16", 0), ("RTX 4090", "bf16", 0), ("rtx-5090", "bf16", 0)]


@pytest.mark.parametrize(("name", "precision", "stage"), CARDS)
def test_cards_of_desks_and_clouds_are_known(name: str, precision: str, stage: int) -> None:
    cluster = Cluster(device(name))
    config = load_config(Path("base"))
    found = choices(config, 1, cluster, Corpus(1000, 16, 37))
    assert {choice.layout.precision for choice in found} == {precision}
    assert min(choice.layout.stage for choice in found) == stage
    assert cluster.device.source
    with pytest.raises(UsageError, match="did you mean rtx4090"):
        device("rtx4091")


@pytest.mark.parametrize("gpus", [3, 7, 12, 100])
def test_devices_that_do_not_divide_the_batch_are_told_what_does(gpus: int) -> None:
    fixed = ("--training.micro_batch", "1")
    with pytest.raises(UsageError, match=f"global_batch 512 is not a multiple of {gpus} devices") as error:
        plan(*fixed, gpus=gpus)
    batches, counts = re.findall(r"--training.global_batch ([\d or]+), or plan for --gpus ([\d or]+)$", str(error.value))[0]
    for batch in batches.split(" or "):
        plan(*fixed, "--training.global_batch", batch, gpus=gpus)
    for fitting in counts.split(" or "):
        plan(*fixed, gpus=int(fitting))
