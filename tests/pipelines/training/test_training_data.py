"""What a config says of its training data set is kept around other images, or refused by name."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.detectors.configs import apply_known_options
from kdpipe.pipelines.training.config import training_config
from kdpipe.pipelines.training.data import innermost, left_out_by, with_filter
from kdpipe.pipelines.training.options import TrainingOptions
from kdpipe.pipelines.training.wrapping import with_seeds

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

LOAD = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
STEPS = [*LOAD, {"type": "Resize", "scale": (64, 48), "keep_ratio": True}, {"type": "PackDetInputs"}]
COCO = {"type": "CocoDataset", "ann_file": "elsewhere.json", "pipeline": STEPS}
MIX = {
    "type": "MultiImageMixDataset",
    "dataset": {**COCO, "pipeline": LOAD},
    "pipeline": [{"type": "Mosaic", "img_scale": (64, 48)}, *STEPS[2:]],
}


def wrapped(kind: str, inner: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"type": kind, "dataset": inner, **options}


@pytest.fixture(scope="module")
def data(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> DetectionData:
    """Eight images, of which two have no object and one is 20 pixels wide."""
    folder = tmp_path_factory.mktemp("training_data")
    shutil.copytree(kit.img, folder / "img")
    content = json.loads(kit.ann.read_text())
    first, second, narrow = content["images"][:3]
    narrow["width"] = 20
    path = str(folder / "img" / narrow["file_name"])
    picture = cv2.imread(path)
    assert picture is not None
    cv2.imwrite(path, picture[:, :20])
    boxes = content["annotations"] = [
        box for box in content["annotations"] if box["image_id"] not in (first["id"], second["id"])
    ]
    for box in boxes:
        if box["image_id"] == narrow["id"]:
            box["bbox"] = [1, 1, 10, 10]
    (folder / "train.json").write_text(json.dumps(content))
    data = load_coco(folder / "train.json", folder / "img").copied_to(folder / "copy" / "train.json")
    data.write_copy()
    return data


def loader(data: DetectionData, dataset: dict[str, Any], **options: Any) -> Any:
    """The training loader that a training with a config's data set would have, built."""
    config = Config({"model": {"type": "X"}, "train_dataloader": {"dataset": dataset, **options}})
    training = TrainingOptions(epochs=1, batch_size=2, workers=0, scale=(128, 96))
    cfg = with_seeds(training_config(config, data, None, training, Console(quiet=True)))
    with DefaultScope.overwrite_default_scope("mmdet"):
        return Runner.build_dataloader(cfg.train_dataloader, seed=0)


