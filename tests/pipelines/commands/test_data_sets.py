"""Pascal VOC folders, BDD100K's labels and incomplete JPEGs, in every command that takes images."""

import io
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from kdpipe.cache.read.reader import open_cache
from kdpipe.pipelines.data.bdd import BDD_CLASSES
from kdpipe.pipelines.data.datasets import load_coco
from kdpipe.pipelines.data.voc_ap import VOC_IOUS, VOC_MODES, voc_name

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def write_voc(kit: "Kit", work: Path) -> tuple[Path, Path]:
    """The training pictures as a VOC folder, whose split is `val`, and as COCO JSON."""
    data = load_coco(kit.ann, kit.img)
    voc, images = work / "drawn", []
    for folder in ("Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    shutil.copytree(kit.img, voc / "JPEGImages")
    boxes: list[dict[str, Any]] = []
    for number, info in enumerate(data.images, 1):
        objects = ""
        for box, label in zip(data.gt_boxes(info.image_id), data.gt_labels(info.image_id), strict=True):
            x1, y1, x2, y2 = (int(edge) for edge in box)
            corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2 + 1}</xmax><ymax>{y2 + 1}</ymax>"
            objects += f"<object><name>{data.class_names[label]}</name><bndbox>{corners}</bndbox></object>"
            bbox = [x1, y1, x2 - x1, y2 - y1]
            category = sorted(data.class_names).index(data.class_names[label]) + 1
            boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": category, "bbox": bbox})
        size = f"<size><width>{info.width}</width><height>{info.height}</height></size>"
        xml = f"<annotation>{size}{objects}</annotation>"
        (voc / "Annotations" / f"{Path(info.file_name).stem}.xml").write_text(xml)
        images.append({"id": number, "file_name": info.file_name, "width": info.width, "height": info.height})
    names = "\n".join(Path(info.file_name).stem for info in data.images)
    (voc / "ImageSets" / "Main" / "val.txt").write_text(names)
    categories = [{"id": number, "name": name} for number, name in enumerate(sorted(data.class_names), 1)]
    ann = work / "coco.json"
    ann.write_text(json.dumps({"images": images, "annotations": boxes, "categories": categories}))
    return voc, ann


def test_voc_is_the_same_as_coco(kit: "Kit", work: Path) -> None:
    voc, ann = write_voc(kit, work)
    ckpt = kit.save_detector(work / "teacher.pth", kit.config(), classes=tuple(sorted(kit.classes)))

    kit.run("cache-teacher", "--ckpt", ckpt, "--voc", voc, "--split", "val", *kit.VIEW)
    kit.run("cache-teacher", "--ckpt", ckpt, "--ann-file", ann, "--img-dir", kit.img, *kit.VIEW, "--out", "coco.zarr")
    assert kit.tree(work / "drawn.zarr" / "parts") == kit.tree(work / "coco.zarr" / "parts")
    assert sorted(path.name for path in work.glob("*.json")) == ["coco.json"]  # nothing is left beside the cache
    before = kit.tree(work)
    message = kit.refused("cache-teacher", "--ckpt", ckpt, "--voc", voc, "--split", "other", *kit.VIEW)
    assert "There are: val" in message
    assert "not both" in kit.refused("cache-teacher", "--ckpt", ckpt, "--voc", voc, "--ann-file", ann)
    assert kit.tree(work) == before
    kit.train_student(work / "w", "--methods", "cls", "--val-split", "val", cache=work / "drawn.zarr")
    assert json.loads((work / "w" / "result.json").read_text())["ap"] is not None
    drawn, coco = (kit.run("verify", work / f"{name}.zarr", "--ap").out.splitlines() for name in ("drawn", "coco"))
    assert [line for line in drawn if line.startswith("│")][:-2] == [line for line in coco if line.startswith("│")]
    assert "11-point" in [line for line in drawn if line.startswith("│")][-2]
    assert f"{voc}, split val" in kit.run("inspect", work / "drawn.zarr").out

    voc.rename(work / "moved")
    training = kit.student_command(work / "w2", "--methods", "cls", cache=work / "drawn.zarr")
    message = kit.refused(*training)
    assert "drawn is not there" in message
    assert "--voc" in message
    kit.run(*training, "--voc", work / "moved")
    measured = ("evaluate", "--ckpt", work / "w" / "student.pth", "--voc", work / "moved")
    assert "needs --split" in kit.refused(*measured)
    assert "AP50" in kit.run(*measured, "--split", "val").out


def test_voc_trains_and_measures_a_plain_detector(kit: "Kit", work: Path) -> None:
    """AP at three overlaps in two ways, in a training and in `evaluate`; the config stays one that mmdet reads."""
    voc, _ = write_voc(kit, work)
    training = ("train-teacher", "--config", kit.student, "--voc", voc, "--split", "val", "--epochs", 1, "--workers", 0)
    ended = kit.run(*training, "--val-split", "val", "--work-dir", "w")
    metrics = json.loads((work / "w" / "result.json").read_text())["metrics"]
    names = [f"voc_{voc_name(iou, mode)}" for iou in VOC_IOUS for mode in VOC_MODES]
    assert [name for name in metrics if name.startswith("voc_")] == names
    assert f"Pascal VOC, 11-point: {metrics['voc_AP50_11points']:.3f} at IoU 0.5, " in ended.out
    saved = kit.run("evaluate", "--ckpt", "w/teacher.pth")  # on the images that the checkpoint's config names
    assert "Pascal VOC" not in saved.out
    config = torch.load(work / "w" / "teacher.pth", weights_only=True)["meta"]["cfg"]
    assert "CocoMetric" in config
    assert "PascalVOC" not in config
    ended = kit.run("evaluate", "--ckpt", "w/teacher.pth", "--voc", voc, "--split", "val")
    assert ended.out.startswith(saved.out)
    rows = [line.split("│")[2:5] for line in ended.out.splitlines() if "(VOC20" in line]
    assert rows == [[f" {metrics[f'voc_{voc_name(iou, mode)}']:.3f}  " for iou in VOC_IOUS] for mode in VOC_MODES]
    message = kit.refused(*training, "--val-voc", voc, "--work-dir", "w2")
    assert "--val-voc needs --val-split" in message


