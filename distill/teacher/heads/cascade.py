"""The frozen box heads of a cascade: every stage looks where the one before it moved the box."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.records import decode_deltas, encode_boxes
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.outputs import HeadOutputs
from kdpipe.distill.teacher.heads.fc import TeacherHead
from kdpipe.distill.teacher.heads.semantic import SEMANTIC_BRANCH, SemanticBranch


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

    @torch.no_grad()
    def __call__(self, features: Tensor, boxes: Tensor, sizes: Tensor, look: Callable[[Tensor], Tensor]) -> HeadOutputs:
        """What the teacher says of boxes, in float32, autocast or not.

        Args:
            features: Tensor[R, C, size, size], the teacher's RoI features of the boxes, semantic ones added.
            boxes: Tensor[R, 4] (x1, y1, x2, y2), pixels of the teacher's network input.
            sizes: Tensor[R, 2] (width, height) of that input without padding.
            look: The same of other boxes of the same images, row by row.
        """
        spec = self._spec
        logits, moved, outputs = [], boxes[:, None], None
        with no_autocast(features):
            for head, stds in zip(self.stages, spec.cascade_stds, strict=True):
                if outputs is not None:
                    best = outputs.logits[:, :-1].argmax(dim=1) if moved.shape[1] > 1 else 0
                    at = moved[torch.arange(len(boxes), device=boxes.device), best]  # [R, 4]
                    at = at.clamp(min=0).minimum(sizes.repeat(1, 2))
                    features = look(at)
                else:
                    at = boxes
                outputs = head(features)
                logits.append(outputs.logits)
                moved = decode_deltas(at, outputs.deltas, spec.box_means, stds)  # [R, K or 1, 4]
            deltas = encode_boxes(boxes, moved, spec.box_means, spec.box_stds)
        return HeadOutputs(
            present(outputs, "the stages of the cascade").embeddings, torch.stack(logits).mean(dim=0), deltas
        )
