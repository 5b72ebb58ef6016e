"""Teachers whose checkpoints name their classes in another order than that by which mmdet numbered them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.class_matching import in_file_order, match_classes, telling_images
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.demo.drawing import CLASS_NAMES, draw_shapes
from kdpipe.pipelines.demo.teacher import SHIPPED

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SCALE = ("--scale", "160x128")
TAKEN = "are taken to be disc, square, triangle, star, cross, crescent, in the order of"
OTHER_NAMES = (*CLASS_NAMES[::2], *CLASS_NAMES[1::2])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder, train=10, val=1, size=(128, 160))
    return folder


@pytest.fixture
def renamed(work: Path) -> Path:
    """The demo's teacher, as mmdet saves one that it trained with `classes` in another order than the file's."""
    checkpoint: Any = torch.load(SHIPPED.checkpoint, weights_only=True)
    checkpoint["meta"]["dataset_meta"] = {"classes": OTHER_NAMES}
    torch.save(checkpoint, work / "renamed.pth")
    return work / "renamed.pth"


def with_categories(shapes: Path, names: tuple[str, ...], path: Path) -> tuple[object, ...]:
    """The drawn images with the categories of their annotations listed in another order."""
    content = json.loads((shapes / "annotations" / "train.json").read_text())
    content["categories"].sort(key=lambda category: names.index(category["name"]))
    path.write_text(json.dumps(content))
    return "--ann-file", path, "--img-dir", shapes / "train"


def test_a_teacher_whose_labels_are_numbered_as_in_the_file(
    kit: "Kit", work: Path, shapes: Path, renamed: Path
) -> None:
    data = with_categories(shapes, CLASS_NAMES, work / "a.json")
    made = kit.run("cache-teacher", "--ckpt", renamed, *data, *SCALE, "--targets", "predictions", "--out", "a.zarr")
    assert "are taken to be disc, square, triangle, star, cross, crescent, in the order of" in " ".join(
        made.out.split()
    )
    assert open_cache("a.zarr").spec.class_names == CLASS_NAMES
    said = " ".join(kit.run("evaluate", "--ckpt", renamed, *data, *SCALE).out.split())
    assert TAKEN in said
    plain = kit.run("evaluate", "--ckpt", SHIPPED.checkpoint, *data, *SCALE).out
    assert table(said) == table(plain)
    assert float(table(said)[0]) > 0.4


def test_a_teacher_whose_names_are_right(kit: "Kit", work: Path, shapes: Path) -> None:
    """The file lists them in another order than the one that it was trained on."""
    data = with_categories(shapes, OTHER_NAMES, work / "b.json")
    made = kit.run(
        "cache-teacher", "--ckpt", SHIPPED.checkpoint, *data, *SCALE, "--targets", "predictions", "--out", "b.zarr"
    )
    assert "are taken to be" not in made.out
    assert open_cache("b.zarr").spec.class_names == CLASS_NAMES
    said = kit.run("evaluate", "--ckpt", SHIPPED.checkpoint, *data, *SCALE).out
    assert "are taken to be" not in said
    in_order = with_categories(shapes, CLASS_NAMES, work / "c.json")
    assert table(said) == table(kit.run("evaluate", "--ckpt", SHIPPED.checkpoint, *in_order, *SCALE).out)


def test_a_live_teacher(kit: "Kit", work: Path, shapes: Path, renamed: Path) -> None:
    data = with_categories(shapes, CLASS_NAMES, work / "a.json")
    start = ("train-student", "--teacher-ckpt", renamed, "--student", kit.student, *data, *SCALE, "--methods", "cls")
    options = ("--recipe", "paper", "--epochs", 1, "--batch-size", 4, "--workers", 0, "--work-dir", "w")
    said = " ".join(kit.run(*start, *options).out.split())
    assert TAKEN in said
    meta = torch.load("w/student.pth", weights_only=True)["meta"]["dataset_meta"]
    assert tuple(meta["classes"]) == CLASS_NAMES


def test_the_order_of_the_file(shapes: Path) -> None:
    data = load_coco(shapes / "annotations" / "train.json", shapes / "train")
    assert in_file_order(data, CLASS_NAMES) is None
    assert in_file_order(data, OTHER_NAMES) == CLASS_NAMES
    assert in_file_order(data, ("crescent", "disc")) == ("disc", "crescent")
    assert in_file_order(data, (*OTHER_NAMES, "moon")) is None  # the file does not number it
    swapped = (CLASS_NAMES[1], CLASS_NAMES[0], *CLASS_NAMES[2:])
    meanings = match_classes(data, CLASS_NAMES, "x"), match_classes(data, swapped, "x")
    telling = telling_images(meanings, 100)
    assert telling == [x.image_id for x in data.images if set(data.gt_labels(x.image_id).tolist()) & {0, 1}]
    assert telling_images(meanings, 2) == telling[:2]


def table(text: str) -> list[str]:
    """The figures of the only table."""
    return re.findall(r"[01]\.\d{3}|—", text.rpartition("AP large")[2])
