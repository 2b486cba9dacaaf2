"""What a plan prints: the recommendation first, what it rests on, milliseconds, and remedies that work."""

import json
import re
from pathlib import Path

import pytest

from launcher.planning.layouts import Corpus, choices
from launcher.planning.report import tell
from launcher.planning.settings import PlanSettings
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
    fixed = ("--training.micro_batch", "8")
    with pytest.raises(UsageError, match=f"global_batch 512 is not a multiple of {gpus} devices") as error:
        plan(*fixed, gpus=gpus)
    batches, counts = re.findall(r"--training.global_batch ([\d or]+), or plan for --gpus ([\d or]+)$", str(error.value))[0]
    for batch in batches.split(" or "):
        plan(*fixed, "--training.global_batch", batch, gpus=gpus)
    for count in counts.split(" or "):
        plan(*fixed, gpus=int(count))
