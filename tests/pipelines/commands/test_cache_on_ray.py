"""How `kdpipe cache-teacher --ray` deals parts, by a stand-in for Ray."""

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.commands import cache_on_ray
from kdpipe.pipelines.runtime.ray_cluster import Nodes
from tests.pipelines.commands.ray_stand_in import NodeDiedError, RayError, RayStandIn, RayTaskError


class StandIn(RayStandIn):
    def __init__(self, *resources: dict[str, float], answer: Callable[[int], Any]) -> None:
        super().__init__(*resources)
        self.answer, self.made = answer, list[int]()
        self.faults: dict[str, Any] = {}

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def submit(*args: Any) -> Callable[[], Any]:
            if "scheduling_strategy" in options:
                return lambda: self.faults.get(options["scheduling_strategy"], [])
            assert options["max_calls"] == options["max_retries"] == 0
            return lambda: self._make(args[1])

        return lambda function: SimpleNamespace(remote=submit)

    def _make(self, index: int) -> Any:
        self.made.append(index)
        return self.answer(index)


def deal(ray: StandIn, parts: int = 12, cpus: float = 1, gpus: float = 0) -> tuple[int, str]:
    """Deal parts of two images; returns the images that were added, and what was said."""
    maker: Any = SimpleNamespace(
        writer=SimpleNamespace(parts=[range(2 * i, 2 * i + 2) for i in range(parts)]), missing=range(parts)
    )
    said = io.StringIO()
    console = Console(file=said, soft_wrap=True)
    images = cache_on_ray._Deal(ray, maker, "{}", Nodes(ray, cpus, gpus, console), console).run()
    return images, said.getvalue()


def two_images(index: int) -> dict[str, Any]:
    return {"images": 2, "bytes": 10, "lines": [f"about part {index}"]}


def test_at_most_two_tasks_wait_per_slot() -> None:
    ray = StandIn({"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}, {}, answer=two_images)
    images, said = deal(ray)
    assert images == 24
    assert sorted(ray.made) == list(range(12))
    assert ray.most == 12
    assert said.count("about part ") == 12
    ray = StandIn({"CPU": 4.0, "GPU": 1.0}, {"CPU": 2.0}, {}, answer=two_images)
    deal(ray, gpus=0.5, cpus=3)
    assert ray.most == 3


def test_no_node_is_large_enough() -> None:
    ray = StandIn({"CPU": 4.0}, answer=two_images)
    images, said = deal(ray, gpus=1)  # the stand-in runs it all the same
    assert images == 24
    assert "No node has 1 CPUs and 1 GPUs: waiting for one." in said
    assert ray.most == 3


def test_what_is_lost_is_dealt_again() -> None:
    lost: dict[int, list[Exception]] = {
        3: [RayError("the worker\ndied"), RayError("died")],
        5: [NodeDiedError("gone")] * 4,
    }
    ray = StandIn({"CPU": 2.0}, answer=lambda index: lost[index].pop() if lost.get(index) else two_images(index))
    images, said = deal(ray)
    assert images == 24
    assert (ray.made.count(3), ray.made.count(5), len(ray.made)) == (3, 5, 18)
    assert "A worker was lost while it made part 3, which is dealt again: the worker\n" in said
    assert said.count("A node was lost while it made part 5") == 4


def test_a_part_that_ends_its_worker_again_and_again() -> None:
    ray = StandIn({"CPU": 2.0}, answer=lambda index: RayError("oom") if index == 4 else two_images(index))
    with pytest.raises(KdpipeError, match="Part 4 ended the process that made it 3 times"):
        deal(ray)
    assert ray.made.count(4) == 3


BAD = "the picture 7 is bad"


@pytest.mark.parametrize("error", [{"error": BAD}, RayTaskError(KdpipeError(BAD))])
def test_an_error_of_the_user_is_not_tried_again(error: Any) -> None:
    ray = StandIn({"CPU": 2.0}, answer=lambda index: error if index == 4 else two_images(index))
    with pytest.raises(KdpipeError, match=BAD):
        deal(ray)
    assert ray.made.count(4) == 1


def test_nodes_that_cannot_take_part_are_named() -> None:
    ray = StandIn({"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}, {"GPU": 1.0}, answer=two_images)
    ray.faults = {"b": ["torch 2.5, not 2.6", "x.pth is not there"], "c": RayTaskError(ImportError("No module kdpipe"))}
    ray.faults["d"] = ["has no CPU for a task, and is not asked"]
    with pytest.raises(KdpipeError) as error:
        deal(ray)
    lines = str(error.value).splitlines()
    assert lines[0] == "2 of 3 nodes of the cluster cannot make parts:"
    assert lines[1] == "  b (::1): torch 2.5, not 2.6; x.pth is not there"
    assert lines[2] == "  c (::1): No module kdpipe"
    assert ray.made == []
