"""The frozen box heads of a cascade: every stage looks where the one before it moved the box."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kdpipe.cache.records import decode_deltas, encode_boxes
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.losses.prediction import recode_deltas
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.heads.semantic import SEMANTIC_BRANCH, SemanticBranch
from kdpipe.distill.teacher.pyramids import TeacherRois


class CascadeHead:
    """What a cascade teacher says of a box, as a function of that box (Cascade R-CNN at test time, as in mmdet).

    Logits are the mean over the stages. Deltas lead from the box itself to where the last stage moves it, in the units
    of the first stage. Embeddings are the input of the last stage's classifier.

    Args:
        state: Parameters by their names in the teacher's state dict.
        spec: What the teacher is.

    Attributes:
        semantic: What adds to the features of every stage, or None.

    Raises:
        TeacherHeadError: a stage, or the semantic branch, cannot be rebuilt from its parameters.
    """

    def __init__(self, state: Mapping[str, Tensor], spec: CacheSpec) -> None:
        self._spec = spec
        self.stages = [TeacherHead(state, spec, f"roi_head.bbox_head.{i}.") for i in range(len(spec.cascade_stds))]
        has_branch = any(name.startswith(SEMANTIC_BRANCH) for name in state)
        self.semantic = SemanticBranch(state, spec) if has_branch else None

    def __call__(self, rois: TeacherRois) -> HeadOutputs:
        """What the teacher says of boxes, in float32, autocast or not."""
        spec, logits, stage_boxes = self._spec, [], rois.boxes
        features_at = self.semantic.of_rois(rois) if self.semantic else rois.features_at
        with no_autocast(rois.boxes):
            for head, stds in zip(self.stages, spec.cascade_stds, strict=True):
                outputs = head.of_features(features_at(stage_boxes))
                logits.append(outputs.logits)
                moved = decode_deltas(stage_boxes, outputs.deltas, spec.box_means, stds)  # [R, K or 1, 4]
                best = (
                    outputs.logits[:, :-1].argmax(dim=1) if moved.shape[1] > 1 else torch.zeros_like(rois.image_index)
                )
                stage_boxes = moved[torch.arange(len(moved), device=moved.device), best].detach()  # [R, 4]
                stage_boxes = stage_boxes.clamp(min=0).minimum(rois.sizes.repeat(1, 2))
            deltas = encode_boxes(rois.boxes, moved, spec.box_means, spec.box_stds)
        return HeadOutputs(outputs.embeddings, torch.stack(logits).mean(dim=0), deltas)

    def stage(self, index: int) -> Callable[[TeacherRois], HeadOutputs]:
        """One stage for itself, which says what it says of boxes where they are; its deltas in units of the first."""
        spec = self._spec

        def of_stage(rois: TeacherRois) -> HeadOutputs:
            features = self.semantic.of_rois(rois)(rois.boxes) if self.semantic else rois.features
            outputs = self.stages[index].of_features(features)
            units = spec.box_means, spec.cascade_stds[index], spec.box_means, spec.box_stds
            return replace(outputs, deltas=recode_deltas(outputs.deltas, *units))

        return of_stage
