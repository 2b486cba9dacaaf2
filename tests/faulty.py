"""A training command whose ranks misbehave when told: ``python -m tests.faulty pretrain ...``, what tests and chaos start as their worker.

``MEGAINTER_TEST_FAULTS`` holds words ``KIND:RANK:STEP``, with a comma between two: what that rank does after that many steps. Kinds:

- ``loop``: an endless loop of Python; ``hold``: one in C that holds the interpreter;
- ``nan``: a loss that is no number; ``slow``: ``SLOW`` seconds more in each forward, for ``SLOW_STEPS`` steps.

The product knows nothing of it. ``python -m tests.faulty launch ...`` is ``megainter launch`` with this worker.
"""

import os
import re
import sys
import time
from dataclasses import replace
from typing import Any

from megainter.cli import main

VARIABLE = "MEGAINTER_TEST_FAULTS"
SLOW, SLOW_STEPS = 0.2, 20


def faults_of(rank: int) -> dict[str, list[int]]:
    """What this rank does, and after which steps."""
    found: dict[str, list[int]] = {"loop": [], "hold": [], "nan": [], "slow": []}
    for kind, who, step in (word.split(":") for word in os.environ.get(VARIABLE, "").split(",") if word):
        if int(who) == rank:
            found[kind].append(int(step))
    return found


def misbehave(rank: int) -> None:
    """Have the loop of this process do what the variable says: its seed of each micro-batch is asked for just before the forward."""
    from megainter.training import engine, loop

    faults, rate, poisoned = faults_of(rank), engine.set_learning_rate, loop.poisoned
    now: dict[str, Any] = {"step": -1, "hooked": None}

    def before_step(trained: Any, value: float) -> None:
        rate(trained, value)
        step = now["step"] = round(sys._getframe(1).f_locals["step"])
        if step in faults["loop"]:
            endless_loop()
        if step in faults["hold"]:
            re.match(r"(a+)+$", "a" * 60 + "b")  # years, in C
        if any(first <= step < first + SLOW_STEPS for first in faults["slow"]) and not now["hooked"]:
            now["hooked"] = trained.module.register_forward_pre_hook(lambda *_: slow_down())

    def slow_down() -> None:
        if any(first <= now["step"] < first + SLOW_STEPS for first in faults["slow"]):
            time.sleep(SLOW)

    def lost(loss: Any, factor: float) -> Any:
        return poisoned(loss * float("nan") if now["step"] in faults["nan"] else loss, factor)

    engine.set_learning_rate, loop.poisoned = before_step, lost


def endless_loop() -> None:
    """What no signal and no other rank ends."""
    while True:
        pass


def launch_this_worker() -> None:
    """Have ``megainter launch`` start this module on every rank, on other hosts as well."""
    from launcher import launch

    job_of = launch.job_of

    def with_this_worker(*words: Any) -> Any:
        job = job_of(*words)
        given = {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}
        verb = job.module.removeprefix("megainter.")
        return replace(job, module="tests.faulty", arguments=(verb, *job.arguments), environment={**job.environment, **given})

    launch.job_of = with_this_worker


if __name__ == "__main__":
    tokens = [token for token in sys.argv[1:] if not token.startswith("--local_rank")]
    launch_this_worker() if tokens[0] == "launch" else misbehave(int(os.environ.get("RANK", "0")))
    main(tokens)
