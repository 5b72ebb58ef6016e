"""The learning rate of every step, as mmengine's schedulers make it."""

import copy
import math
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from kdpipe.pipelines.training.schedule import cosine_schedule, doubt_of_warmup, schedule_shape, wind_forward

PEAK = 0.02


def begin(schedule: list[dict[str, Any]], peak: float = PEAK) -> tuple[OptimWrapper, list[Any]]:
    """An optimiser of one weight, and its schedulers."""
    optimizer = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak))
    return optimizer, [PARAM_SCHEDULERS.build(each, default_args={"optimizer": optimizer}) for each in schedule]


def train(optimizer: OptimWrapper, schedulers: list[Any], steps: int) -> list[float]:
    """The rate of each step."""
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return rates


def expected(total: int) -> list[float]:
    """Up from a thousandth in a sixth of the steps, at most 500, if that is more than one; then half a cosine."""
    warmup = min(500, total // 6)
    warmup = warmup if warmup > 1 else 0
    ramp = [PEAK * (0.001 + 0.999 * step / (warmup - 1)) for step in range(warmup)]
    left = total - warmup
    return ramp + [PEAK * (1 + math.cos(math.pi * step / left)) / 2 for step in range(left)]


@pytest.mark.parametrize("total", [*range(1, 51), 300, 5000])
def test_the_rate_of_every_step(total: int) -> None:
    rates = train(*begin(cosine_schedule(total)), total)
    assert rates == pytest.approx(expected(total), rel=1e-6)
    assert max(rates) == pytest.approx(PEAK)
    assert min(rates) > 0


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (2, 3), (3, 4), (5, 7), (12, 4), (50, 1), (2, 600)])
def test_wound_forward_to_any_epoch(epochs: int, steps: int) -> None:
    """All that is left has the rate, and the schedulers the state, of a training that was not stopped: bit for bit."""
    schedule = cosine_schedule(epochs * steps)
    straight = begin(schedule)
    rates = train(*straight, epochs * steps)
    for done in range(epochs + 1):
        resumed = begin(schedule)
        wind_forward(resumed[1], done, steps)
        assert train(*resumed, (epochs - done) * steps) == rates[done * steps :]
        ended = [[scheduler.state_dict() for scheduler in each[1]] for each in (resumed, straight)]
        assert ended[0] == ended[1]


def test_schedules_that_go_by_epochs() -> None:
    schedule = [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 3},
        {"type": "MultiStepLR", "milestones": [2, 4], "gamma": 0.1, "by_epoch": True, "begin": 0, "end": 6},
    ]
    optimizer, schedulers = begin(schedule)
    wind_forward(schedulers, 2, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * 0.1)
    wind_forward(schedulers, 2, 5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(PEAK * 0.01)


def test_a_schedule_is_the_same_wherever_it_stands() -> None:
    _, schedulers = begin(cosine_schedule(40))
    shape = copy.deepcopy(schedule_shape(schedulers))
    wind_forward(schedulers, 3, 7)
    assert schedule_shape(schedulers) == shape
    assert schedule_shape({"a": schedulers}) == shape
    for other in (begin(cosine_schedule(80)), begin(cosine_schedule(40), 2 * PEAK), begin(cosine_schedule(4))):
        assert schedule_shape(other[1]) != shape


def test_a_warmup_that_outlasts_the_training_is_told() -> None:
    ramp = {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 500}
    decay = {"type": "MultiStepLR", "by_epoch": True, "end": 12, "milestones": [8, 11]}
    assert max(train(*begin([ramp]), 499)) < PEAK  # so that the rate is what the warning says
    said = doubt_of_warmup([ramp, decay], 499)
    assert said is not None
    assert "takes 500 steps, and the whole training has 499" in said
    assert doubt_of_warmup({"generator": [decay, ramp]}, 6) is not None
    assert doubt_of_warmup(ramp, 6) is not None  # mmengine takes one, too
    assert doubt_of_warmup({"generator": ramp, "other": decay}, 6) is not None
    assert doubt_of_warmup(decay, 6) is None
    for schedule, total in (([ramp, decay], 500), ([decay], 6), ([{**ramp, "by_epoch": True}], 6), ([], 6)):
        assert doubt_of_warmup(schedule, total) is None
    assert doubt_of_warmup(cosine_schedule(6), 6) is None
