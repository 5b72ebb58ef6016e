"""What a student learns from a cache is what the live teacher would have told it."""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torchvision.ops import box_iou

from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.spec import MAX_OBJECTS, CacheSpec
from kdpipe.cache.views import map_boxes, view_matrix, visible_boxes
from kdpipe.cache.write.selection import choose_objects
from kdpipe.cache.write.writer import CacheWriter
from kdpipe.distill.rois.sampling import RoiSampling
from kdpipe.distill.teacher.cached_boxes import read_roi_targets
from kdpipe.distill.teacher.targets import RoiTargets, teacher_roi_features
from kdpipe.pipelines.data.datasets import DetectionData, load_coco
from kdpipe.pipelines.data.images import read_image
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
                        data.gt_labels(info.image_id),
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
        needs=("roi_features", "embeddings", "logits", "deltas"),
        sampling=RoiSampling(num=48, positive_fraction=0.5),
        missing_view="mirror",
        generator=torch.Generator().manual_seed(image),
    )


@pytest.mark.parametrize("tier", ["pyramid", "objects"])
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
            outputs = teacher.model.roi_head._bbox_forward(pyramid, bbox2roi([targets.boxes]))
        positives = outputs["bbox_feats"][: targets.num_positive]
        torch.testing.assert_close(teacher_roi_features([targets], cache.spec), positives, rtol=1e-4, atol=1e-5)
        for name, live in (
            ("logits", outputs["cls_score"]),
            ("deltas", outputs["bbox_pred"].reshape(len(targets.boxes), -1, 4)),
            ("embeddings", teacher._embeddings[0]),
        ):
            torch.testing.assert_close(getattr(targets, name), live, rtol=1e-4, atol=1e-5, msg=f"{name} of {info}")


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch, teacher: Teacher, data: DetectionData) -> None:
    """Proposals of which every other one is near an object, as those of a trained teacher are."""
    objects = itertools.cycle(torch.from_numpy(data.gt_boxes(info.image_id)) for info in data.images)
    propose = teacher.proposals

    def proposals(pyramid: tuple[torch.Tensor, ...], sample: Any) -> torch.Tensor:
        proposals_found, truth = propose(pyramid, sample), next(objects) * 0.2  # 640 x 480 at 128 x 96
        for row in range(0, len(proposals_found), 2):
            proposals_found[row] = truth[row // 2 % len(truth)] + (row // 2 // len(truth)) * torch.tensor(
                [0.4, 0.4, 0.6, 0.6]
            )
        return proposals_found

    monkeypatch.setattr(teacher, "proposals", proposals)


@pytest.mark.usefixtures("near")
@pytest.mark.parametrize("flip", [False, True])
def test_a_cache_of_objects_gives_what_a_pyramid_gives(
    tmp_path: Path, teacher: Teacher, data: DetectionData, flip: bool
) -> None:
    pyramid = cached(tmp_path / "pyramid.zarr", teacher, data, spec_of(teacher, data))
    objects = cached(tmp_path / "objects.zarr", teacher, data, spec_of(teacher, data, tier="objects"))
    for index, info in enumerate(data.images):
        assert 30 < objects.index(info.image_id).num_objects < MAX_OBJECTS  # the cap leaves nothing out
        expected, actual = (student_targets(cache, data, index, (96, 128), flip) for cache in (pyramid, objects))
        assert expected.num_positive == 24
        for name in ("num_positive", "view"):
            assert getattr(actual, name) == getattr(expected, name)
        for name in ("boxes", "labels", "logits", "deltas", "embeddings"):
            assert torch.equal(getattr(actual, name), getattr(expected, name))
        features = teacher_roi_features([actual], objects.spec), teacher_roi_features([expected], pyramid.spec)
        torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("near")
