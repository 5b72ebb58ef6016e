"""What tests of students beside a teacher share."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.structures import InstanceData
from torch import Tensor

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.teacher.any_box import TeacherView
from kdpipe.pipelines.detectors.configs import find_config, set_num_classes

OTHERS = {
    "cascade_rcnn": "cascade-rcnn_r50_fpn_1x_coco",
    "retinanet": "retinanet_r18_fpn_1x_coco",
    "fcos": "fcos_r50-caffe_fpn_gn-head_1x_coco",
    "atss": "atss_r50_fpn_1x_coco",
}


class HeadOnly:
    """A teacher source that knows the heads only: targets are given to the detector as they are."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    def head_state(self) -> Mapping[str, Tensor]:
        return self._state

    def targets(self, data: Any, device: torch.device) -> list[TeacherView]:
        return []


class Pair:
    """A tiny student, the box head of a teacher, and a batch of noise."""

    source = HeadOnly
    classes, channels, width = 3, 6, 20
    spec = CacheSpec(
        tier="pyramid",
        dtype="float32",
        codec="none",
        class_names=("a", "b", "c"),
        category_ids=(1, 2, 3),
        channels=channels,
        strides=(4, 8, 16, 32, 64),
        roi_levels=4,
        finest_scale=28,
        roi_size=7,
        roi_sampling_ratio=0,
        roi_aligned=True,
        embedding_dim=width,
        box_means=(0.0, 0.0, 0.0, 0.0),
        box_stds=(0.1, 0.1, 0.2, 0.2),
        class_agnostic=False,
        proposals=50,
        views=("identity",),
        scale=(64, 64),
    )

    @classmethod
    def head(cls, **options: Any) -> Any:
        """A box head of mmdet whose outputs differ from RoI to RoI."""
        register_all_modules(init_default_scope=True)
        sizes = {"in_channels": cls.channels, "num_classes": cls.classes, "fc_out_channels": cls.width}
        layers = {"type": "ConvFCBBoxHead", "roi_feat_size": 7, "num_shared_fcs": 2}
        head = MODELS.build({**layers, **sizes, **options})
        generator = torch.Generator().manual_seed(0)
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
        return head.eval()

    @staticmethod
    def state(head: torch.nn.Module) -> dict[str, Tensor]:
        """Its weights by their names in a detector."""
        return {f"roi_head.bbox_head.{name}": value for name, value in head.state_dict().items()}

    @staticmethod
    def levels(views: Sequence[TeacherView]) -> list[Tensor]:
        """The pyramids of some images of the same size, per level Tensor[B, C, h, w]."""
        of_images = [[level for level in view.pyramid if level is not None] for view in views]
        return [torch.stack(level) for level in zip(*of_images, strict=True)]

    @classmethod
    def student(cls) -> Any:
        """Config of a narrow Faster R-CNN."""
        register_all_modules(init_default_scope=True)
        model = find_config("faster-rcnn_r50_fpn_1x_coco").model
        model.backbone.update(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1, norm_eval=False)
        model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
        model.rpn_head.update(in_channels=8, feat_channels=8)
        model.roi_head.bbox_roi_extractor.out_channels = 8
        model.roi_head.bbox_head.update(in_channels=8, fc_out_channels=16, num_classes=cls.classes)
        model.train_cfg.rcnn.sampler.num = 16
        model.train_cfg.rpn_proposal.max_per_img = 20
        return model

    @classmethod
    def student_of(cls, family: str) -> Any:
        """Config of a narrow detector: `faster_rcnn`, or one of `OTHERS`."""
        narrow = cls.student()
        if family == "faster_rcnn":
            return narrow
        model = find_config(OTHERS[family]).model
        model.backbone = narrow.backbone
        if family == "cascade_rcnn":
            model.neck, model.rpn_head = narrow.neck, narrow.rpn_head
            model.roi_head.bbox_roi_extractor.out_channels = 8
            for head in model.roi_head.bbox_head:
                head.update(in_channels=8, fc_out_channels=16)
            model.train_cfg.rpn_proposal.max_per_img = 20
        else:
            model.neck.update(in_channels=[8, 16, 32, 64], out_channels=8)
            model.bbox_head.update(in_channels=8, feat_channels=12, stacked_convs=2)
            if family != "retinanet":
                model.bbox_head.norm_cfg = {"type": "GN", "num_groups": 2, "requires_grad": True}
        set_num_classes(model, cls.classes)
        return model

    @classmethod
    def batch(cls, count: int = 2) -> dict[str, Any]:
        """Images of 64 x 64 pixels with three boxes each."""
        g = torch.Generator().manual_seed(1)
        inputs, samples = [], []
        for index in range(count):
            inputs.append(torch.randint(0, 256, (3, 64, 64), generator=g, dtype=torch.uint8))
            info = {"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0), "img_id": 70 + index}
            corner = torch.rand(3, 2, generator=g) * 30
            boxes = torch.cat([corner, corner + 20], dim=1)
            sample = DetDataSample(metainfo=info)
            labels = torch.randint(0, cls.classes, (3,), generator=g)
            sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
            samples.append(sample)
        return {"inputs": inputs, "data_samples": samples}


@pytest.fixture(scope="session")
def pair() -> type[Pair]:
    return Pair


# Modules that know a shortcut for CPUs: by name, since a shortcut that is not switched off here is found by the tests
SHORTCUTS = (
    "distill.losses.ckd_negatives",
    "distill.losses.prediction",
    "distill.rois.align",
    "distill.rois.convolution",
    "distill.rois.pairing",
    "pipelines.mmcv_ops.roi",
)


class OtherDevices:
    """The ways that a GPU goes, on whatever device there is."""

    @contextmanager
    def ways(self) -> Iterator[None]:
        """Take no shortcut that is for CPUs only."""
        with ExitStack() as stack:
            for name in SHORTCUTS:
                stack.enter_context(patch(f"kdpipe.{name}.on_cpu", lambda tensor: False))
            yield


@pytest.fixture(scope="session")
def other_devices() -> OtherDevices:
    return OtherDevices()
