"""Every family, from mmdet's config by its name: cached, and some steps trained, at a tiny size."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from mmcv.transforms import Compose
from mmdet.models.layers import multiclass_nms
from mmdet.registry import MODELS
from mmengine.config import Config
from torchvision.ops import roi_align

from kdpipe.cache.read.reader import open_cache
from kdpipe.cache.records import decode_deltas
from kdpipe.cache.views import map_boxes
from kdpipe.distill.outputs import BatchRois
from kdpipe.distill.teacher.any_box import apply_teacher_head, read_teacher_view
from kdpipe.distill.teacher.heads.build import frozen_head
from kdpipe.distill.teacher.source import check_serves_student_rois
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.detectors.checkpoints import load_checkpoint
from kdpipe.pipelines.teacher.live import LiveTeacher
from kdpipe.pipelines.teacher.teacher import load_teacher, teacher_config

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


def cached(kit: "Kit", work: Path, config: Config, *options: object) -> Path:
    """The cache of an untrained teacher."""
    ckpt, out = kit.save_detector(work / "teacher.pth", config), work / "teacher.zarr"
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--out", out, *options)
    return out


def trained(kit: "Kit", work: Path, cache: Path, config: Config, *options: object) -> list[dict[str, Any]]:
    """The log of an epoch of two steps."""
    student = work / "student.py"
    student.write_text(config.pretty_text)
    kit.train_student(work / "w", "--student", student, *options, cache=cache)
    (file,) = (work / "w").glob("*/vis_data/scalars.json")
    return [json.loads(line) for line in file.read_text().splitlines() if "loss" in line]


R50 = "faster-rcnn_r50_fpn_1x_coco"
BACKBONES = {
    "R18": ("faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco",),
    "R34": (R50, "model.backbone.depth=34"),
    "R50": (R50,),
    "R101": ("faster-rcnn_r101_fpn_1x_coco",),
    "R152": (R50, "model.backbone.depth=152"),
    "caffe": ("faster-rcnn_r50-caffe_fpn_1x_coco",),
    "X101-32x4d": ("faster-rcnn_x101-32x4d_fpn_1x_coco",),
    "R50-DCN": ("faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco",),
    "R50-DCNv2": ("faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco",),
    "X101-DCN": ("faster-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco",),
}


SLOW = ("R18", "R34", "R101", "R152", "X101-32x4d", "R50-DCN")  # as the others, but for their depth or a part


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in BACKBONES])
def test_backbones(kit: "Kit", work: Path, name: str) -> None:
    """As a teacher and as a student."""
    cache = cached(kit, work, kit.tiny(*BACKBONES[name]))
    steps = trained(kit, work, cache, kit.tiny(*BACKBONES[name]))
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss


def test_a_quarter_of_the_width(kit: "Kit", work: Path) -> None:
    """By the options that a user gives: a narrow backbone, and the neck's input with it."""
    quarter = ("backbone.base_channels=16", "neck.in_channels=[64,128,256,512]", "backbone.init_cfg=None")
    small = ("roi_head.bbox_head.fc_out_channels=64", "train_cfg.rcnn.sampler.num=32", "rpn_head.feat_channels=32")
    changes = [part for change in (*quarter, *small) for part in ("-o", f"model.{change}")]
    options = (*changes, "--scale", "128x96", "--batch-size", 4)
    ended = kit.run(
        *("train-student", "--cache", kit.cache, "--student", R50, "--work-dir", work / "w", "--epochs", 1),
        *("--workers", 0, "--methods", "sgfi,cls", *options),
    )
    assert "RoIs: those of the teacher" in ended.out
    assert (work / "w" / "student.pth").is_file()


@pytest.mark.parametrize("rois", ["student", "teacher"])
@pytest.mark.parametrize(("of_teacher", "of_student"), [(5, 4), pytest.param(4, 5, marks=pytest.mark.slow)])
def test_other_channels_widths_and_levels(kit: "Kit", work: Path, rois: str, of_teacher: int, of_student: int) -> None:
    cache = cached(kit, work, kit.tiny(R50, channels=16, fc=24, levels=of_teacher))
    spec = open_cache(cache).spec
    assert (spec.channels, spec.embedding_dim, len(spec.strides)) == (16, 24, of_teacher)
    config = kit.tiny("faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco", channels=8, fc=16, levels=of_student)
    steps = trained(kit, work, cache, config, "--rois", rois, "--methods", "sgfi,ckd,pred,reg")
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss
    weights = [step[f"sgfi_level{level}"] for step in steps for level in range(of_student)]
    assert sum(weights) == pytest.approx(len(steps), abs=1e-4)


