"""What a student learns from a cache is what the live teacher would have told it."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import register_all_modules
from mmengine.config import Config

from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.spec import CacheSpec
from kdpipe.cache.views import map_boxes, view_matrix
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.distill.teacher.cached_boxes import read_roi_targets
from kdpipe.distill.teacher.targets import RoiTargets, teacher_roi_features
from kdpipe.pipelines.data.datasets import DetectionData, load_coco, read_image
from kdpipe.pipelines.detectors.configs import find_config
from kdpipe.pipelines.teacher.teacher import Teacher

SCALE = (128, 96)
IMAGES = 3


def narrow_model(num_classes: int) -> Config:
    """A Faster R-CNN that runs in a fraction of a second."""
    model = find_config("faster-rcnn_r50_fpn_1x_coco").model
    model.backbone.update(depth=18, base_channels=8, init_cfg=None)
    model.neck.update(in_channels=[8, 16, 32, 64], out_channels=12)
    model.rpn_head.update(in_channels=12, feat_channels=12)
    model.rpn_head.anchor_generator.scales = [4]
    model.roi_head.bbox_roi_extractor.update(out_channels=12, finest_scale=28)
    model.roi_head.bbox_head.update(in_channels=12, fc_out_channels=24, num_classes=num_classes)
    model.test_cfg.rpn.max_per_img = 60
    return model


@pytest.fixture(scope="module")
def data(bccd: Path) -> DetectionData:
    return load_coco(bccd / "train.json", bccd / "JPEGImages", limit=IMAGES)


@pytest.fixture(scope="module")
def teacher(data: DetectionData) -> Teacher:
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    model = MODELS.build(narrow_model(len(data.class_names))).eval()
    for parameter in model.roi_head.parameters():  # initial heads say almost the same of every box
        torch.nn.init.normal_(parameter, std=0.3)
    return Teacher(model, torch.device("cpu"))


def spec_of(teacher: Teacher, data: DetectionData, **changes: object) -> CacheSpec:
    options: dict[str, object] = {"tier": "pyramid", "dtype": "float32", "codec": "none", "views": ("identity",)}
    return teacher.spec(
        class_names=data.class_names,
        category_ids=data.category_ids,
        proposals=60,
        scale=SCALE,
        **{**options, **changes},  # type: ignore[arg-type]
    )


def cached(path: Path, teacher: Teacher, data: DetectionData, spec: CacheSpec) -> TeacherCache:
    writer = CacheWriter(path, spec, data.images, 1 << 30, {"teacher": "t"}, {})
    writer.write_head(teacher.head_state())
    with writer.part(0) as part:
        for info in data.images:
            image = read_image(data.img_dir / info.file_name)
            for view in spec.views:
                part.add(
                    teacher.record(
                        image,
                        data.gt_boxes(info.image_id),
                        spec=spec,
                        image_id=info.image_id,
                        file_name=info.file_name,
                        view=view,
                    )
                )
    return open_cache(path)


def student_targets(
    cache: TeacherCache, data: DetectionData, image: int, size: tuple[int, int], flip: bool
) -> RoiTargets:
    info = data.images[image]
    matrix = view_matrix((info.height, info.width), size, flip)
    return read_roi_targets(
        cache,
        info.image_id,
        matrix,
        size,
        map_boxes(torch.from_numpy(data.gt_boxes(info.image_id)), matrix),
        torch.from_numpy(data.gt_labels(info.image_id)),
        needs=("features", "embeddings", "logits", "deltas"),
        num=48,
        positive_fraction=0.5,
        missing_view="mirror",
        generator=torch.Generator().manual_seed(image),
    )


@pytest.mark.parametrize("tier", ["pyramid", "roi"])
@pytest.mark.parametrize("flip", [False, True])
def test_targets_from_a_float32_cache_are_those_of_the_live_teacher(
    tmp_path: Path, teacher: Teacher, data: DetectionData, flip: bool, tier: str
) -> None:
    spec = spec_of(teacher, data, tier=tier, views=("identity", "hflip"))
    cache = cached(tmp_path / "x.zarr", teacher, data, spec)
    for index, info in enumerate(data.images):
        targets = student_targets(cache, data, index, (96, 128), flip)
        assert targets.view == "exact"
        assert targets.num_positive > 0
        image = read_image(data.img_dir / info.file_name)
        with torch.no_grad():
            pyramid, _ = teacher.pyramid(image, (96, 128), flip)
            said = teacher.model.roi_head._bbox_forward(pyramid, bbox2roi([targets.boxes]))
        positives = said["bbox_feats"][: targets.num_positive]
        torch.testing.assert_close(teacher_roi_features([targets], cache.spec), positives, rtol=1e-4, atol=1e-5)
        for name, live in (
            ("logits", said["cls_score"]),
            ("deltas", said["bbox_pred"].reshape(len(targets.boxes), -1, 4)),
            ("embeddings", teacher._embeddings[0]),
        ):
            torch.testing.assert_close(getattr(targets, name), live, rtol=1e-4, atol=1e-5, msg=f"{name} of {info}")


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("int8", 2e-2)])
def test_stored_features_stay_close(
    tmp_path: Path, teacher: Teacher, data: DetectionData, dtype: str, limit: float
) -> None:
    exact = cached(tmp_path / "exact.zarr", teacher, data, spec_of(teacher, data))
    small = cached(tmp_path / "small.zarr", teacher, data, spec_of(teacher, data, dtype=dtype, codec="zstd"))
    for index in range(IMAGES):
        wanted = teacher_roi_features([student_targets(exact, data, index, (96, 128), False)], exact.spec)
        found = teacher_roi_features([student_targets(small, data, index, (96, 128), False)], small.spec)
        assert (found - wanted).norm() <= limit * wanted.norm()


def test_a_mirrored_target_is_the_mirror_image_of_the_unflipped_one(
    tmp_path: Path, teacher: Teacher, data: DetectionData
) -> None:
    cache = cached(tmp_path / "x.zarr", teacher, data, spec_of(teacher, data))
    plain = student_targets(cache, data, 0, (96, 128), False)
    mirrored = student_targets(cache, data, 0, (96, 128), True)
    assert (plain.view, mirrored.view) == ("exact", "mirrored")
    assert torch.equal(plain.labels, mirrored.labels)  # the same generator state samples the same rows
    flipped = plain.boxes.clone()
    flipped[:, [0, 2]] = 128 - plain.boxes[:, [2, 0]]
    torch.testing.assert_close(mirrored.boxes, flipped, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        teacher_roi_features([mirrored], cache.spec), teacher_roi_features([plain], cache.spec).flip(-1)
    )
    assert mirrored.deltas is not None
    assert plain.deltas is not None
    torch.testing.assert_close(mirrored.deltas, plain.deltas * torch.tensor([-1.0, 1.0, 1.0, 1.0]))
    assert mirrored.logits is not None
    assert plain.logits is not None
    assert torch.equal(mirrored.logits, plain.logits)
