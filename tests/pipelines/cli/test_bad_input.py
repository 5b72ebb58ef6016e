"""Bad input: one clear message, an exit code, and nothing that existed is damaged."""

import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from kdpipe.cache.read.reader import open_cache

if TYPE_CHECKING:
    from tests.conftest import Forks
    from tests.pipelines.conftest import Kit


@pytest.fixture(autouse=True)
def untouched(kit: "Kit") -> Iterator[None]:
    """Data set, teacher and cache are the same after each test."""
    before = kit.tree(kit.folder)
    yield
    assert kit.tree(kit.folder) == before


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    content: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return content


def refused_teacher(kit: "Kit", ann: Path, *options: object) -> str:
    """The message of caching on other annotations; no cache is made."""
    data = ("--ann-file", ann, "--img-dir", kit.img, "--out", "bad.zarr")
    message = kit.refused("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, *options)
    assert not Path("bad.zarr").exists()
    return message


# Annotations


def test_classes_are_matched_by_name(kit: "Kit", work: Path) -> None:
    """Another order of the categories changes nothing; classes that the file lacks are said."""
    content = read(kit.ann)
    ann = kit.annotations(work / "a.json", categories=content["categories"][::-1])
    data = ("--ann-file", ann, "--img-dir", kit.img)
    ended = kit.run("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--out", "x.zarr")
    assert "classes are matched by name with those of the teacher teacher.pth (put in its order: " in ended.out
    made, expected = open_cache("x.zarr"), open_cache(kit.cache)
    assert made.spec == expected.spec
    assert made.identity["data"] == expected.identity["data"]
    last_category = content["categories"].pop()
    boxes = [box for box in content["annotations"] if box["category_id"] != last_category["id"]]
    few = kit.annotations(work / "b.json", categories=content["categories"], annotations=boxes)
    assert "another data set" in kit.refused(*kit.student_command(work / "w", "--ann-file", few))
    options = ("--methods", "cls", "--ann-file", ann, "--val-ann-file", few, "--val-img-dir", kit.img)
    ended = kit.train_student(work / "w", *options)
    assert "put in its order" in ended.out
    assert f"not in the file: {last_category['name']}" in ended.out


def test_other_classes(kit: "Kit", work: Path) -> None:
    categories = [{**entry, "name": entry["name"].upper() + "S"} for entry in read(kit.ann)["categories"]]
    ann = kit.annotations(work / "a.json", categories=categories)
    assert "DISCS" in refused_teacher(kit, ann)
    assert "DISCS" in kit.refused(*kit.student_command(work / "w", "--ann-file", ann))


def test_annotation_file_that_cannot_be_read(kit: "Kit", work: Path) -> None:
    assert "nowhere.json" in refused_teacher(kit, work / "nowhere.json")
    (work / "a.json").write_text(kit.ann.read_text()[:1000])
    assert "not valid JSON" in refused_teacher(kit, work / "a.json")
    (work / "a.json").write_text("[]")
    assert "not a COCO detection file" in refused_teacher(kit, work / "a.json")
    for command in (kit.student_command(work / "w"), ("train-teacher", "--config", kit.student, "--img-dir", kit.img)):
        assert "nowhere.json" in kit.refused(*command, "--ann-file", work / "nowhere.json")
    assert "belong together" in kit.refused("cache-teacher", "--ckpt", kit.teacher, "--ann-file", kit.ann)
    assert "data/coco" in kit.refused("cache-teacher", "--ckpt", kit.teacher)  # what its config names


def test_empty_data_set(kit: "Kit", work: Path) -> None:
    ann = kit.annotations(work / "a.json", images=[], annotations=[])
    assert "has no images" in refused_teacher(kit, ann)
    assert "has no images" in kit.refused(*kit.student_command(work / "w", "--ann-file", ann))
    ann = kit.annotations(work / "a.json", categories=[], annotations=[])
    assert "has no categories" in refused_teacher(kit, ann)


def test_images_without_annotations(kit: "Kit", work: Path) -> None:
    """Some are fine, everywhere; without any object there is nothing to train on."""
    content = read(kit.ann)
    last = content["images"][-1]["id"]
    ann = kit.annotations(work / "a.json", annotations=[x for x in content["annotations"] if x["image_id"] == last])
    data = ("--ann-file", ann, "--img-dir", kit.img)
    kit.run("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--out", "x.zarr")
    assert len(open_cache("x.zarr")) == 8
    kit.train_student(work / "w", cache=work / "x.zarr")
    kit.run("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--out", "none.zarr", "--limit", 3)
    for methods in ("pred", "none"):
        command = kit.student_command(work / "w2", "--methods", methods, cache=work / "none.zarr")
        assert "nothing to train on" in kit.refused(*command)
    ann = kit.annotations(work / "b.json", annotations=[])
    assert "no usable annotation" in refused_teacher(kit, ann)
    command = ("train-teacher", "--config", kit.student, "--ann-file", ann, "--img-dir", kit.img)
    assert "no usable annotation" in kit.refused(*command, "--work-dir", work / "w2")
    assert not (work / "w2").exists()


def test_nothing_is_left_out_without_a_count(kit: "Kit", work: Path) -> None:
    boxes = read(kit.ann)["annotations"]
    strange: list[dict[str, Any]] = [{"image_id": 4711}, {"area": 0}, {"bbox": [5, 5, -9, 3]}]
    added = [{**boxes[0], "id": 10**6 + number, **each} for number, each in enumerate(strange)]
    ann = kit.annotations(work / "a.json", annotations=[*boxes, *added])
    message = refused_teacher(kit, ann, "--strict-data")
    data = ("--ann-file", ann, "--img-dir", kit.img)
    ended = kit.run("cache-teacher", "--ckpt", kit.teacher, *data, *kit.VIEW, "--out", "x.zarr")
    for text in (message, ended.out):
        assert "left out: 1 annotations of images that are not listed (the first: annotation 1000000 has" in text
        assert "not trained on: 1 annotations of negative width or height (the first: annotation 1000002, " in text
        assert "not trained on: 1 annotations with area 0 or less (the first: annotation 1000001, " in text
    assert open_cache("x.zarr").identity["data"] == open_cache(kit.cache).identity["data"]


# Caches


def test_cache_of_another_data_set(kit: "Kit", work: Path) -> None:
    images = ("--ann-file", kit.val_ann, "--img-dir", kit.val_img)
    message = kit.refused(*kit.student_command(work / "w", *images))
    assert "another data set" in message
    boxes = read(kit.ann)["annotations"]
    boxes[0]["bbox"][0] += 1
    ann = kit.annotations(work / "a.json", annotations=boxes)
    assert "the same ids, but other" in kit.refused(*kit.student_command(work / "w", "--ann-file", ann))
    assert not (work / "w").exists()


def test_what_is_no_cache(kit: "Kit", work: Path) -> None:
    assert "no cache at" in kit.refused("train-student", "--cache", work / "x.zarr")
    assert "not a kdpipe cache" in kit.refused("train-student", "--cache", kit.img)
    assert "not a kdpipe cache" in kit.refused("train-student", "--cache", kit.ann)
    shutil.copytree(kit.img, work / "images")
    before = kit.tree(work)
    for out in ("images", kit.ann):
        assert str(out) in kit.refused("cache-teacher", *kit.source, *kit.VIEW, "--out", out)
    assert kit.tree(work) == before


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("array", "rois"), [("features", "student"), ("features", "teacher"), ("deltas", "teacher")])
def test_corrupt_cache(kit: "Kit", work: Path, array: str, rois: str, workers: int) -> None:
    shutil.copytree(kit.cache, work / "x.zarr")
    shard = max((work / "x.zarr").glob(f"parts/00000/*/{array}/c*"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 1
    shard.write_bytes(content)
    damaged = kit.tree(work / "x.zarr")
    message = kit.refused(*kit.student_command(work / "w", "--rois", rois, cache=work / "x.zarr", workers=workers))
    assert f"The array '{array}' of part 0" in message
    assert "cache-teacher" in message
    assert len(message.splitlines()) < 5
    assert kit.tree(work / "x.zarr") == damaged


def test_methods_that_the_tier_cannot_serve(kit: "Kit", work: Path) -> None:
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", "predictions", "--out", "p.zarr")
    for methods, tier in (("sgfi", "pyramid or objects"), ("ckd", "embeddings"), ("pred,ckd", "embeddings")):
        message = kit.refused(*kit.student_command(work / "w", "--methods", methods, cache=work / "p.zarr"))
        assert f"--targets {tier}" in message
    assert not (work / "w").exists()
    assert "Unknown method 'fgd'" in kit.refused(*kit.student_command(work / "w", "--methods", "fgd"))
    assert "twice" in kit.refused(*kit.student_command(work / "w", "--methods", "pred,cls"))
    for tier in ("embeddings", "objects"):
        kit.run("cache-teacher", *kit.source, *kit.VIEW, "--targets", tier, "--out", f"{tier}.zarr")
    kit.train_student(work / "e", "--methods", "ckd,pred", cache=work / "embeddings.zarr")
    kit.train_student(work / "r", "-o", "distill.ckd.queue_size=64", cache=work / "objects.zarr")


def test_levels_that_are_not_there(kit: "Kit", work: Path) -> None:
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--out", work / "x.zarr")
    message = kit.refused(*command, "--levels", "P3,P8")
    assert "the teacher has no P8. Its pyramid has P2, P3, P4, P5, P6 (strides 4, 8, 16, 32, 64)" in message
    assert "--targets objects keeps none" in kit.refused(*command, "--levels", "P3", "--targets", "objects")
    assert not (work / "x.zarr").exists()
    assert "expected some of P1" in kit.refused(*command, "--levels", "3", code=2)
    kit.run(*command, "--levels", "P3,P4,P5,P6", "--dtype", "int4")
    message = kit.refused(*kit.student_command(work / "w", "--methods", "sgfi,ckd", cache=work / "x.zarr"))
    assert "'sgfi' needs" in message
    assert "lacks P2 (it holds P3, P4, P5, P6)" in message
    options = ("--methods", "ckd,pred")
    message = kit.refused(*kit.student_command(work / "w", *options, "--rois", "student", cache=work / "x.zarr"))
    assert "its pyramid lacks P2, which the teacher's RoI head reads" in message
    kit.train_student(work / "w", *options, cache=work / "x.zarr")
    assert "spec.levels: found [1, 2, 3, 4], wanted nothing" in kit.refused(*command, "--dtype", "int4")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing stops at so many bytes per file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(kit: "Kit", work: Path) -> None:
    caching = ("cache-teacher", *kit.source, *kit.VIEW, "--codec", "none", "--out", "x.zarr")
    with largest_file(50_000):
        message = kit.refused(*caching)
    assert "full" in message
    assert "run the same command again" in message
    assert not list((work / "x.zarr" / "parts").glob("0*"))
    kit.run(*caching)  # with space again
    assert len(open_cache("x.zarr")) == 8

    kit.train_student(work / "w", "--methods", "cls")
    before = kit.tree(work / "w")
    with largest_file(300_000):
        command = kit.student_command(work / "w", "--methods", "cls", "--epochs", 2, "--resume")
        message = kit.refused(*command)
    assert "full" in message
    assert "--resume" in message
    after = kit.tree(work / "w")
    assert all(after[name] == digest for name, digest in before.items() if name.endswith(".pth"))
    kit.run(*command)
    assert torch.load(work / "w" / "student.pth", weights_only=True)["meta"]["epoch"] == 2


# Images, while training


def test_images_that_went_bad(kit: "Kit", work: Path) -> None:
    shutil.copytree(kit.img, work / "images")
    path = sorted((work / "images").iterdir())[1]
    path.write_bytes(b"no image")
    command = kit.student_command(work / "w", "--methods", "cls", "--img-dir", work / "images")
    assert str(path) in kit.refused(*command)
    path.unlink()
    message = kit.refused(*command)
    assert str(path) in message
    assert len(message.splitlines()) == 1


def test_images_of_another_size(kit: "Kit", work: Path) -> None:
    (work / "images").mkdir()
    for path in kit.img.iterdir():
        with Image.open(path) as image:
            image.resize((64, 48)).save(work / "images" / path.name)
    command = kit.student_command(work / "w", "--methods", "cls", "--img-dir", work / "images")
    message = kit.refused(*command)
    assert "64 x 48" in message
    assert "128 x 96" in message


# Checkpoints, configs and options


def test_checkpoints_that_are_none(kit: "Kit", work: Path) -> None:
    (work / "half.pth").write_bytes(kit.teacher.read_bytes()[:100_000])
    for path, reason in ((work / "no.pth", "does not exist"), (work / "half.pth", "truncated"), (kit.ann, "cannot be")):
        assert reason in kit.refused("cache-teacher", "--ckpt", path, *kit.data)
    assert not list(work.glob("*.zarr"))


def test_checkpoint_to_resume_from_is_cut_short(kit: "Kit", work: Path) -> None:
    kit.train_student(work / "w", "--methods", "cls")
    path = work / "w" / "epoch_1.pth"
    path.write_bytes(path.read_bytes()[:100_000])
    message = kit.refused(*kit.student_command(work / "w", "--methods", "cls", "--epochs", 2, "--resume"))
    assert f"{path} is damaged" in message


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("model.backbon.depth=18", "Did you mean backbone"),
        ("model.backbone.colour=red", "unexpected keyword argument 'colour'"),
        ("model.backbone.type=ResNest101", "ResNest101 is not in the mmdet::model registry"),
        ("model.backbone.depth=19", "invalid depth 19"),
        ("model.backbone.depth", "KEY=VALUE"),
        ("model.neck.in_channels=[8,", "not a list"),
        ("model.rpn_head.in_channels=7", "Do the layers of the config fit each other"),
        ("distill.colour=red", "Unknown option distill.colour"),
        ("distill.ckd.colour=red", "colour"),
        ("distill.ckd.queue_size=many", "'many'; expected a whole number"),
        ("distill.rois.colour=red", "colour"),
        ("distill.missing_view=skip", "Unknown option distill.missing_view"),
        ("distill.weights.reg=2", "none of the losses"),
        ("train_dataloader.dataset.pipeline.0.type=LoadNothing", "LoadNothing"),
        ("optim_wrapper.optimizer.type=Newton", "cannot be built"),
    ],
)
def test_options_that_lead_nowhere(kit: "Kit", work: Path, option: str, reason: str) -> None:
    message = kit.refused(*kit.student_command(work / "w", "-o", option))
    assert reason in message
    assert not list((work / "w").glob("*.pth"))


