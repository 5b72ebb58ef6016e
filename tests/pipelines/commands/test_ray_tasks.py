"""What `kdpipe cache-teacher --ray` runs in a worker, in this process."""

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.store.location import open_location
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.pipelines.commands.cache_on_ray import part_job
from kdpipe.pipelines.commands.ray_tasks import PartJob, make_part, node_faults
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.runtime.ray_cluster import own_versions
from kdpipe.pipelines.teacher.options import CacheOptions

if TYPE_CHECKING:
    from tests.pipelines.commands.conftest import Parts
    from tests.pipelines.conftest import Kit


def job_of(kit: "Kit", out: str, **changes: Any) -> PartJob:
    """The job of `many`, with paths of the current folder."""
    source = DataSource(DataOptions(Path("many.json"), changes.pop("img_dir", kit.img)))
    options = CacheOptions(scale=(128, 96), proposals=40, part_size=1024)
    rest = {"config": None, "trust": False, "store_options": {}, "device": "cpu", **changes}
    return part_job(source, open_location(out), options, ckpt=kit.teacher, **rest)


def test_the_tasks_of_a_worker(kit: "Kit", parts: "Parts", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = parts.command()
    kit.run(*command, "x.zarr", "--shard", "7/8")
    job = job_of(kit, "x.zarr")
    assert PartJob.from_json(job.to_json()) == job
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")  # as on another machine
    assert node_faults(job.to_json(), own_versions()) == []
    made = [make_part(job.to_json(), index) for index in range(8)]
    assert [part["images"] for part in made] == [1] * 7 + [0]
    assert all(part["bytes"] > 0 for part in made[:7])
    assert json.loads(json.dumps(made)) == made
    monkeypatch.chdir(work)
    kit.run(*command, "one.zarr")
    assert kit.tree(work / "x.zarr") == kit.tree(work / "one.zarr")


def test_a_worker_looks_at_its_own_parts_only(
    kit: "Kit", parts: "Parts", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.run(*parts.command(), "x.zarr", "--shard", "7/8")
    asked: list[Any] = []
    pending = CacheWriter.pending

    def asked_of(writer: CacheWriter, among: Any = None) -> list[int]:
        asked.append(among)
        return pending(writer, among)

    monkeypatch.setattr(CacheWriter, "pending", asked_of)
    job = job_of(kit, "x.zarr").to_json()
    assert [make_part(job, index)["images"] for index in (2, 7)] == [1, 0]
    assert asked == [[2], [7]]


def test_what_a_node_lacks(kit: "Kit", parts: "Parts", work: Path) -> None:
    parts.command()
    job = job_of(kit, "x.zarr", img_dir=Path("images"))
    faults = node_faults(job.to_json(), {"kdpipe": "7", "torch": own_versions()["torch"]})
    assert faults == [
        f"kdpipe {own_versions()['kdpipe']}, not 7",
        f"{work / 'images'} is not there",
        f"the cache {work / 'x.zarr'} is not there",
    ]
    error = make_part(job.to_json(), 0)["error"]
    assert error.startswith("On the node ")
    assert "images" in error


def test_a_bad_image_ends_a_task(kit: "Kit", parts: "Parts", work: Path) -> None:
    command = [*parts.command(), "x.zarr"]
    shutil.copytree(kit.img, work / "images")
    command[command.index(kit.img)] = work / "images"
    kit.run(*command, "--shard", "7/8")
    bad = sorted((work / "images").iterdir())[4]
    bad.write_bytes(b"no image")
    made = [make_part(job_of(kit, "x.zarr", img_dir=Path("images")).to_json(), index) for index in range(8)]
    assert [part["error"] for part in made if "error" in part] == [made[4]["error"]]
    assert str(bad) in made[4]["error"]
    assert len(open_cache("x.zarr", allow_partial=True)) == 7


def test_options_that_do_not_go_together(
    kit: "Kit", parts: "Parts", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "--ray-cpus and --ray-gpus are for --ray" in kit.refused(
        "cache-teacher", *kit.source, "--ray-gpus", 1, code=2
    )
    message = kit.refused("cache-teacher", *kit.source, "--ray", "auto", "--ray-gpus", 1.5, code=2)
    assert "--ray-gpus 1.5: Ray gives whole ones" in message
    message = kit.refused("cache-teacher", *kit.source, "--ray", "auto", "--shard", "0/2", code=2)
    assert "leave --shard out" in message
    monkeypatch.setitem(sys.modules, "ray", None)
    message = kit.refused(*parts.command(), "x.zarr", "--ray", "auto")
    assert "pip install 'kdpipe[ray]'" in message
