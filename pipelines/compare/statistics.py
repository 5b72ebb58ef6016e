"""Figures of several seeds: their spread, and what one choice gains over another."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t

__all__ = ["LEAST_PAIRS", "Gain", "Spread", "gap_closed", "median_of", "paired_gain", "spread"]

LEAST_PAIRS = 3  # for an interval
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Figures of several seeds.

    Attributes:
        mean: Their mean.
        deviation: Sample standard deviation; None of a single one.
        lowest, highest: The ends.
        count: How many there are.
    """

    mean: float
    deviation: float | None
    lowest: float
    highest: float
    count: int


@dataclass(frozen=True)
class Gain:
    """Mean difference over pairs of the same seed.

    Attributes:
        mean: The mean difference.
        pairs: How many there are.
        interval: Student's t interval of 95 % of the mean; None of fewer than three pairs.
    """

    mean: float
    pairs: int
    interval: tuple[float, float] | None

    @property
    def within_noise(self) -> bool | None:
        """Whether the interval contains 0; None without one."""
        return None if self.interval is None else self.interval[0] <= 0 <= self.interval[1]


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and spread of figures; None of none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, min(values), max(values), len(values))


def paired_gain(values: Mapping[int, float], baseline: Mapping[int, float]) -> Gain | None:
    """What is gained over a baseline, by seeds that both have: a paired t interval.

    Args:
        values: Figure per seed.
        baseline: The same of what is compared with.

    Returns:
        The gain; None where no seed is in both.
    """
    gains = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    if not gains:
        return None
    mean, count = statistics.fmean(gains), len(gains)
    if count < LEAST_PAIRS:
        return Gain(mean, count, None)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * statistics.stdev(gains) / math.sqrt(count)
    return Gain(mean, count, (mean - half, mean + half))


def gap_closed(values: Mapping[int, float], baseline: Mapping[int, float], target: float | None) -> float | None:
    """Share of the distance from a baseline to a target, over seeds that both have.

    Args:
        values: Figure per seed.
        baseline: The same of what is compared with.
        target: What they are on the way to, such as the teacher's AP.

    Returns:
        The share; None where the target is not known or not above the baseline, or no seed is in both.
    """
    seeds = values.keys() & baseline.keys()
    if target is None or not seeds:
        return None
    before = statistics.fmean(baseline[seed] for seed in seeds)
    if target <= before:
        return None
    return (statistics.fmean(values[seed] for seed in seeds) - before) / (target - before)


def median_of(results: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Median of a figure over the results that have it; None where none has."""
    values = [result[name] for result in results if result.get(name) is not None]
    return statistics.median(values) if values else None