def test_students_that_cannot_learn(kit: "Kit", work: Path) -> None:
    command = ("train-student", "--cache", kit.cache, "--work-dir", work / "w", "--student")
    message = kit.refused(*command, "faster-rcnn_r50_fpn_1x_cooc")
    assert "faster-rcnn_r50_fpn_1x_coco" in message
    (work / "student.py").write_text("model = dict(")
    assert "student.py" in kit.refused(*command, "student.py")
    other = kit.config("vfnet_r50_fpn_1x_coco", channels=32)
    (work / "student.py").write_text(other.pretty_text)
    message = kit.refused(*command, "student.py", "--methods", "sgfi")
    assert "VFNetHead" in message
    assert "Expected a two-stage detector, or a single-stage one" in message
    mosaic = kit.config()
    mosaic.train_dataloader.dataset.pipeline.insert(2, {"type": "Mosaic", "img_scale": (96, 128)})
    (work / "student.py").write_text(mosaic.pretty_text)
    assert "Mosaic" in kit.refused(*command, "student.py")
    moved = kit.config()
    crop = {"type": "RandomApply", "transforms": [{"type": "MinIoURandomCrop"}], "prob": 0.5}
    moved.train_dataloader.dataset.pipeline.insert(2, crop)
    (work / "student.py").write_text(moved.pretty_text)
    assert "MinIoURandomCrop" in kit.refused(*command, "student.py")