@pytest.mark.parametrize(
    ("dataset", "items"),
    [
        (COCO, 6),
        ({**COCO, "filter_cfg": {"filter_empty_gt": False}}, 8),
        ({**COCO, "filter_cfg": {"min_size": 32}}, 7),
        ({**COCO, "filter_cfg": None}, 8),
        ({**COCO, "indices": 4}, 4),
        ({**COCO, "type": "mmdet.CocoDataset"}, 6),
        ({**COCO, "type": "VOCDataset"}, 6),
        (wrapped("RepeatDataset", COCO, times=5), 30),
        (wrapped("mmengine.RepeatDataset", COCO, times=2), 12),
        (wrapped("RepeatDataset", wrapped("RepeatDataset", COCO, times=2), times=3), 36),
        (wrapped("RepeatDataset", {**COCO, "filter_cfg": {"filter_empty_gt": False}}, times=2), 16),
        ({"type": "ConcatDataset", "datasets": [COCO]}, 6),
        ({"type": "ConcatDataset", "datasets": [COCO, {**COCO, "ann_file": "b.json"}]}, 6),
        (wrapped("RepeatDataset", {"type": "ConcatDataset", "datasets": [COCO, COCO]}, times=3), 18),
        (MIX, 6),
        (wrapped("RepeatDataset", COCO, times=1), 6),
    ],
)
def test_data_sets_are_as_long_as_the_config_says(data: DetectionData, dataset: dict[str, Any], items: int) -> None:
    built = loader(data, dataset)
    assert len(built.dataset) == items
    assert len(built) == -(-items // 2)
    assert sum(len(batch["inputs"]) for batch in list(built)[:2]) == 4


def test_classes_are_balanced(data: DetectionData) -> None:
    built = loader(data, wrapped("ClassBalancedDataset", COCO, oversample_thr=0.99))
    assert len(built.dataset) > 6


def test_epochs_differ_and_items_are_images_of_the_data_set(data: DetectionData) -> None:
    built = loader(data, wrapped("RepeatDataset", COCO, times=2))
    orders = []
    for epoch in range(2):
        built.batch_sampler.sampler.set_epoch(epoch)
        orders.append([index for batch in built.batch_sampler for index in batch])
    assert [sorted(order) for order in orders] == [list(range(12)), list(range(12, 24))]
    assert [index % 12 for index in orders[1]] != orders[0]


def test_a_hook_switches_the_pipeline_inside_a_repeated_data_set(data: DetectionData) -> None:
    built = loader(data, wrapped("RepeatDataset", COCO, times=2)).dataset
    built.pipeline = str  # as PipelineSwitchHook does
    assert built[0].startswith("{")


@pytest.mark.parametrize(
    ("sampler", "orders"),
    [
        ({"type": "DefaultSampler", "shuffle": False}, list(range(6))),
        ({"type": "mmengine.DefaultSampler", "shuffle": False, "round_up": False}, list(range(6))),
        ({"type": "ClassAwareSampler"}, None),
        ({"type": "InfiniteSampler", "shuffle": False}, list(range(6))),
    ],
)
def test_samplers(data: DetectionData, sampler: dict[str, Any], orders: list[int] | None) -> None:
    built = loader(data, COCO, sampler=sampler, batch_sampler=None)
    indices = [index for batch in built.batch_sampler for index in batch]
    assert indices == orders or (orders is None and len(indices) == 6)


@pytest.mark.parametrize(("batches", "steps"), [({"batch_sampler": None}, 2), ({}, 2)])
def test_the_last_batch_is_dropped(data: DetectionData, batches: dict[str, Any], steps: int) -> None:
    assert len(loader(data, {**COCO, "indices": 5}, drop_last=True, **batches)) == steps


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ({"type": "ConcatDataset", "datasets": [COCO, MIX]}, {}, r"2 data sets at once \(ConcatDataset\)"),
        (wrapped("MyWrapper", COCO), {}, "MyWrapper around others"),
        ({"type": "CocoDataset"}, {}, "no pipeline at train_dataloader.dataset.pipeline"),
        ({}, {}, "no pipeline at train_dataloader.dataset.pipeline"),
        (COCO, {"sampler": {"type": "MultiSourceSampler", "batch_size": 2, "source_ratio": [1]}}, "MultiSourceSampler"),
        (COCO, {"sampler": {"type": "TrackImgSampler"}}, "TrackImgSampler"),
    ],
)
def test_refusals(data: DetectionData, dataset: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(KdpipeError, match=message):
        loader(data, dataset, **options)


def test_targets_are_beside_each_image_of_a_repeated_data_set() -> None:
    assert innermost(wrapped("RepeatDataset", wrapped("ClassBalancedDataset", COCO))) is COCO
    with pytest.raises(KdpipeError, match=r"MultiImageMixDataset.*\(Mosaic, Resize, PackDetInputs\).*one image"):
        innermost(wrapped("RepeatDataset", MIX, times=2))


@pytest.mark.parametrize("option", [True, False])
@pytest.mark.parametrize(
    "dataset", [COCO, {**COCO, "filter_cfg": {"min_size": 32}}, {"type": "ConcatDataset", "datasets": [COCO, COCO]}]
)
def test_what_is_left_out_is_said(data: DetectionData, dataset: dict[str, Any], option: bool) -> None:
    config = with_filter(Config({"model": {"type": "X"}, "train_dataloader": {"dataset": dataset}}))
    place = "train_dataloader.dataset" + (".datasets.0" if "datasets" in dataset else "")
    config = apply_known_options(config, [f"{place}.filter_cfg.filter_empty_gt=False"] if option else [])
    texts = [str(kind) for kind in data.left_out(**left_out_by(config))]
    assert any("2 images without a usable annotation" in line for line in texts) is not (
        option or "filter_cfg" in dataset
    )
    assert any("1 images of less than 32 pixels" in line for line in texts) is ("filter_cfg" in dataset)


def test_a_student_sees_a_repeated_data_set(kit: "Kit", work: Path) -> None:
    text = kit.student.read_text() + (
        "\ndata = train_dataloader['dataset']\ndata['filter_cfg'] = dict(filter_empty_gt=False, min_size=0)\n"
        "train_dataloader['dataset'] = dict(type='RepeatDataset', times=3, dataset=data)\n"
    )
    (work / "repeat.py").write_text(text)
    content = json.loads(kit.ann.read_text())
    one = content["images"][0]["id"]
    lone = [box for box in content["annotations"] if box["image_id"] != one]
    ann = kit.annotations(work / "lone.json", annotations=lone)
    kit.run("cache-teacher", "--ckpt", kit.teacher, "--ann-file", ann, "--img-dir", kit.img, *kit.VIEW, "--out", "c")
    ended = kit.train_student(work / "w", "--student", "repeat.py", cache=work / "c")
    log = next((work / "w").glob("*/*.log")).read_text()
    assert re.findall(r"Epoch\(train\) +\[1\]\[6/(\d+)\]", log) == ["6"]  # eight images three times, four a step
    assert (work / "w" / "student.pth").exists(), ended.err
