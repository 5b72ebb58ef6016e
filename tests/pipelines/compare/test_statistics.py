"""Gains over pairs of seeds, against sums written out and the tables of Student's t."""

import math
import random

import pytest
from scipy.stats import ttest_rel

from kdpipe.pipelines.compare.statistics import gap_closed, paired_gain, spread

# 97.5 % points for 2, 3, 4, 9 degrees of freedom, as printed in textbooks
TABLE = {2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


@pytest.mark.parametrize("count", [3, 4, 5, 10])
def test_the_interval_is_that_of_a_paired_t_test(count: int) -> None:
    draw = random.Random(count)
    plain = {seed: draw.uniform(0.2, 0.5) for seed in range(count)}
    distilled = {seed: plain[seed] + draw.gauss(0.02, 0.01) for seed in range(count)}
    gain = paired_gain(distilled, plain)
    assert gain is not None
    assert gain.interval is not None
    total = 0.0
    for seed in range(count):
        total += distilled[seed] - plain[seed]
    mean = total / count
    squares = 0.0
    for seed in range(count):
        squares += (distilled[seed] - plain[seed] - mean) ** 2
    half = TABLE[count - 1] * math.sqrt(squares / (count - 1) / count)
    assert gain.mean == pytest.approx(mean)
    assert gain.interval == pytest.approx((mean - half, mean + half), abs=2e-4 * half + 1e-6, rel=1e-3)
    other = ttest_rel(list(distilled.values()), list(plain.values())).confidence_interval(0.95)
    assert gain.interval == pytest.approx((other.low, other.high))


def test_pairs_are_those_of_one_seed() -> None:
    gain = paired_gain({0: 0.5, 2: 0.4, 7: 0.3}, {2: 0.3, 0: 0.1, 5: 0.9})
    assert gain is not None
    assert gain.pairs == 2
    assert gain.mean == pytest.approx((0.4 + 0.1) / 2)
    assert gain.interval is None
    assert gain.within_noise is None
    assert paired_gain({0: 0.5}, {1: 0.5}) is None


@pytest.mark.parametrize(
    ("gains", "within_noise"), [((0.1, 0.1, 0.1), False), ((0.0, 0.0, 0.0), True), ((0.3, -0.2, 0.1), True)]
)
def test_an_interval_with_0_in_it_is_noise(gains: tuple[float, ...], within_noise: bool) -> None:
    gain = paired_gain(dict(enumerate(gains)), dict.fromkeys(range(3), 0.0))
    assert gain is not None
    assert gain.within_noise is within_noise


def test_spread() -> None:
    values = [0.1, 0.4, 0.4]
    found = spread(values)
    assert found is not None
    assert (found.lowest, found.highest, found.count) == (0.1, 0.4, 3)
    assert found.mean == pytest.approx(0.3)
    assert found.deviation == pytest.approx(math.sqrt((0.04 + 0.01 + 0.01) / 2))
    single = spread([0.2])
    assert single is not None
    assert single.deviation is None
    assert spread([]) is None


def test_the_gap_is_that_of_seeds_that_both_have() -> None:
    assert gap_closed({0: 0.4, 1: 0.6, 2: 0.9}, {0: 0.2, 1: 0.4, 7: 0.0}, 0.8) == pytest.approx(0.2 / 0.5)
    assert gap_closed({0: 0.4}, {0: 0.2}, 0.2) is None
    assert gap_closed({0: 0.4}, {0: 0.2}, None) is None
    assert gap_closed({0: 0.4}, {1: 0.2}, 0.8) is None
