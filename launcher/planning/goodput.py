"""Goodput of long jobs: the share of time that is useful when machines fail, by a closed form and by drawing the failures."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist


@dataclass(frozen=True)
class Reliability:
    """Seconds: ``mtbf`` of one rank's hardware, ``stall`` of a save, ``restart`` from a failure to the first step after it.

    ``straggle``: standard deviation of a rank's step time as a share of it; the slowest rank sets the pace. ``write``: seconds of a save
    beside training, until which a failure loses what came since the save before.
    """

    mtbf: float
    stall: float
    restart: float
    straggle: float = 0.0
    write: float = 0.0

    def job_mtbf(self, ranks: int) -> float:
        """Mean time between failures of any of ``ranks``."""
        return self.mtbf / ranks


def best_interval(reliability: Reliability, ranks: int) -> float:
    """Seconds between checkpoints by Young's rule, sqrt(2 x MTBF x stall) (Young 1974), and not before the last is written."""
    return max(math.sqrt(2 * reliability.job_mtbf(ranks) * reliability.stall), reliability.write)


def goodput(reliability: Reliability, ranks: int, interval: float) -> float:
    """Useful share of the time under exponential failures, without stragglers (Daly 2006): an interval of work costs

    M e^(R/M) (e^((interval + stall)/M) - 1) seconds on average, with M the job's MTBF and R the restart, which is to include the writing.
    """
    mean = reliability.job_mtbf(ranks)
    exponents = (reliability.restart + reliability.write) / mean, (interval + reliability.stall) / mean
    if sum(exponents) > 700:
        return 0.0
    return interval / (mean * math.exp(exponents[0]) * math.expm1(exponents[1]))


def pace(reliability: Reliability, ranks: int, draw: float = 0.5) -> float:
    """Length of a step against one rank's: 1 + straggle x the largest of ``ranks`` normal deviates, at quantile ``draw``."""
    if not reliability.straggle:
        return 1.0
    quantile = min(max(draw, 1e-12), 1 - 1e-12) ** (1 / ranks)
    return 1 + reliability.straggle * max(NormalDist().inv_cdf(min(quantile, 1 - 1e-15)), 0.0)


def simulate(reliability: Reliability, ranks: int, interval: float, work: float, seed: int = 0, limit: float = 1e4) -> float:
    """Goodput of one drawn history: ``work`` seconds of useful steps, failures drawn exponentially, stragglers drawn per interval.

    Work since the last save is lost with a failure; a failure during a save or a restart counts likewise. Gives up at ``limit`` times
    the work (the job does not get anywhere) and says what it reached.
    """
    draws = random.Random(seed)
    rate = 1 / reliability.job_mtbf(ranks)
    clock = done = 0.0
    next_failure = draws.expovariate(rate)
    while done < work and clock < limit * work:
        portion = min(interval, work - done)
        needed = portion * pace(reliability, ranks, draws.random()) + reliability.stall
        if clock + needed <= next_failure:
            clock, done = clock + needed, done + portion
            continue
        clock = next_failure
        next_failure = clock + draws.expovariate(rate)
        back = reliability.restart + reliability.write  # what ran while the last save was being written is done again
        while clock + back > next_failure and clock < limit * work:  # failed again before it stood
            clock = next_failure
            next_failure = clock + draws.expovariate(rate)
        clock += back
    return done / clock


def curve(reliability: Reliability, ranks: Sequence[int], failures: int = 400, seed: int = 0) -> list[dict[str, float]]:
    """For each number of ranks: Young's interval, goodput by the closed form (times the mean pace) and by simulation.

    Each history holds about ``failures`` failures, or 20,000 intervals where failures are rare.
    """
    rows = []
    for count in ranks:
        interval = best_interval(reliability, count)
        work = max(min(failures * reliability.job_mtbf(count), 20_000 * interval), 100 * interval)
        formula = goodput(reliability, count, interval) / _mean_pace(reliability, count)
        drawn = simulate(reliability, count, interval, work, seed=seed + count, limit=50)
        rows.append({"ranks": count, "interval": interval, "formula": formula, "simulated": drawn})
    return rows


def _mean_pace(reliability: Reliability, ranks: int, samples: int = 400) -> float:
    return sum(pace(reliability, ranks, (number + 0.5) / samples) for number in range(samples)) / samples


def draw_curve(rows: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """The curve as a PNG: closed form as a line, drawn histories as points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    ranks = [row["ranks"] for row in rows]
    axes.plot(ranks, [100 * row["formula"] for row in rows], label="closed form (Young, Daly)")
    axes.plot(ranks, [100 * row["simulated"] for row in rows], "o", label="simulated")
    axes.set(xscale="log", xlabel="ranks", ylabel="useful time, %", title=title, ylim=(0, 101))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
