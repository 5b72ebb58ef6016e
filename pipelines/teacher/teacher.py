"""The teacher: any mmdet two-stage detector with shared-FC box heads, asked for all it has to say of one image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

from kdpipe.cache.records import TeacherRecord
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.views import map_boxes, view_matrix
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.checkpoints import Checkpoint, load_strict
from kdpipe.pipelines.detectors.configs import config_from_checkpoint, find_config
from kdpipe.pipelines.detectors.mmdet2 import for_inference
from kdpipe.pipelines.teacher.arithmetic import in_full_precision
from kdpipe.pipelines.teacher.families import box_outputs, is_cascade, roi_size, semantic_branch, shared_style, stages
from kdpipe.pipelines.teacher.family_checks import TeacherError, check_classes_of_config, check_family
from kdpipe.pipelines.teacher.jitter import jittered_boxes
from kdpipe.pipelines.teacher.pixel_pipeline import NetworkInput, PixelPipeline, teacher_pixels

__all__ = ["Teacher", "load_teacher", "teacher_config"]

# Branches of a teacher that say nothing of boxes: not built, and allowed to be left over in its checkpoint.
_MASK_BRANCHES = ("mask_roi_extractor", "mask_head", "shared_head_mask")

# Box deltas of classes with a lower probability are merged in small types, unless these may become detections.
_DELTA_FLOOR = 0.01


def teacher_config(checkpoint: Checkpoint, config: str | None) -> Config:
    """The teacher's config: the one named, or the one that its checkpoint carries.

    Raises:
        TeacherError: neither is there.
    """
    cfg = find_config(config) if config else config_from_checkpoint(checkpoint)
    if cfg is None:
        raise TeacherError(
            f"{checkpoint.path} carries no config (expected the text in meta['cfg'] or meta['config']). "
            "Name it: --config faster-rcnn_x101-64x4d_fpn_1x_coco, or a path to a config file."
        )
    return for_inference(cfg)


def load_teacher(checkpoint: Checkpoint, config: Config, *, proposals: int, device: torch.device) -> "Teacher":
    """Build the teacher and load its weights strictly.

    Args:
        checkpoint: Of an mmdet detector.
        config: Its config, as `teacher_config` gives it.
        proposals: How many of its proposals are kept per image.
        device: Where it runs.

    Raises:
        TeacherError: the model is of a family that cannot teach.
        KdpipeError: weights are missing, unexpected or mis-shaped; or its test pipeline cannot be applied.
    """
    register_all_modules(init_default_scope=True)
    model_config = config.model.copy()
    check_classes_of_config(model_config)
    for branch in _MASK_BRANCHES:
        model_config.get("roi_head", {}).pop(branch, None)
    model_config.pop("init_cfg", None)
    model_config.get("backbone", {}).pop("init_cfg", None)
    with building("The teacher"):
        model = MODELS.build(model_config)
        check_family(model)
    pixels = teacher_pixels(config)
    ignored = [f"roi_head.{branch}." for branch in _MASK_BRANCHES]
    load_strict(model, checkpoint.state_dict, path=checkpoint.path, ignore_prefixes=ignored)
    teacher = Teacher(model.to(device).eval(), device, pixels)
    teacher.keep_proposals(proposals)
    return teacher


class Teacher:
    """A frozen two-stage detector that answers for one image at a time.

    Images are never batched: padding to a common size would leak into the features.

    Args:
        model: The detector, in eval mode and on its device.
        device: Where it runs.
        pixels: What it is shown of an image; by default as mmdet's own configs have it.
    """

    def __init__(self, model: Any, device: torch.device, pixels: PixelPipeline | None = None) -> None:
        self.model = model
        self.device = device
        self.pixels = pixels or PixelPipeline()
        self._embeddings: list[Tensor] = []
        rpn = model.rpn_head.test_cfg
        self._kept, self._candidates = int(rpn.get("max_per_img") or 0), int(rpn.get("nms_pre") or 0)
        _, box_head = stages(model.roi_head)[-1]
        box_head.fc_cls.register_forward_pre_hook(self._keep_embeddings)

    def _keep_embeddings(self, layer: Any, inputs: tuple[Tensor, ...]) -> None:
        self._embeddings[:] = inputs

    @property
    def num_classes(self) -> int:
        return int(stages(self.model.roi_head)[0][1].num_classes)

    def head_state(self) -> dict[str, Tensor]:
        """Weights and buffers of the RPN and of the RoI head, by their names in the detector's state dict."""
        heads = ("rpn_head.", "roi_head.")
        return {name: value for name, value in self.model.state_dict().items() if name.startswith(heads)}

    def spec(
        self,
        *,
        tier: str,
        dtype: str,
        codec: str,
        class_names: Sequence[str],
        category_ids: Sequence[int],
        proposals: int,
        views: Sequence[str],
        scale: tuple[int, int],
        jittered: int = 0,
    ) -> CacheSpec:
        """What a cache of this teacher holds.

        Args:
            tier: One of `TIERS`.
            dtype: One of `DTYPES`.
            codec: One of `CODECS`.
            class_names: In label order.
            category_ids: Of the classes, in the data set.
            proposals: Best proposals kept per image.
            views: Some of `VIEWS`.
            scale: `(w, h)` that images are fitted into.
            jittered: Boxes near objects kept per image.
        """
        roi_head = self.model.roi_head
        least_score = float((roi_head.test_cfg or {}).get("score_thr", 0.0))  # of what it calls a detection
        extractor, head = stages(roi_head)[0]
        align = extractor.roi_layers[0]
        return CacheSpec(
            tier=tier,
            dtype=dtype,
            codec=codec,
            class_names=tuple(class_names),
            category_ids=tuple(category_ids),
            channels=extractor.out_channels,
            strides=tuple(int(stride[0]) for stride in self.model.rpn_head.prior_generator.strides),
            roi_levels=extractor.num_inputs,
            finest_scale=int(extractor.finest_scale),
            roi_size=roi_size(roi_head),
            roi_sampling_ratio=align.sampling_ratio,
            roi_aligned=align.aligned,
            embedding_dim=head.fc_cls.in_features,
            box_means=_four(head.bbox_coder.means),
            box_stds=_four(head.bbox_coder.stds),
            class_agnostic=head.reg_class_agnostic,
            proposals=proposals,
            views=tuple(views),
            scale=scale,
            cascade_stds=tuple(_four(x.bbox_coder.stds) for x in roi_head.bbox_head) if is_cascade(roi_head) else (),
            shared_style=shared_style(roi_head),
            semantic=semantic_branch(roi_head),
            delta_floor=min(_DELTA_FLOOR, least_score),
            jittered=jittered,
        )

    @torch.inference_mode()
    def record(
        self,
        image: npt.NDArray[np.uint8] | NetworkInput,
        gt_boxes: npt.NDArray[np.float32],
        gt_labels: npt.NDArray[np.int64] | None = None,
        *,
        spec: CacheSpec,
        image_id: int,
        file_name: str,
        view: str,
        file_digest: int = 0,
    ) -> TeacherRecord:
        """Everything the teacher says of one image in one view.

        Args:
            image: `[h, w, 3]` uint8, BGR, as `read_image` decodes it, or what `network_input` made of it.
            gt_boxes: `[G, 4]` (x1, y1, x2, y2) in original pixels.
            gt_labels: `[G]` of these; None where the record is not for a cache.
            spec: Whose view is asked for.
            image_id: COCO image id.
            file_name: The image's name in the data set.
            view: One of `spec.views`.
            file_digest: Of the image file, as `load_picture` gives it; 0 where it is not known.
        """
        if not isinstance(image, NetworkInput):
            image = self.network_input(image, spec.scale, view == "hflip")
        pyramid, sample = self.pyramid_of_input(image.on(self.device), **image.metainfo)
        matrix = view_matrix(image.original, image.size, image.flip)
        truth = torch.from_numpy(gt_boxes).reshape(-1, 4)
        near = jittered_boxes(truth, image.original, spec.jittered, seed=(2 * image_id + VIEWS.index(view)) % 2**63)
        proposals = self.proposals(pyramid, sample)  # a GPU has computed the pyramid meanwhile
        boxes = torch.cat([proposals, *(map_boxes(x, matrix).to(proposals) for x in (near, truth))])  # [R, 4]
        outputs, roi_features = self.box_outputs(pyramid, boxes, sample)
        return TeacherRecord(
            image_id=image_id,
            view=view,
            file_name=file_name,
            original_size=image.original,
            input_size=image.size,
            num_proposals=len(proposals),
            num_jittered=len(near),
            boxes=map_boxes(boxes.double(), np.linalg.inv(matrix)).float(),
            logits=outputs.logits,
            deltas=outputs.deltas,
            embeddings=outputs.embeddings,
            roi_features=roi_features,
            features=tuple(level[0] for level in pyramid),
            gt_labels=None if gt_labels is None else torch.from_numpy(gt_labels),
            file_digest=file_digest,
        )

    def keep_proposals(self, count: int) -> int:
        """Give the best so many proposals of an image from now on; how many it gave before."""
        rpn, before = self.model.rpn_head.test_cfg, self._kept
        self._kept = rpn.max_per_img = count
        if self._candidates > 0:  # otherwise it has no limit
            rpn.nms_pre = max(self._candidates, count)
        return before

    @in_full_precision
    def proposals(self, pyramid: tuple[Tensor, ...], sample: DetDataSample) -> Tensor:
        """The best proposals on a pyramid, Tensor[P, 4] (x1, y1, x2, y2), pixels of the network input."""
        boxes: Tensor = self.model.rpn_head.predict(pyramid, [sample], rescale=False)[0].bboxes
        return boxes

    @in_full_precision
    def box_outputs(
        self, pyramid: tuple[Tensor, ...], boxes: Tensor, sample: DetDataSample
    ) -> tuple[HeadOutputs, Tensor]:
        """What it says of boxes, and their RoI features: see `families.box_outputs`.

        Args:
            pyramid: Levels `[1, C, h_l, w_l]`.
            boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the network input.
            sample: Of the image, as `pyramid` gives it.
        """
        return box_outputs(self.model.roi_head, pyramid, boxes, sample, self._embeddings)

    def pyramid(
        self, image: npt.NDArray[np.uint8], scale: tuple[int, int], flip: bool
    ) -> tuple[tuple[Tensor, ...], DetDataSample]:
        """FPN features of one image, padded as the teacher's pipeline and preprocessor do it.

        Args:
            image: `[h, w, 3]` uint8, BGR.
            scale: `(w, h)` that the image is fitted into.
            flip: Mirror the resized image.

        Returns:
            As `pyramid_of_input`; boxes are kept in the resized image, outside of which is padding.
        """
        seen = self.network_input(image, scale, flip)
        return self.pyramid_of_input(seen.on(self.device), **seen.metainfo)

    def network_input(self, image: npt.NDArray[np.uint8], scale: tuple[int, int], flip: bool) -> NetworkInput:
        """What of `pyramid` may be done ahead, on any thread; arguments are the same."""
        return self.pixels.network_input(image, scale, flip, pin=self.device.type == "cuda")

    @in_full_precision
    def pyramid_of_input(self, pixels: Tensor, **metainfo: Any) -> tuple[tuple[Tensor, ...], DetDataSample]:
        """FPN features of one network input, normalised and padded as the teacher's preprocessor does it.

        Args:
            pixels: Tensor[3, h, w], as the teacher's pipeline gives it.
            metainfo: What is known of the image beside its shape, by mmdet's names.

        Returns:
            Levels `[1, C, h_l, w_l]`, and the sample that mmdet's heads want beside them.
        """
        shape = tuple(pixels.shape[1:])
        sample = DetDataSample(
            metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0), **metainfo}
        )
        data = self.model.data_preprocessor({"inputs": [pixels], "data_samples": [sample]}, training=False)
        return self.model.extract_feat(data["inputs"]), data["data_samples"][0]

    def to(self, device: torch.device) -> None:
        """Move the teacher to a device, unless it is there."""
        if device != self.device:
            self.model.to(device)
            self.device = device


def _four(values: Sequence[float]) -> tuple[float, float, float, float]:
    first, second, third, fourth = (float(value) for value in values)
    return first, second, third, fourth
