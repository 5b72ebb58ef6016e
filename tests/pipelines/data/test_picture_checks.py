"""Every command checks its images in the same way, and compares them with those that were cached."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from kdpipe.cache.quantize import quantize
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.images import ImageError, read_image
from kdpipe.pipelines.data.picture_checks import usable_images
from kdpipe.pipelines.teacher import compare as live
from kdpipe.pipelines.teacher.compare import FieldError, unexplained

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def halve(path: Path) -> None:
    with Image.open(path) as image:
        image.resize((image.width // 2, image.height // 2)).save(path)


def mirror(path: Path) -> None:
    with Image.open(path) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-600])


def copy_images(folder: Path, to: Path, edits: dict[int, Callable[[Path], None]]) -> list[Path]:
    """The images of a folder, some of them spoilt: their paths in the order of names."""
    shutil.copytree(folder, to)
    paths = sorted(to.iterdir())
    for number, edit in edits.items():
        edit(paths[number])
    return paths


# The check itself


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of 60 x 40 pixels, and annotations of them."""
    names = [f"{number}.png" for number in range(5)]
    content = {
        "images": [{"id": 10 + n, "file_name": name, "width": 60, "height": 40} for n, name in enumerate(names)],
        "annotations": [
            {"id": n + 1, "image_id": 10 + n, "category_id": 1, "bbox": [1, 2, 9, 9], "area": 81, "iscrowd": 0}
            for n in range(5)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name)
    return tmp_path


def check(folder: Path, *, skip: bool = False, scale: tuple[int, int] | None = None) -> tuple[DetectionData, str]:
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True)
    usable = usable_images(load_coco(folder / "a.json", folder), console, scale=scale, skip=skip)
    return usable, out.getvalue()


@pytest.mark.parametrize("skip", [False, True])
def test_good_images_are_not_talked_about(folder: Path, skip: bool) -> None:
    usable, printed = check(folder, skip=skip)
    assert [image.image_id for image in usable.images] == [10, 11, 12, 13, 14]
    assert printed == ""


def test_bad_images_are_counted_and_the_first_is_named(folder: Path) -> None:
    (folder / "1.png").unlink()
    cut(folder / "3.png")
    with pytest.raises(ImageError, match=r"1\.png does not exist.* first of 2 bad images of 5\..*--skip-bad-images"):
        check(folder)
    usable, printed = check(folder, skip=True)
    assert [image.image_id for image in usable.images] == [10, 12, 14]
    assert printed.startswith("2 of the 5 images of a.json are bad and left out, the first: image ")
    assert "1.png does not exist" in printed
    assert len(usable.gt_boxes(12)) == 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_jpeg_that_lacks_its_last_bytes_is_used_with_a_warning(folder: Path, skip: bool) -> None:
    file = io.BytesIO()
    Image.open(folder / "0.png").save(file, "JPEG")
    (folder / "3.png").write_bytes(file.getvalue()[:-4] + bytes(1000))  # a name says nothing of the format
    usable, printed = check(folder, skip=skip)
    assert len(usable.images) == 5
    assert printed.startswith("Warning: 1 of the 5 images of a.json is incomplete and used as decoded:\n  image ")
    assert "3.png lacks its last bytes" in printed


def test_all_incomplete_jpegs_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    Image.open(folder / "0.png").save(file, "JPEG")
    for number in (0, 2, 4):
        (folder / f"{number}.png").write_bytes(file.getvalue()[:-4])
    lines = check(folder)[1].splitlines()
    assert lines[0] == "Warning: 3 of the 5 images of a.json are incomplete and used as decoded:"
    assert [line.split(" lacks")[0][-5:] for line in lines[1:]] == ["0.png", "2.png", "4.png"]
    monkeypatch.setattr("kdpipe.pipelines.data.picture_checks._NAMED", 2)
    assert check(folder)[1].splitlines()[-1] == "  and 1 more"


