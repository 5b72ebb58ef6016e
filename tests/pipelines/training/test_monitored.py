"""What follows a figure of the validation is refused where there is no such figure, before the first step."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mmengine.hooks import CheckpointHook, EarlyStoppingHook

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.training.monitored import check_monitored

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

BBOX = {"type": "CocoMetric", "ann_file": "val.json", "metric": "bbox"}


@pytest.mark.parametrize(
    ("hook", "schedule", "place"),
    [
        (CheckpointHook(save_best="coco/bbox_map"), None, "default_hooks.checkpoint.save_best"),
        (CheckpointHook(save_best=["coco/bbox_mAP", "bbox_mAP_50"]), None, "default_hooks.checkpoint.save_best"),
        (EarlyStoppingHook(monitor="bbox_mAP"), None, "monitor of EarlyStoppingHook"),
        (None, {"type": "ReduceOnPlateauLR", "monitor": "mAP"}, "monitor of ReduceOnPlateauLR"),
        (None, [{"type": "LinearLR"}, {"type": "ReduceOnPlateauLR", "monitor": "mAP"}], "monitor of ReduceOnPlateauLR"),
        (None, {"heads": [{"type": "ReduceOnPlateauLR", "monitor": "mAP"}]}, "monitor of ReduceOnPlateauLR"),
    ],
)
def test_a_figure_that_there_is_not(hook: Any, schedule: Any, place: str) -> None:
    with pytest.raises(KdpipeError, match=f"{place} is '.*no such figure. It gives coco/bbox_mAP, coco/bbox_mAP_50"):
        check_monitored(BBOX, [hook], schedule)
    for unknown in (None, {**BBOX, "classwise": True}, {**BBOX, "metric": ["bbox", "proposal"]}, [BBOX]):
        check_monitored(unknown, [hook], schedule)


def test_figures_that_there_are() -> None:
    hooks = [CheckpointHook(), CheckpointHook(save_best="auto"), CheckpointHook(save_best="coco/bbox_mAP_s")]
    plateau = {"type": "ReduceOnPlateauLR", "monitor": "coco/bbox_mAP"}
    check_monitored(BBOX, [*hooks, EarlyStoppingHook(monitor="coco/bbox_mAP_75")], [{"type": "LinearLR"}, plateau])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("default_hooks.checkpoint.save_best=coco/bbox_map", "save_best is 'coco/bbox_map', and validation gives no"),
        (
            "param_scheduler=[{'type': 'MultistepLR', 'milestones': [1]}]",
            r"\(param_scheduler\) cannot be built",
        ),
        ("param_scheduler=[{'type': 'MultiStepLR', 'begin': 0, 'end': 0, 'milestones': [1]}]", "larger than begin"),
    ],
)
def test_mistakes_are_told_before_the_first_step(kit: "Kit", work: Path, override: str, message: str) -> None:
    refused = kit.refused(*kit.student_command(work / "w", "--methods", "none", *kit.val, "-o", override))
    assert re.search(message, " ".join(refused.split()))
    assert not list((work / "w").glob("*.pth"))
