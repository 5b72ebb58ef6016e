"""The teacher's box head, frozen, from the parameters that a cache keeps: no model of the teacher is built."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import check_shape, no_autocast
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.teacher.pyramids import TeacherRois

_LAYERS = re.compile(r"(shared_fcs\.\d+|cls_fcs\.\d+|reg_fcs\.\d+|fc_cls|fc_reg)\.(weight|bias)")


class TeacherHeadError(KdpipeError):
    """The teacher's box head is of a kind that cannot be rebuilt from its parameters."""


def parameters_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A part of the teacher: its parameters in float32, by their names without the prefix."""
    return {
        name.removeprefix(prefix): value.detach().float() for name, value in state.items() if name.startswith(prefix)
    }


def moved_to(state: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The parameters on a device; the same dictionary where they are there already."""
    if next(iter(state.values())).device == device:
        return state
    return {name: value.to(device) for name, value in state.items()}


class TeacherHead:
    """Fully connected layers as in mmdet's `ConvFCBBoxHead`: shared ones, those of each branch, the two outputs.

    Not a Module, so that nothing of the teacher is among the parameters or in the checkpoints of a student. The weights
    follow the features that they are applied to to another device, once.

    Args:
        state: Parameters by their names in the teacher's state dict, as `TeacherCache.head()` gives them.
        spec: What the teacher is.
        prefix: Of these names; that of a stage in a cascade.
        channels: Of the features; by default those of the pyramid.

    Raises:
        TeacherHeadError: the head has other layers than these, or they do not fit each other.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        spec: CacheSpec,
        prefix: str = "roi_head.bbox_head.",
        channels: int | None = None,
    ) -> None:
        self._spec = spec
        self._channels = channels or spec.channels
        self._state = parameters_of(state, prefix)
        unknown = sorted(name for name in self._state if not _LAYERS.fullmatch(name))
        if unknown or not {"fc_cls.weight", "fc_reg.weight"} <= self._state.keys():
            layers = (
                ", ".join(f"{prefix}{name}" for name in unknown[:3])
                if unknown
                else f"neither {prefix}fc_cls nor {prefix}fc_reg"
            )
            raise TeacherHeadError(
                f"The teacher's box head cannot be rebuilt from its weights: it has {layers}. Expected fully connected "
                "layers only (shared_fcs, cls_fcs, reg_fcs, fc_cls, fc_reg)."
            )
        self._layers = {
            branch: sorted({int(name.split(".")[1]) for name in self._state if name.startswith(f"{branch}.")})
            for branch in ("shared_fcs", "cls_fcs", "reg_fcs")
        }
        first = self._state["shared_fcs.0.weight" if self._layers["shared_fcs"] else "fc_cls.weight"]
        self._pooled = first.shape[1] == self._channels and spec.roi_size > 1
        width = self._channels * (1 if self._pooled else spec.roi_size**2)
        classes = 1 if spec.class_agnostic else spec.num_classes
        for what, size, expected in (
            ("inputs of its first layer", first.shape[1], width),
            ("inputs of its classifier", self._state["fc_cls.weight"].shape[1], spec.embedding_dim),
            ("class scores", self._state["fc_cls.weight"].shape[0], spec.num_classes + 1),
            ("box deltas", self._state["fc_reg.weight"].shape[0], 4 * classes),
        ):
            if size != expected:
                raise TeacherHeadError(
                    f"The teacher's box head cannot be rebuilt from its weights: {what}: found {size}, expected "
                    f"{expected}."
                )

    def __call__(self, rois: TeacherRois) -> HeadOutputs:
        """What the teacher says of boxes, in float32, autocast or not."""
        return self.of_features(rois.features)

    def of_features(self, features: Tensor) -> HeadOutputs:
        """What the teacher's head says of RoI features, in float32, autocast or not. Gradients reach these.

        Args:
            features: Tensor[R, C, size, size] in the teacher's orientation.

        Raises:
            LossInputError: features of another shape.
        """
        spec = self._spec
        shape = (features.shape[0], self._channels, spec.roi_size, spec.roi_size)
        check_shape("features", features, shape, "the teacher's box head")
        self._state = moved_to(self._state, features.device)
        with no_autocast(features):
            x = features.float()
            x = self._through("shared_fcs", x.mean(dim=(2, 3)) if self._pooled else x.flatten(1))
            embeddings = self._through("cls_fcs", x)  # [R, D]
            logits = self._linear("fc_cls", embeddings)  # [R, K + 1]
            deltas = self._linear("fc_reg", self._through("reg_fcs", x))  # [R, K * 4]
        return HeadOutputs(embeddings, logits, deltas.unflatten(1, (-1, 4)))

    def _through(self, branch: str, x: Tensor) -> Tensor:
        for index in self._layers[branch]:
            x = self._linear(f"{branch}.{index}", x).relu()
        return x

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return functional.linear(x, self._state[f"{name}.weight"], self._state.get(f"{name}.bias"))
