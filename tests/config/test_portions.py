"""What is said where a batch does not divide: each remedy is tried."""

import re
from dataclasses import dataclass

import pytest

from megainter.config.portions import accumulation_steps, multiples_around
from megainter.errors import UsageError


@dataclass
class Portions:
    global_batch: int
    micro_batch: int
    micro_tokens: int | None = None


@pytest.mark.parametrize("batch", [1, 2, 7, 12, 24, 96, 97])
@pytest.mark.parametrize("micro", [1, 5, 8, 64])
@pytest.mark.parametrize("world", [1, 3, 8])
def test_every_remedy_that_is_named_divides(batch: int, micro: int, world: int) -> None:
    try:
        assert accumulation_steps(Portions(batch, micro), world) * micro * world == batch
        return
    except UsageError as error:
        told = str(error)
    (name, words) = re.findall(r": give --training\.(global_batch|micro_batch) ([\d or]+)$", told)[0]
    for number in map(int, words.split(" or ")):
        changed = Portions(number, micro) if name == "global_batch" else Portions(batch, number)
        assert accumulation_steps(changed, world) * changed.micro_batch * world == changed.global_batch


def test_multiples_around_a_number_leave_out_none_at_all() -> None:
    assert multiples_around(100, 12) == [96, 108]
    assert multiples_around(5, 12) == [12]
