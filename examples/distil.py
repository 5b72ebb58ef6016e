"""Distillation as a config of mmdet: `python train.py` trains it; coco.zarr is what `kdpipe cache-teacher` wrote."""

_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
custom_imports = dict(imports=["kdpipe.pipelines.training.transforms", "kdpipe.distill.detector"])

from kdpipe.cache import open_cache

cache = "coco.zarr"
model = dict(
    _delete_=True,
    type="DistilledDetector",
    student=_base_.model,
    spec=open_cache(cache).spec.to_json(),
    methods=["sgfi", "ckd", "pred"],
    teacher=dict(type="CachedTargets", cache=cache),
)
train_pipeline = [
    *_base_.train_pipeline[:-1],
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "img_shape", "ori_shape", "flip", "homography_matrix")),
    dict(type="AddTeacherTargets", cache=cache, methods=model["methods"], roi_source="student"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline), multiprocessing_context="forkserver")