def test_positives_have_features_where_the_cap_leaves_some_without(
    tmp_path: Path, teacher: Teacher, data: DetectionData, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = data.images[0]
    pyramid = cached(tmp_path / "pyramid.zarr", teacher, data, spec_of(teacher, data))
    choose = partial(choose_objects, limit=info.num_gt + 3)
    monkeypatch.setattr("kdpipe.cache.write.encode.choose_objects", choose)
    objects = cached(tmp_path / "objects.zarr", teacher, data, spec_of(teacher, data, tier="objects"))
    every, some = (student_targets(cache, data, 0, (96, 128), False) for cache in (pyramid, objects))
    targets = objects.targets(info.image_id)
    assert targets.roi_rows is not None
    assert some.num_positive == min(24, info.num_gt + 3) < every.num_positive or info.num_gt > 21
    with_features = targets.boxes[targets.roi_rows.long()] * 0.2
    assert all((with_features - box).abs().amax(1).min() < 1e-3 for box in some.boxes[: some.num_positive])
    assert (some.labels[: some.num_positive] < len(data.class_names)).all()
    assert (some.labels[some.num_positive :] == len(data.class_names)).all()
    features = teacher_roi_features([some], objects.spec)
    with torch.no_grad():
        pyramid_seen, _ = teacher.pyramid(read_image(data.img_dir / info.file_name), (96, 128), False)
        outputs = teacher.model.roi_head._bbox_forward(pyramid_seen, bbox2roi([some.boxes[: some.num_positive]]))
    torch.testing.assert_close(features, outputs["bbox_feats"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-3), ("int8", 2e-2), ("int4", 0.3)])
def test_stored_features_stay_close(
    tmp_path: Path, teacher: Teacher, data: DetectionData, dtype: str, limit: float
) -> None:
    exact = cached(tmp_path / "exact.zarr", teacher, data, spec_of(teacher, data))
    small = cached(tmp_path / "small.zarr", teacher, data, spec_of(teacher, data, dtype=dtype, codec="zstd"))
    for index in range(IMAGES):
        expected = teacher_roi_features([student_targets(exact, data, index, (96, 128), False)], exact.spec)
        actual = teacher_roi_features([student_targets(small, data, index, (96, 128), False)], small.spec)
        assert (actual - expected).norm() <= limit * expected.norm()


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


@pytest.mark.usefixtures("near")
def test_boxes_that_a_crop_cuts_are_matched_by_what_is_left_of_them(
    tmp_path: Path, teacher: Teacher, data: DetectionData
) -> None:
    """As annotations are cut; the RoI stays whole, since the teacher speaks of the whole box."""
    cache, size = cached(tmp_path / "x.zarr", teacher, data, spec_of(teacher, data)), (60, 80)
    cut = 0
    for info in data.images:
        crop = np.array([[1.0, 0, -17], [0, 1, -23], [0, 0, 1]]) @ view_matrix(
            (info.height, info.width), (96, 128), False
        )
        limits = torch.tensor([80.0, 60.0, 80.0, 60.0])
        truth = map_boxes(torch.from_numpy(data.gt_boxes(info.image_id)), crop).clamp(min=0).minimum(limits)
        is_left = (truth[:, 2] > truth[:, 0]) & (truth[:, 3] > truth[:, 1])
        whole = map_boxes(cache.targets(info.image_id, "identity", fields=["boxes"]).boxes, crop)
        whole = whole[visible_boxes(whole, size)]
        shown = whole.clamp(min=0).minimum(limits)
        overlap, nearest = box_iou(shown, truth[is_left]).max(dim=1)
        targets = read_roi_targets(
            cache,
            info.image_id,
            crop,
            size,
            truth[is_left],
            torch.from_numpy(data.gt_labels(info.image_id))[is_left],
            needs=("logits",),
            sampling=RoiSampling(num=1000, positive_fraction=1.0),
            missing_view="mirror",
            generator=torch.Generator().manual_seed(0),
        )
        is_positive = overlap >= 0.5
        assert torch.equal(targets.boxes[: targets.num_positive], whole[is_positive])
        labels = torch.from_numpy(data.gt_labels(info.image_id))[is_left][nearest[is_positive]]
        assert torch.equal(targets.labels[: targets.num_positive], labels)
        assert (targets.labels[targets.num_positive :] == len(data.class_names)).all()
        cut += int((box_iou(whole, truth[is_left]).max(dim=1)[0][is_positive] < 0.5).sum())
    assert cut > 0
