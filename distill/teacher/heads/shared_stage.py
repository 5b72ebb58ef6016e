"""The frozen box head of Faster R-CNN C4, whose RoI features go through the last residual stage of a ResNet first."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import check_shape, no_autocast
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.teacher.heads.fc import TeacherHead, TeacherHeadError, moved_to, parameters_of
from kdpipe.distill.teacher.pyramids import TeacherRois

SHARED_STAGE = "roi_head.shared_head."
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_LAYERS = re.compile(rf"layer\d\.\d+\.(conv[123]\.weight|bn[123]\.{_NORM}|downsample\.(0\.weight|1\.{_NORM}))")
_EPS = 1e-5  # of the norms
_ROIS = 128  # at a time: the features inside the stage are eight times as large as those that go in


class SharedStageHead:
    """A stage of bottleneck blocks, which halves RoI features in size, and the box head behind it.

    Not a Module, as `TeacherHead`.

    Args:
        state: Parameters by their names in the teacher's state dict.
        spec: What the teacher is, `shared_style` included.

    Raises:
        TeacherHeadError: The stage or the head has other layers than these.
    """

    def __init__(self, state: Mapping[str, Tensor], spec: CacheSpec) -> None:
        self._state = parameters_of(state, SHARED_STAGE)
        if unknown := sorted(name for name in self._state if not _LAYERS.fullmatch(name)):
            raise TeacherHeadError(
                "The teacher's shared residual stage cannot be rebuilt from its weights: it has "
                f"{', '.join(SHARED_STAGE + name for name in unknown[:3])}. Expected bottleneck blocks with "
                "batch norms."
            )
        blocks = {name.rsplit(".conv1", 1)[0] for name in self._state if name.endswith(".conv1.weight")}
        self._blocks = sorted(blocks, key=lambda name: int(name.split(".")[1]))
        if not spec.shared_style or not self._blocks:
            raise TeacherHeadError(
                "The teacher's RoI head has a shared residual stage of which the cache does not say how it is built. "
                "It is of an unusual kind, or was cached by an older kdpipe; in the second case, cache it again."
            )
        self._caffe = spec.shared_style == "caffe"
        self._in = spec.channels
        self.size = 2 * spec.roi_size
        width = self._state[f"{self._blocks[-1]}.conv3.weight"].shape[0]
        self._head = TeacherHead(state, spec, channels=width)

    def __call__(self, rois: TeacherRois) -> HeadOutputs:
        """What the teacher says of boxes, in float32, autocast or not."""
        return self.of_features(rois.features_at(rois.boxes, self.size))

    def of_features(self, features: Tensor) -> HeadOutputs:
        """What the teacher says of RoI features, in float32, autocast or not. Gradients reach these.

        Args:
            features: Tensor[R, C, 2 * size, 2 * size] in the teacher's orientation, on the pyramid before the stage.

        Raises:
            LossInputError: features of another shape.
        """
        shape = (features.shape[0], self._in, self.size, self.size)
        check_shape("features", features, shape, "the teacher's shared residual stage")
        self._state = moved_to(self._state, features.device)
        with no_autocast(features):
            parts = [self._stage(part) for part in features.float().split(_ROIS)]
        return self._head.of_features(torch.cat(parts))

    def _stage(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self._blocks):
            stride = 2 if index == 0 else 1
            out = self._conv(f"{block}.conv1", f"{block}.bn1", x, stride if self._caffe else 1).relu_()
            out = self._conv(f"{block}.conv2", f"{block}.bn2", out, 1 if self._caffe else stride).relu_()
            out = self._conv(f"{block}.conv3", f"{block}.bn3", out, 1)
            if f"{block}.downsample.0.weight" in self._state:
                x = self._conv(f"{block}.downsample.0", f"{block}.downsample.1", x, stride)
            x = out.add_(x).relu_()
        return x

    def _conv(self, conv: str, norm: str, x: Tensor, stride: int) -> Tensor:
        weight = self._state[f"{conv}.weight"]
        x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)
        mean, var, scale, shift = (
            self._state[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return functional.batch_norm(x, mean, var, scale, shift, training=False, eps=_EPS)