# mmdet warns about the loss of the semantic branch, which nobody trains here
SEMANTIC = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``:UserWarning")

CASCADE = "cascade-rcnn_r50_fpn_1x_coco"
CASCADES = {
    "Cascade R-CNN": CASCADE,
    "Cascade Mask R-CNN": "cascade-mask-rcnn_r50_fpn_1x_coco",
    "Cascade DCN": "cascade-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "HTC": "htc_r50_fpn_1x_coco",
    "HTC without semantic branch": "htc-without-semantic_r50_fpn_1x_coco",
}
SINGLE = {
    "Mask R-CNN": "mask-rcnn_r50_fpn_1x_coco",
    "Mask DCN": "mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "C4": "faster-rcnn_r50-caffe-c4_ms-1x_coco",
    "DC5": "faster-rcnn_r50-caffe-dc5_1x_coco",
}


@SEMANTIC
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x == "C4" else x for x in (*CASCADES, *SINGLE)]
)
def test_detections_from_the_cache_are_those_of_mmdet(kit: "Kit", work: Path, name: str) -> None:
    """What is cached decodes to what mmdet's own pipeline and prediction say: boxes, classes and scores."""
    config = kit.tiny((CASCADES | SINGLE)[name])
    options = ("--targets", "predictions", "--dtype", "float32", "--limit", 3)
    cache = open_cache(cached(kit, work, config, *options))
    assert bool(cache.spec.cascade_stds) == (name in CASCADES)
    model = MODELS.build(config.model).eval()
    model.load_state_dict(load_checkpoint(work / "teacher.pth").state_dict)
    assert name not in CASCADES or name == "Cascade R-CNN" or "DCN" in name or model.roi_head.with_mask
    model.test_cfg.rpn.max_per_img = 40
    pipeline = Compose([step for step in config.test_dataloader.dataset.pipeline if step["type"] != "LoadAnnotations"])
    rule = model.roi_head.test_cfg
    total = 0
    for image_id in cache.image_ids.tolist():
        targets = cache.targets(image_id)
        assert targets.logits is not None
        scores = torch.softmax(targets.logits, dim=1)[: targets.num_proposals]
        boxes = targets.class_boxes(cache.spec)[: targets.num_proposals]
        actual, labels = multiclass_nms(boxes.flatten(1), scores, rule.score_thr, rule.nms, rule.max_per_img)
        sample = pipeline({"img_path": str(kit.img / targets.file_name), "img_id": image_id})
        with torch.no_grad():
            data = {"inputs": [sample["inputs"]], "data_samples": [sample["data_samples"]]}
            live = model.test_step(data)[0].pred_instances
        assert torch.equal(labels, live.labels)
        torch.testing.assert_close(actual[:, 4], live.scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(actual[:, :4], live.bboxes, rtol=0, atol=1e-2)
        total += len(labels)
    assert total > 30
    assert "AP" in kit.run("verify", work / "teacher.zarr", "--ap").out


def test_a_cascade_says_the_same_of_any_box(kit: "Kit", work: Path) -> None:
    """The frozen heads in the cache, asked about boxes that are no proposals, against mmdet's own refinement."""
    config = kit.tiny(CASCADE)
    cache = open_cache(cached(kit, work, config, "--dtype", "float32", "--limit", 1))
    checkpoint = load_checkpoint(work / "teacher.pth")
    teacher = load_teacher(checkpoint, teacher_config(checkpoint, None), proposals=40, device=torch.device("cpu"))
    image_id = int(cache.image_ids[0])
    targets = cache.targets(image_id, fields=("boxes",))
    view = read_teacher_view(cache, image_id, targets.matrix, missing_view="mirror")
    low = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([90.0, 60.0])
    boxes = torch.cat([low, low + 20], dim=1)
    boxes[:10] += torch.tensor([128.0, 96.0]).repeat(2) - boxes[:10, 2:].repeat(1, 2)  # where stages move them out
    rois = BatchRois(torch.cat([torch.zeros(30, 1), boxes], dim=1), torch.zeros(30).long(), torch.ones(30).bool())
    head = frozen_head(cache.head(), cache.spec)
    outputs = apply_teacher_head([view], rois, head, cache.spec, ("logits", "deltas", "embeddings", "roi_features"))
    pyramid, sample = teacher.pyramid(read_image(kit.img / targets.file_name), (96, 128), False)
    roi_head = teacher.model.roi_head
    with torch.no_grad():
        at, logits, deltas = roi_head._refine_roi(pyramid, rois.rois, [sample.metainfo], (30,))
        moved = roi_head.bbox_head[-1].bbox_coder.decode(at[0][:, 1:], deltas[0])
        features = roi_head.bbox_roi_extractor[0](pyramid[:4], rois.rois)
        last = roi_head.bbox_head[-1]
        wide = roi_head.bbox_roi_extractor[2](pyramid[:4], at[0]).flatten(1)
        for layer in last.shared_fcs:
            wide = layer(wide).relu()
    for actual, expected in ((outputs.logits, logits[0]), (outputs.embeddings, wide), (outputs.roi_features, features)):
        assert actual is not None
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert outputs.deltas is not None
    decoded = decode_deltas(boxes, outputs.deltas, cache.spec.box_means, cache.spec.box_stds)[:, 0]
    torch.testing.assert_close(decoded, moved, rtol=0, atol=1e-2)
    assert float((moved - boxes).abs().mean()) > 0.5  # it does move them


@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_a_cascade_teaches(kit: "Kit", work: Path, rois: str) -> None:
    cache = cached(kit, work, kit.tiny("cascade-mask-rcnn_r50_fpn_1x_coco", channels=16, fc=24))
    methods = ("--methods", "sgfi,ckd,cls,reg") if rois == "teacher" else ()  # the same by default
    steps = trained(kit, work, cache, kit.tiny(R50), "--rois", rois, *methods)
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg"):
        assert all(step[loss] > 0 for step in steps), loss


MORE_THAN_A_HEAD = {"C4": SINGLE["C4"], "HTC": CASCADES["HTC"]}


def shake(ckpt: Path) -> None:
    """Give the norms of a checkpoint something to do."""
    content = torch.load(ckpt, weights_only=True)
    g = torch.Generator().manual_seed(0)
    for name, value in content["state_dict"].items():
        if "shared_head" in name and value.dim() == 1 and value.is_floating_point():
            value.copy_(
                torch.rand(value.shape, generator=g) * 0.5 + (0.0 if "mean" in name or "bias" in name else 0.75)
            )
    torch.save(content, ckpt)


@SEMANTIC
@pytest.mark.parametrize("name", MORE_THAN_A_HEAD)
def test_a_head_behind_a_stage_or_beside_a_branch_says_the_same_of_any_box(kit: "Kit", work: Path, name: str) -> None:
    """From a float32 cache and beside the live teacher, at boxes that are no proposals: as mmdet's own code says."""
    ckpt, out = kit.save_detector(work / "teacher.pth", kit.tiny(MORE_THAN_A_HEAD[name])), work / "teacher.zarr"
    shake(ckpt)
    small = ("--scale", "128x96", "--proposals", 8, "--dtype", "float32", "--limit", 1)
    kit.run("cache-teacher", "--ckpt", ckpt, *kit.data, *small, "--out", out)
    cache, checkpoint = open_cache(out), load_checkpoint(ckpt)
    check_serves_student_rois(cache)
    teacher = load_teacher(checkpoint, teacher_config(checkpoint, None), proposals=8, device=torch.device("cpu"))
    targets = cache.targets(int(cache.image_ids[0]), fields=("boxes",))
    low = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([80.0, 50.0])
    boxes = torch.cat([low, low + torch.tensor([30.0, 25.0])], dim=1)
    rois = BatchRois(torch.cat([torch.zeros(12, 1), boxes], dim=1), torch.zeros(12).long(), torch.ones(12).bool())
    pyramid, sample = teacher.pyramid(read_image(kit.img / targets.file_name), (96, 128), False)
    with torch.no_grad():
        expected, features = teacher.box_outputs(pyramid, boxes, sample)
    image = torch.from_numpy(read_image(kit.img / targets.file_name).transpose(2, 0, 1).copy())
    views = {
        "cached": read_teacher_view(cache, targets.image_id, targets.matrix, missing_view="mirror"),
        "live": LiveTeacher(teacher, cache.spec).view(image),
    }
    needs = ("logits", "deltas", "embeddings", "roi_features")
    head = frozen_head(cache.head(), cache.spec)
    outputs = {name: apply_teacher_head([view], rois, head, cache.spec, needs) for name, view in views.items()}
    for field, value in ((name, features if name == "roi_features" else getattr(expected, name)) for name in needs):
        cached, live = (getattr(answers, field) for answers in outputs.values())
        assert float((cached - live).norm() / live.norm()) < 1e-5, field
        assert float((live - value).norm() / value.norm()) < 1e-4, field
    assert float(expected.logits.std(dim=0).mean()) > 1e-3, "the boxes differ"


@SEMANTIC
@pytest.mark.parametrize("name", [pytest.param("C4", marks=pytest.mark.slow), "HTC"])
def test_such_a_head_teaches_at_the_students_rois(kit: "Kit", work: Path, name: str) -> None:
    """From a cache and beside the teacher; at the teacher's own RoIs, too."""
    config = kit.tiny(MORE_THAN_A_HEAD[name])
    cache = cached(kit, work, config, "--proposals", 8)
    student = kit.tiny(R50)
    student.model.train_cfg.rcnn.sampler.num = 8
    steps = trained(kit, work, cache, student, "--methods", "sgfi,ckd,cls,reg", "--rois", "student")
    assert all(step[loss] > 0 for step in steps for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg"))
    beside = ("--teacher-ckpt", work / "teacher.pth", "--student", work / "student.py")
    options = (*beside, "--epochs", 1, "--methods", "cls")
    for rois in ("student", "teacher"):
        number = ("-o", "distill.rois.num=8") if rois == "teacher" else ()
        ended = kit.run(*kit.online_command(work / f"online-{rois}", *options, "--rois", rois, *number))
        assert f"RoIs: those of the {rois} (asked for)" in ended.out


def test_a_stage_of_an_unusual_kind_serves_the_teachers_rois_only(kit: "Kit", work: Path) -> None:
    config = kit.tiny(SINGLE["C4"])
    config.model.roi_head.shared_head.norm_cfg = {"type": "GN", "num_groups": 8}
    cache = cached(kit, work, config, "--proposals", 4, "--targets", "pyramid", "--limit", 1)
    assert not open_cache(cache).spec.shared_style
    student = ("--student", kit.student, "--methods", "cls")
    message = kit.refused(*kit.student_command(work / "v", *student, "--rois", "student", cache=cache))
    assert "Expected bottleneck blocks with batch norms" in message
    assert "Use --rois teacher" in message


def test_online_beside_a_cascade(kit: "Kit", work: Path) -> None:
    ckpt = kit.save_detector(work / "teacher.pth", kit.tiny(CASCADE))
    kit.run(*kit.online_command(work / "w", "--teacher-ckpt", ckpt, "--epochs", 1, "--methods", "sgfi,cls,reg"))
    assert (work / "w" / "student.pth").is_file()


@pytest.mark.parametrize(
    ("teacher", "rois"),
    [
        (R50, "student"),
        (CASCADE, "teacher"),
        pytest.param(R50, "teacher", marks=pytest.mark.slow),
        pytest.param(CASCADE, "student", marks=pytest.mark.slow),
    ],
)
def test_a_cascade_learns(kit: "Kit", work: Path, teacher: str, rois: str) -> None:
    cache = cached(kit, work, kit.tiny(teacher, channels=16, fc=24))
    steps = trained(kit, work, cache, kit.tiny(CASCADE), "--rois", rois, "--methods", "sgfi,ckd,cls,reg")
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_reg", "s0.loss_cls", "s2.loss_cls"):
        assert all(step[loss] > 0 for step in steps), loss
    plain = MODELS.build(kit.tiny(CASCADE).model)
    plain.load_state_dict(load_checkpoint(work / "w" / "student.pth").state_dict)


def test_a_cascade_gets_the_heads_of_a_cascade(kit: "Kit", work: Path) -> None:
    cache = cached(kit, work, kit.tiny(CASCADE))
    trained(kit, work, cache, kit.tiny("cascade-rcnn_r101_fpn_1x_coco"), "--methods", "sgfi,cls,reg,ht")
    weights = load_checkpoint(work / "w" / "student.pth").state_dict
    for name, value in open_cache(cache).head().items():
        assert torch.equal(weights[name], value), name


def test_a_cascade_cannot_weigh_classes(kit: "Kit", work: Path) -> None:
    student = work / "student.py"
    student.write_text(kit.tiny(CASCADE).pretty_text)
    message = kit.refused(*kit.student_command(work / "w", "--student", student, "--methods", "sgfi,ckd,pred"))
    assert "class-agnostic" in message
    assert "--methods cls,reg" in message
    ended = kit.train_student(work / "w", "--student", student)  # by default, it does what can be done
    assert "Methods: sgfi,ckd,cls,reg, with cls and reg in place of pred" in ended.out
    assert "that of the student is for all classes" in ended.out


def test_a_c4_teaches(kit: "Kit", work: Path) -> None:
    """One level, whose RoI features go through a residual stage: of the teacher's boxes the cache knows all."""
    cache = cached(kit, work, kit.tiny(SINGLE["C4"]), "--proposals", 12, "--limit", 2, "--dtype", "int8")
    assert (open_cache(cache).spec.strides, open_cache(cache).spec.roi_size) == ((16,), 7)
    steps = trained(kit, work, cache, kit.tiny(R50), "--rois", "teacher", "--batch-size", 2)
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss
    roi = work / "roi.zarr"
    kind = ("--proposals", 12, "--targets", "objects", "--dtype", "float32", "--limit", 1)
    kit.run("cache-teacher", "--ckpt", work / "teacher.pth", *kit.data, *kit.VIEW, *kind, "--out", roi)
    image_id = int(open_cache(roi).image_ids[0])
    targets = open_cache(roi).targets(image_id)
    (level,) = open_cache(cache).targets(image_id).pyramid()
    assert level is not None
    assert targets.roi_rows is not None
    boxes = targets.boxes[targets.roi_rows.long()]
    rois = torch.cat([torch.zeros(len(boxes), 1), map_boxes(boxes, targets.matrix)], dim=1)
    expected = roi_align(level[None], rois, 7, 1 / 16, aligned=True)
    assert float((targets.float_roi_features() - expected).norm() / expected.norm()) < 0.03  # the pyramid is int8


@pytest.mark.parametrize("rois", ["student", "teacher"])
def test_a_detector_without_pyramid_teaches_and_learns(kit: "Kit", work: Path, rois: str) -> None:
    cache = cached(kit, work, kit.tiny(SINGLE["DC5"]))
    steps = trained(kit, work, cache, kit.tiny(SINGLE["DC5"]), "--rois", rois)
    assert all(step["loss_sgfi"] > 0 and step["sgfi_level0"] == pytest.approx(1) for step in steps)


def test_a_c4_learns(kit: "Kit", work: Path) -> None:
    config = kit.tiny(SINGLE["C4"])
    config.model.train_cfg.rcnn.sampler.num = 8
    kit.run("cache-teacher", *kit.source, *kit.VIEW, "--limit", 2, "--out", work / "two.zarr")
    steps = trained(kit, work, work / "two.zarr", config, "--batch-size", 2)
    for loss in ("loss_sgfi", "loss_ckd", "loss_kd_cls", "loss_kd_careg"):
        assert all(step[loss] > 0 for step in steps), loss


def test_stages_that_look_in_different_ways_are_refused(kit: "Kit", work: Path) -> None:
    config = kit.tiny(CASCADE)
    extractor = config.model.roi_head.bbox_roi_extractor
    config.model.roi_head.bbox_roi_extractor = [{**extractor, "finest_scale": 28 * (i + 1)} for i in range(3)]
    ckpt = kit.save_detector(work / "teacher.pth", config)
    message = kit.refused("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--out", work / "x.zarr")
    assert "The stages of the teacher's cascade differ in their RoI extractors" in message


def test_what_is_no_known_family_is_refused(kit: "Kit", work: Path) -> None:
    config = kit.tiny(R50)
    config.model.roi_head.type = "PISARoIHead"
    ckpt = kit.save_detector(work / "teacher.pth", config)
    message = kit.refused("cache-teacher", "--ckpt", ckpt, *kit.data, *kit.VIEW, "--out", work / "x.zarr")
    assert "has a PISARoIHead" in message
    assert "Faster R-CNN, Mask R-CNN, Cascade R-CNN, Cascade Mask R-CNN, HTC" in message