def test_what_only_decoding_finds_is_left_out(folder: Path) -> None:
    """Damage between header and end: without --skip-bad-images it is met when the image is read."""
    data = bytearray((folder / "2.png").read_bytes())
    data[len(data) // 2] ^= 0x55
    (folder / "2.png").write_bytes(data)
    assert len(check(folder)[0].images) == 5
    usable, printed = check(folder, skip=True)
    assert [image.image_id for image in usable.images] == [10, 11, 13, 14]
    assert "2.png" in printed


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_bad_images_whose_size_is_not_annotated(folder: Path, spoil: Callable[[Path], None]) -> None:
    content = json.loads((folder / "a.json").read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    (folder / "a.json").write_text(json.dumps(content))
    spoil(folder / "2.png")
    with pytest.raises(ImageError, match=r"2\.png (does not exist|is empty).*--skip-bad-images"):
        check(folder)
    usable, _ = check(folder, skip=True)
    assert [(image.image_id, image.height, image.width) for image in usable.images] == [
        (number, 40, 60) for number in (10, 11, 13, 14)
    ]
    assert not usable.left_out()


def test_only_bad_images(folder: Path) -> None:
    for path in folder.glob("*.png"):
        halve(path)
    with pytest.raises(ImageError, match=r"All 5 images of .*a\.json are bad, the first: .*30 x 20 .* 60 x 40"):
        check(folder, skip=True)


def test_images_that_vanish_when_resized(folder: Path) -> None:
    content = json.loads((folder / "a.json").read_text())
    content["images"][3] |= {"width": 300, "height": 1}
    (folder / "a.json").write_text(json.dumps(content))
    Image.new("RGB", (300, 1)).save(folder / "3.png")
    for skip in (False, True):
        assert len(check(folder, skip=skip)[0].images) == len(check(folder, skip=skip, scale=(320, 240))[0].images) == 5
    with pytest.raises(ImageError, match=r"3\.png is 300 x 1 pixels: resized into 64 x 48, nothing is left of it"):
        check(folder, scale=(64, 48))
    assert len(check(folder, skip=True, scale=(64, 48))[0].images) == 4


# Commands


BAD: list[tuple[Callable[[Path], None], str]] = [
    (Path.unlink, "does not exist"),
    (halve, "is 64 x 48 pixels"),
    (cut, "is truncated"),
]


def commands(kit: "Kit", images: Path, val_images: Path) -> dict[str, tuple[object, ...]]:
    train = ("--config", kit.student, "--epochs", 1, "--batch-size", 4, "--workers", 0, "--ann-file", kit.ann)
    return {
        "cache-teacher": (
            "cache-teacher",
            "--ckpt",
            kit.teacher,
            "--ann-file",
            kit.ann,
            "--img-dir",
            images,
            *kit.VIEW,
        ),
        "train-teacher": ("train-teacher", *train, "--img-dir", images, "--work-dir", "w"),
        "train-teacher, val": (
            *("train-teacher", *train, "--img-dir", kit.img, "--work-dir", "w"),
            *("--val-ann-file", kit.val_ann, "--val-img-dir", val_images),
        ),
        "train-student": kit.student_command(Path("w"), "--methods", "none", "--img-dir", images),
        "online": (
            *("train-student", "--teacher-ckpt", kit.teacher, "--student", kit.student, "--work-dir", "w"),
            *("--epochs", 1, "--methods", "cls", "--ann-file", kit.ann, "--img-dir", images, *kit.VIEW[:2]),
        ),
        "evaluate": ("evaluate", "--ckpt", kit.teacher, "--ann-file", kit.val_ann, "--img-dir", val_images),
    }


NAMES = ("cache-teacher", "train-teacher", "train-teacher, val", "train-student", "online", "evaluate")


@pytest.mark.parametrize("name", NAMES)
def test_a_bad_image_ends_every_command_before_it_writes(kit: "Kit", work: Path, name: str) -> None:
    for number, (spoil, words) in enumerate(BAD):
        images, val_images = work / f"train{number}", work / f"val{number}"
        paths = copy_images(kit.img, images, {2: spoil}) + copy_images(kit.val_img, val_images, {1: spoil})
        message = kit.refused(*commands(kit, images, val_images)[name])
        assert words in message
        assert any(f"image {path} " in message for path in (paths[2], paths[8 + 1]))
        assert len(message.splitlines()) == 1
        assert sorted(path.name for path in work.iterdir() if not path.name.startswith(("train", "val"))) == []


@pytest.mark.parametrize("name", ["train-teacher, val", "train-student", "evaluate"])
def test_every_command_can_go_on_without_bad_images(kit: "Kit", work: Path, name: str) -> None:
    paths = copy_images(kit.img, work / "train", {2: halve}), copy_images(kit.val_img, work / "val", {1: Path.unlink})
    ended = kit.run(*commands(kit, work / "train", work / "val")[name], "--skip-bad-images")
    path = paths[0][2] if name == "train-student" else paths[1][1]
    (line,) = [line for line in ended.out.splitlines() if "left out" in line]
    assert f"1 of the {8 if name == 'train-student' else 3} images of" in line
    assert str(path) in line
    if name != "evaluate":
        copies = {path.name: json.loads(path.read_text()) for path in (work / "w" / "kdpipe").glob("*.json")}
        which, left = ("train.json", 7) if name == "train-student" else ("val.json", 2)
        assert len(copies[which]["images"]) == left


def test_a_picture_that_vanishes_at_the_scale_is_skipped_when_caching(kit: "Kit", work: Path) -> None:
    shutil.copytree(kit.img, work / "images")
    content = json.loads(kit.ann.read_text())
    content["images"].append({"id": 99, "file_name": "thin.png", "width": 4000, "height": 1})
    ann = kit.annotations(work / "thin.json", images=content["images"])
    Image.new("RGB", (4000, 1)).save(work / "images" / "thin.png")
    command = ("cache-teacher", "--ckpt", kit.teacher, "--ann-file", ann, "--img-dir", work / "images", *kit.VIEW)
    assert "thin.png is 4000 x 1 pixels: resized into 128 x 96" in kit.refused(*command, "--out", "x.zarr")
    ended = kit.run(*command, "--out", "x.zarr", "--skip-bad-images")
    assert "8 images, 1 skipped" in ended.out
    kit.train_student(work / "w", "--methods", "none", cache=work / "x.zarr")


def test_a_cached_picture_that_was_replaced(kit: "Kit", work: Path) -> None:
    """The same name and size is not the same picture."""
    paths = copy_images(kit.img, work / "images", {4: mirror})
    words = f"image {paths[4]} is another picture than the one that the teacher saw"
    message = kit.refused(*kit.student_command(work / "w", "--methods", "none", "--img-dir", work / "images"))
    assert words in message
    assert len(message.splitlines()) == 1
    where = ("--img-dir", work / "images")
    for options in (where, (*where, "--ckpt", kit.teacher)):
        ended = kit.run("verify", kit.cache, *options, code=1)
        assert f"1 of 8 images are not as the teacher saw them, the first: {words}" in ended.out


def test_verify_says_what_it_compared(kit: "Kit", work: Path) -> None:
    assert f"The 8 images in {kit.img} are those that the teacher saw." in kit.run("verify", kit.cache).out
    paths = copy_images(kit.img, work / "images", {})
    kit.run("verify", kit.cache, "--img-dir", work / "images")
    paths[0].unlink()
    ended = kit.run("verify", kit.cache, "--img-dir", work / "images", code=1)
    assert f"1 of 8 images are not as the teacher saw them, the first: image {paths[0]} does not exist" in ended.out
    assert "image folder nowhere does not exist" in kit.refused("verify", kit.cache, "--img-dir", "nowhere")
    data = ("--ann-file", kit.ann, "--img-dir", work / "images", *kit.VIEW, "--targets", "predictions")
    kit.run("cache-teacher", "--ckpt", kit.teacher, *data, "--skip-bad-images", "--out", "x.zarr")
    shutil.rmtree(work / "images")
    assert "The images were not compared: their folder is not there" in kit.run("verify", "x.zarr").out


# What the live teacher says


def test_verify_ends_where_the_live_teacher_says_something_else(
    kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("verify", kit.cache, "--ckpt", kit.teacher, "--sample", 2, "--device", "cpu")
    kit.run(*command)
    monkeypatch.setattr(live, "read_image", lambda *args: np.ascontiguousarray(read_image(*args)[:, ::-1]))
    ended = kit.run(*command, code=1)
    assert "features of the cache are not what the teacher says: their mean error is" in ended.out


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("tail", [0.0, 1.0])
def test_errors_that_a_storage_type_explains(dtype: str, tail: float) -> None:
    """Rounding, and what differs between machines; a few per cent more are not explained, however values spread."""
    g = torch.Generator().manual_seed(0)
    values = torch.randn(8, 20, 30, generator=g) * torch.exp(tail * torch.randn(8, 20, 30, generator=g))
    scale = None
    if dtype == "int8":
        steps, scale = quantize(values)
        scale = scale[..., None, None]
        stored = steps * scale
    else:
        stored = values.to(getattr(torch, dtype)).float()
    for disturbed, lines in ((0.0, 0), (0.002, 0), (1.5, 1)):
        error = FieldError()
        noise = torch.randn(values.shape, generator=g) * values.abs().mean()
        error.add(stored, values + disturbed * noise, dtype, scale)
        assert len(unexplained({"features": error})) == lines
