"""`kdpipe verify`, as users type it; the teacher's AP from a cache is that of the live teacher."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console

from kdpipe.cache.plan import ImageInfo
from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.pipelines.commands.evaluate import evaluate
from kdpipe.pipelines.commands.options import EvaluateOptions
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.data.provenance import recorded_config, recorded_data
from kdpipe.pipelines.data.voc_ap import VOC_MODES
from kdpipe.pipelines.teacher.decode import cached_ap

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

QUIET = Console(quiet=True)
AS_MANY = ("--scale", "128x96", "--proposals", "50", "--targets", "predictions")  # proposals as in the teacher's config


@pytest.fixture(scope="module")
def found_by_teacher(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Annotations that the untrained teacher partly finds: some of its own boxes, moved by a pixel."""
    folder, cache = tmp_path_factory.mktemp("ap"), open_cache(kit.cache)
    content = json.loads(kit.ann.read_text())
    content["annotations"] = []
    for image_id in cache.image_ids.tolist():
        targets = cache.targets(image_id, fields=("logits", "deltas"))
        assert targets.logits is not None
        labels = targets.logits.float()[:, :-1].argmax(1)
        boxes = targets.class_boxes(cache.spec)[torch.arange(len(labels)), labels] + 1
        for row in range(0, targets.num_proposals, 6):
            x1, y1, x2, y2 = boxes[row].tolist()
            entry = {"id": len(content["annotations"]) + 1, "image_id": image_id, "iscrowd": 0}
            entry |= {"category_id": cache.spec.category_ids[labels[row]], "area": (x2 - x1) * (y2 - y1)}
            content["annotations"].append({**entry, "bbox": [x1, y1, x2 - x1, y2 - y1]})
    (folder / "found.json").write_text(json.dumps(content))
    return folder / "found.json"


def ap_of_cache(path: Path) -> dict[str, float]:
    cache = open_cache(path)
    return cached_ap(cache, recorded_config(cache, None), recorded_data(cache, DataOptions()), QUIET)


def test_ap_from_the_cache_is_that_of_the_live_teacher(
    kit: "Kit", work: Path, found_by_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """COCO's, and Pascal VOC's, as if the boxes were of a VOC folder."""

    def load(*args: Any) -> DetectionData:
        return replace(load_coco(*args), is_voc=True)

    monkeypatch.setattr("kdpipe.pipelines.data.find.load_coco", load)
    source = ("--ckpt", kit.teacher, "--ann-file", found_by_teacher, "--img-dir", kit.img, *AS_MANY)
    live = evaluate(EvaluateOptions(kit.teacher, data=DataOptions(found_by_teacher, kit.img), scale=(128, 96)), QUIET)
    assert 0.05 < live["bbox_mAP"] < 0.95
    kit.run("cache-teacher", *source, "--dtype", "float32", "--out", "exact.zarr")
    exact = ap_of_cache(work / "exact.zarr")
    assert [0.05 < live[f"voc_AP50_{mode}"] < 0.95 for mode in VOC_MODES] == [True, True]
    assert {name: round(value, 3) for name, value in exact.items()} == {
        name: round(value, 3)
        for name, value in live.items()  # mmdet rounds
    }
    kit.run("cache-teacher", *source, "--out", "int8.zarr")
    for name, value in ap_of_cache(work / "int8.zarr").items():
        assert value == pytest.approx(exact[name], abs=0.02)
    moved = found_by_teacher.rename(work / "moved.json")
    assert "--ann-file" in kit.refused("verify", "exact.zarr", "--ap")
    ended = kit.run("verify", "exact.zarr", "--ap", "--ann-file", moved)
    assert f"{exact['bbox_mAP']:.3f}" in ended.out
    assert f"11-point (VOC2007)       │ {exact['voc_AP50_11points']:.3f}  │" in ended.out
    assert "is not what the cache" in kit.refused("verify", "exact.zarr", "--ap", "--ann-file", kit.ann)


def test_the_live_teacher_says_the_same(kit: "Kit", work: Path) -> None:
    ended = kit.run("verify", kit.cache, "--ckpt", kit.teacher, "--sample", 2, "--device", "cpu")
    rows = [line for line in ended.out.splitlines() if "%" in line]
    assert len(rows) == len(open_cache(kit.cache).spec.fields)
    errors = {row.split()[1]: float(row.split()[-3 if row.split()[-1] == "│" else -2]) for row in rows}
    assert 2 < errors.pop("features") < 20  # per cent: int4
    assert max(errors.values()) < 2  # float16 and int8
    other = torch.load(kit.teacher, weights_only=True)
    other["state_dict"]["roi_head.bbox_head.fc_cls.bias"] += 1
    torch.save(other, work / "other.pth")
    message = kit.refused("verify", kit.cache, "--ckpt", work / "other.pth")
    assert "is not the teacher" in message
    assert open_cache(kit.cache).identity["teacher"]["weights"] in message


def test_verify_and_repair(kit: "Kit", work: Path) -> None:
    ended = kit.run("verify", kit.cache)
    assert "8 images, 1 part," in ended.out
    assert "no faults" in ended.out
    path = work / "x.zarr"
    shutil.copytree(kit.cache, path)
    (file,) = path.glob("parts/00000/*/logits/c.*")
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    (path / "parts" / ".00001.0123456789abcdef.tmp").mkdir()
    ended = kit.run("verify", path, "--ap", code=1)
    assert f"part 0: logits/{file.name} has other content than was written (images " in ended.out
    assert ".00001.0123456789abcdef.tmp: was left behind by a process that ended" in ended.out
    assert "--repair`, then `kdpipe cache-teacher` with the same options" in ended.out
    ended = kit.run("verify", path, "--repair", code=1)
    assert f"removed {path / 'parts' / '00000'}" in ended.out
    (command,) = (line for line in ended.out.splitlines() if line.startswith("kdpipe cache-teacher"))
    assert "part 0: is missing" in kit.run("verify", path, code=1).out
    kit.run(*command.split()[1:])
    assert kit.tree(path) == kit.tree(kit.cache)
    kit.run("verify", path)


def test_what_is_missing_of_a_cache_that_another_program_made(kit: "Kit", work: Path) -> None:
    CacheWriter(work / "x.zarr", open_cache(kit.cache).spec, [ImageInfo(1, "a.jpg", 96, 128, 0)], 1, {}, {})
    ended = kit.run("verify", work / "x.zarr", code=1)
    assert "What is missing is made by the program that made the cache." in ended.out
    assert "kdpipe cache-teacher" not in ended.out


def test_what_cannot_be_verified(kit: "Kit", work: Path) -> None:
    assert "There is no cache" in kit.refused("verify", work / "x.zarr")
    shutil.copytree(kit.cache, work / "x.zarr")
    text = (work / "x.zarr" / "zarr.json").read_text()
    (work / "x.zarr" / "zarr.json").write_text(text.replace('"int4"', '"int9"'))
    message = kit.refused("verify", work / "x.zarr", "--repair")
    assert "is damaged" in message
    assert "--repair cannot put right" in message


def test_a_checkpoint_that_is_not_there_is_told_before_the_cache_is_read(kit: "Kit", work: Path) -> None:
    for options, reason in (
        (("--ckpt", "nowhere.pth"), "nowhere.pth does not exist"),
        (("--ckpt", kit.ann), "cannot be read as a PyTorch checkpoint"),
        (("--ckpt", kit.teacher, "--config", "nowhere"), "neither a file nor a config"),
    ):
        ended = kit.run("verify", kit.cache, *options, code=1)
        assert reason in ended.err
        assert "no faults" not in ended.out
