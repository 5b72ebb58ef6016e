"""Size of the demo, and the mmdet configs of its detectors."""

from dataclasses import dataclass, field

__all__ = ["DemoSettings", "Width", "detector_config"]

_CONFIG = """\
# {origin}: a narrow Faster R-CNN for small objects, trained from scratch.
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"

model = dict(
    backbone=dict(depth=18, base_channels={base}, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels={stages}, out_channels={pyramid}),
    rpn_head=dict(in_channels={pyramid}, feat_channels={pyramid}, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels={pyramid}, finest_scale=28),
        bbox_head=dict(in_channels={pyramid}, fc_out_channels={head}),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num={rois})),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num={rois})),
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
train_dataloader = dict(batch_size={batch_size})
train_cfg = dict(max_epochs={epochs}, val_interval={epochs})
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr={lr}, weight_decay=0.05))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end={warmup}),
    dict(type="CosineAnnealingLR", by_epoch=False, begin={warmup}, end={steps}, T_max={decay}),
]
"""


@dataclass(frozen=True)
class Width:
    """How wide a Faster R-CNN with ResNet-18 is.

    Attributes:
        base: Channels of the first stage of the backbone; 64 is the usual width.
        pyramid: Channels of the feature pyramid and of the RPN.
        head: Width of the fully connected layers of the box head.
    """

    base: int
    pyramid: int
    head: int


@dataclass(frozen=True)
class DemoSettings:
    """Size of the demo.

    Attributes:
        train: Pictures to train students on.
        val: Pictures to measure AP on.
        size: (height, width) of a picture in pixels, which is the network input too.
        student: Width of both students.
        epochs: Passes of each student over the pictures.
        teacher: Width of the teacher.
        teacher_train: Pictures that the teacher was trained on, of which the first are those of the students.
        teacher_epochs: Passes of the teacher over its pictures.
        batch_size: Pictures per step.
        lr: Peak learning rate, of AdamW.
        rois: Boxes sampled per picture, by the detector's own loss and by the distillation.
        proposals: Boxes of the teacher kept per picture.
        methods: What the distilled student learns from the teacher.
        seed: Of pictures and trainings.
    """

    train: int = 400
    val: int = 100
    size: tuple[int, int] = (128, 160)
    student: Width = field(default_factory=lambda: Width(16, 32, 128))
    epochs: int = 12
    teacher: Width = field(default_factory=lambda: Width(24, 48, 256))
    teacher_train: int = 1600
    teacher_epochs: int = 12
    batch_size: int = 4
    lr: float = 0.002
    rois: int = 64
    proposals: int = 100
    methods: tuple[str, ...] = ("sgfi", "ckd", "pred")
    seed: int = 0


def detector_config(origin: str, width: Width, epochs: int, images: int, settings: DemoSettings) -> str:
    """The text of a config file, which says how the detector is trained, too.

    Args:
        origin: What wrote it, for its first line.
        width: Of the detector.
        epochs: Passes over the pictures.
        images: Number of pictures.
        settings: The rest.
    """
    steps = epochs * -(-images // settings.batch_size)
    warmup = steps // 6
    return _CONFIG.format(
        origin=origin,
        base=width.base,
        stages=[width.base * factor for factor in (1, 2, 4, 8)],
        pyramid=width.pyramid,
        head=width.head,
        rois=settings.rois,
        batch_size=settings.batch_size,
        epochs=epochs,
        lr=settings.lr,
        warmup=warmup,
        steps=steps,
        decay=steps - warmup,
    )
