"""`kdpipe train-student --allow-partial`: training on a cache that is still being made."""

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.datasets import load_coco

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def unfinished(kit: "Kit", work: Path) -> tuple[Path, tuple[object, ...]]:
    """A cache without some of its parts, and the command that makes them."""
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--part-size", "32KiB", "--out", work / "x.zarr")
    kit.run(*command)
    for part in sorted((work / "x.zarr" / "parts").glob("0*"))[1::2]:
        shutil.rmtree(part)
    return work / "x.zarr", command


def test_trains_on_what_is_there(kit: "Kit", work: Path) -> None:
    cache, command = unfinished(kit, work)
    cached_ids = open_cache(cache, allow_partial=True).image_ids.tolist()
    assert 1 < len(cached_ids) < 8
    training = kit.student_command(work / "w", "--methods", "cls", "--batch-size", 1, cache=cache)
    assert "is incomplete" in kit.refused(*training)
    assert not (work / "w").exists()
    ended = kit.run(*training, "--allow-partial")
    assert f"training on {len(cached_ids)} of 8 images" in ended.out
    assert [
        image["id"] for image in json.loads((work / "w" / "kdpipe" / "train.json").read_text())["images"]
    ] == cached_ids
    assert steps(work / "w") == len(cached_ids)

    kit.run(*command)  # the cache is finished; a training that is resumed keeps the images that it began with
    kit.run(*training, "--epochs", 2, "--resume")
    assert steps(work / "w") == 2 * len(cached_ids)
    kit.run(*kit.student_command(work / "new", "--methods", "cls", "--batch-size", 1, "--allow-partial", cache=cache))
    assert steps(work / "new") == 8


def steps(work_dir: Path) -> int:
    """Steps of a training, by its checkpoint."""
    newest = Path((work_dir / "last_checkpoint").read_text())
    return int(torch.load(newest, weights_only=False)["meta"]["iter"])


def test_several_processes_or_nothing_there(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = unfinished(kit, work)
    training = kit.student_command(work / "w", "--methods", "cls", "--allow-partial", cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr("kdpipe.pipelines.training.teachers.world_size", lambda: 2)
        assert "in one process, or when it is finished" in kit.refused(*training)
    for part in (cache / "parts").glob("0*"):
        shutil.rmtree(part)
    assert "no finished part yet" in kit.refused(*training)


def test_some_of_the_images(kit: "Kit", work: Path) -> None:
    data = load_coco(kit.ann, kit.img)
    ids = [image.image_id for image in data.images[1::3]]
    some = data.only(ids)
    again = load_coco(some.copied_to(work / "some.json").write_copy(), kit.img)
    for images in (some, again):
        assert [image.image_id for image in images.images] == ids
        assert list(images.images) == [image for image in data.images if image.image_id in ids]
        for image_id in ids:
            assert (images.gt_boxes(image_id) == data.gt_boxes(image_id)).all()
            assert (images.gt_labels(image_id) == data.gt_labels(image_id)).all()


@pytest.mark.slow
def test_while_it_is_being_written(kit: "Kit", work: Path) -> None:
    ann = kit.annotations(work / "many.json", copies=30)
    data = ("--ckpt", kit.teacher, "--ann-file", ann, "--img-dir", kit.img, "--part-size", "32KiB")
    writer = kit.start("cache-teacher", *data, *kit.VIEW, "--out", work / "x.zarr", cwd=work)
    try:
        while not (work / "x.zarr" / "parts" / "00002").exists():
            assert writer.poll() is None, writer.communicate()
            time.sleep(0.01)
        training = kit.student_command(work / "w", "--allow-partial", cache=work / "x.zarr", workers=1)
        ended = kit.run(*training)
        assert "The cache is not finished: training on" in ended.out
        _, err = writer.communicate(timeout=400)
    finally:
        writer.kill()
    assert writer.returncode == 0, err
    assert len(open_cache("x.zarr")) == 240