@pytest.mark.parametrize("name", ["cuda:77", "cuda:-1", "cuda:x", "cpu:3", "mps", "meta", "xla", "toaster", ""])
def test_devices_that_are_not_there(kit: "Kit", work: Path, name: str) -> None:
    for command in (("cache-teacher", *kit.source, *kit.VIEW), ("verify", kit.cache, "--ckpt", kit.teacher)):
        message = kit.refused(*command, "--device", name, code=2)
        assert f"--device {name}: kdpipe runs on cpu, cuda and cuda:N" in message
        assert "cpu" in message.partition("Here ")[2]
    assert not list(work.iterdir())


def test_gpus_that_are_hidden(kit: "Kit", work: Path, forks: "Forks") -> None:
    """CUDA_VISIBLE_DEVICES without a GPU leaves the CPU."""
    command = ("cache-teacher", *kit.source, *kit.VIEW, "--device", "cuda")
    process = forks.start(kit.COMMAND, *command, cwd=work, CUDA_VISIBLE_DEVICES="")
    assert process.wait() == 2
    assert "Here is the cpu alone, as CUDA_VISIBLE_DEVICES= has it" in process.err


def test_pretrained_weights_that_are_not_there(kit: "Kit", work: Path) -> None:
    init = "model.backbone.init_cfg={'type': 'Pretrained', 'checkpoint': 'nowhere.pth'}"
    assert "nowhere.pth" in kit.refused(*kit.student_command(work / "w", "--methods", "none", "-o", init))
