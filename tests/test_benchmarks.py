"""What the benchmarks count and judge, without timing anything."""

import pytest

from benchmarks.check import ENOUGH, verdicts
from benchmarks.imbalance import imbalance, in_turn, snake


def test_64_ranks_hold_nearly_as_many_tokens_each() -> None:
    ours, plain = (imbalance(64, 16, batches=5, share=share) for share in (snake, in_turn))
    assert 1 <= ours["tokens"] <= ours["tokens_worst"] <= 1.02
    assert ours["operations"] <= 1.02
    assert plain["tokens"] > 1.05, "as they come the fullest rank holds much more: the figure can fail"


def test_a_ratio_that_fell_is_named_and_so_is_one_without_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    recorded = {"fast": 2.0, "slow": 2.0}
    assert verdicts({"fast": 2.0 * ENOUGH, "slow": 2.0 * ENOUGH - 0.01, "new": 9.0}, recorded) == ["slow", "new"]
    assert capsys.readouterr().out.splitlines()[1].startswith("SLOWER  slow: 1.59, on record 2.00")