def write_bdd(ann: Path, path: Path) -> Path:
    """A COCO JSON as BDD100K's labels, its classes renamed into some of the ten."""
    content = json.loads(ann.read_text())
    names = {category["id"]: BDD_CLASSES[row + 2] for row, category in enumerate(content["categories"])}
    frames: dict[int, dict[str, Any]] = {
        image["id"]: {
            "name": image["file_name"],
            "size": {key: image[key] for key in ("width", "height")},
            "labels": [],
        }
        for image in content["images"]
    }
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        box = {"x1": x, "y1": y, "x2": x + width - 1, "y2": y + height - 1}
        label = {"id": str(entry["id"]), "category": names[entry["category_id"]], "box2d": box}
        frames[entry["image_id"]]["labels"].append(label)
    path.write_text(json.dumps(list(frames.values())))
    return path


def test_bdd_in_every_command(kit: "Kit", work: Path) -> None:
    bdd, val = write_bdd(kit.ann, work / "det_train.json"), write_bdd(kit.val_ann, work / "det_val.json")
    validation = ("--val-bdd", val, "--val-img-dir", kit.val_img)
    training = ("train-teacher", "--config", kit.student, "--epochs", 1, "--workers", 0, *validation)
    assert "belong together" in kit.refused(*training, "--bdd", bdd, "--work-dir", "w")
    assert "--bdd (labels of BDD100K), not both" in kit.refused(*training, "--bdd", bdd, *kit.data, "--work-dir", "w")
    kit.run(*training, "--bdd", bdd, "--img-dir", kit.img, "--work-dir", "w")
    kit.run("cache-teacher", "--ckpt", "w/teacher.pth", "--bdd", bdd, "--img-dir", kit.img, *kit.VIEW)
    cache = open_cache(work / "det_train.zarr")
    assert cache.spec.class_names == BDD_CLASSES
    assert str(bdd) in " ".join(kit.run("inspect", "det_train.zarr").out.split())
    kit.train_student(work / "s", "--methods", "cls", *validation, cache=work / "det_train.zarr")
    ap = json.loads((work / "s" / "result.json").read_text())["metrics"]
    measured = kit.run("evaluate", "--ckpt", "s/student.pth", "--bdd", val, "--img-dir", kit.val_img).out
    assert "Pascal VOC" not in measured
    assert [cell.strip() for cell in measured.splitlines()[3].split("│")[1:-1]] == [
        "—" if value < 0 else f"{value:.3f}"
        for value in ap.values()  # of a size without objects
    ]
    moved = bdd.rename(work / "moved.json")
    again = kit.student_command(work / "s2", "--methods", "cls", cache=work / "det_train.zarr")
    assert "Say where it moved: --bdd" in kit.refused(*again)
    assert "no faults" in kit.run("verify", "det_train.zarr", "--ap", "--bdd", moved).out
    kit.run(*again, "--bdd", moved)


def test_incomplete_jpegs_in_every_command(kit: "Kit", work: Path) -> None:
    """They are named, cached, trained on and measured."""
    for folder in (kit.img, kit.val_img):
        shutil.copytree(folder, work / folder.name)
        path = sorted((work / folder.name).iterdir())[1]
        pixels = io.BytesIO()
        with Image.open(path) as image:
            image.convert("RGB").save(pixels, "JPEG")
        path.write_bytes(pixels.getvalue()[:-20])
    data = ("--ann-file", kit.ann, "--img-dir", "train")
    validation = ("--val-ann-file", kit.val_ann, "--val-img-dir", "val")
    training = ("train-teacher", "--config", kit.student, *data, *validation, "--epochs", 1, "--work-dir", "w")
    printed = " ".join(kit.run(*training, "--workers", 0).out.split())
    assert "Warning: 1 of the 8 images of train.json is incomplete and used as decoded: image train/" in printed
    assert "Warning: 1 of the 3 images of val.json is incomplete and used as decoded: image val/" in printed
    assert "of its pixels are lost" in printed
    kit.run("cache-teacher", "--ckpt", "w/teacher.pth", *data, *kit.VIEW, "--out", "x.zarr")
    assert len(open_cache(work / "x.zarr").image_ids) == 8
    kit.run(*kit.student_command(work / "s", "--methods", "cls", *validation, cache=work / "x.zarr"))
    ended = kit.run("evaluate", "--ckpt", "s/student.pth", "--ann-file", kit.val_ann, "--img-dir", "val")
    assert "is incomplete and used as decoded" in " ".join(ended.out.split())
