"""Chaos: what it draws, what it reads of a run, and one real run that is struck."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import FATAL, Stretch, digests_of, draw_inside, drift, parse, started_at
from tests.places import ROOT
from tests.strikes import flip_a_bit


def test_faults_from_inside_follow_the_seed_and_leave_the_end_alone() -> None:
    words = draw_inside(("nan", "slow", "kill"), random.Random(3), 1000, 100, 4)
    assert words == draw_inside(("nan", "slow", "kill"), random.Random(3), 1000, 100, 4)
    assert words != draw_inside(("nan", "slow", "kill"), random.Random(4), 1000, 100, 4)
    parts = [word.split(":") for word in words.split(",")]
    assert {kind for kind, _, _ in parts} == {"nan", "slow"}
    assert all(int(step) < 900 and 0 <= int(rank) < 4 for _, rank, step in parts)
    assert draw_inside(("kill",), random.Random(3), 1000, 100, 4) == ""


def test_a_flipped_bit_is_one_bit(tmp_path: Path) -> None:
    before = bytes(range(256))
    (tmp_path / "file").write_bytes(before)
    place = flip_a_bit(tmp_path / "file", random.Random(1))
    after = (tmp_path / "file").read_bytes()
    assert int.from_bytes(before, "little") ^ int.from_bytes(after, "little") == 1 << place


def test_where_each_start_went_on_is_read_from_the_log() -> None:
    log = "10:00:00 steps 0 to 300 of 8 samples, 1 micro-batch(es)\n10:01:00 steps 120 to 300 of 8 samples\n"
    assert started_at(log) == [0, 120]


def test_drift_is_of_long_stretches_without_their_beginning_and_the_rank_s_end() -> None:
    samples = [(10 * number, 1000 if number < 10 else 2000 + number, 30 + number % 2) for number in range(39)] + [(390, 500, 7)] * 20
    (found,) = drift([Stretch(1, 0, samples), Stretch(2, 0, samples[:5])], least=200)
    assert found[1] == pytest.approx(2035.5 / 2015.5 - 1, rel=1e-3)
    assert found[2] == (30.5, 30.5)


def test_the_training_command_follows_the_dashes() -> None:
    options, trained = parse(["--output", "x", "--kinds", "kill,nan", "--", "pretrain", "--config", "base"])
    assert (options.kinds, trained) == (("kill", "nan"), ["pretrain", "--config", "base"])
    with pytest.raises(SystemExit):
        parse(["--output", "x", "--kinds", "fire"])


@pytest.mark.slow
def test_a_run_that_is_struck_ends_with_the_weights_of_one_that_is_not(tmp_path: Path) -> None:
    words = ["--seed", "1", "--mtbf", "20", "--steps", "300", "--every", "20", "--hang", "5"]
    command = [sys.executable, "-m", "tests.chaos", "--output", str(tmp_path), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "chaos.json").read_text())
    assert figures["same_weights"]
    assert digests_of(tmp_path / "undisturbed") == digests_of(tmp_path / "disturbed")
    struck = [fault for fault in figures["faults"] if fault["kind"] in FATAL]
    assert struck, "otherwise this shows nothing"
    assert len(figures["attempts"]) > 1
    assert all(fault["resumed"] <= fault["step"] for fault in struck if fault["again"] is not None)
    assert "moments: EQUAL to the undisturbed" in done.stdout
