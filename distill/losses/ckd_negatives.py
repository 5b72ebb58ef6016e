"""Which of the teacher's representations are no negatives of a box: those of the same object."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kdpipe.distill.losses.ckd_queue import TeacherKeys
from kdpipe.distill.losses.numeric import LossInputError, check_shape, full_precision
from kdpipe.distill.rows import on_cpu


def same_object(boxes: Tensor, image_ids: Tensor, others: Tensor, other_ids: Tensor, iou: float = 0.5) -> Tensor:
    """Pairs of boxes that show the same thing: same image and IoU > `iou`. They are no negatives of each other.

    Args:
        boxes: Tensor[N, 4] (x1, y1, x2, y2), all boxes of an image in one frame.
        image_ids: Tensor[N] int64, the image that a box is of.
        others: Tensor[M, 4] in the same frames.
        other_ids: Tensor[M] int64.
        iou: threshold in [0, 1]; 0.5 is the best one of the paper's table 10.

    Returns:
        Tensor[N, M] bool.

    Raises:
        LossInputError: shapes that do not fit, or a threshold outside [0, 1].
    """
    check_shape("boxes", boxes, (image_ids.numel(), 4), f"image_ids {list(image_ids.shape)}")
    check_shape("others", others, (other_ids.numel(), 4), f"other_ids {list(other_ids.shape)}")
    if not 0 <= iou <= 1:
        raise LossInputError(f"Boxes are compared by an IoU from 0 to 1, found {iou}.")
    boxes, others = full_precision(boxes, others)
    if not on_cpu(boxes):  # all with all: a loop over images would wait for the device in each of them
        same = image_ids[:, None] == other_ids
        return same.logical_and_(box_iou(boxes, others) > iou)
    same = torch.zeros(len(boxes), len(others), dtype=torch.bool)
    for image in image_ids.unique().tolist():
        rows, columns = ((ids == image).nonzero().squeeze(1) for ids in (image_ids, other_ids))
        same[rows[:, None], columns] = box_iou(boxes[rows], others[columns]) > iou
    return same


@dataclass(frozen=True)
class NoNegatives:
    """Which keys are no negatives of which boxes: a Tensor[N, M] bool, whose rows are computed when they are asked for.

    Attributes:
        own: of N boxes.
        keys: M of all boxes.
        iou: keys of the same object are no negatives, see `same_object`.
    """

    own: TeacherKeys
    keys: TeacherKeys
    iou: float

    def __getitem__(self, rows: slice) -> Tensor:
        """Some rows, Tensor[n, M] bool."""
        own, (columns, near) = self.own[rows], self._near
        same = torch.zeros(len(own.boxes), len(self.keys.boxes), dtype=torch.bool, device=own.boxes.device)
        same[:, columns] = same_object(own.boxes, own.image_ids, near.boxes, near.image_ids, self.iou)
        return same

    @cached_property
    def _near(self) -> tuple[Tensor, TeacherKeys]:
        """The keys of the images that boxes are of: which they are, Tensor[m] int64, and they."""
        images = self.own.image_ids.sort().values
        place = torch.searchsorted(images, self.keys.image_ids).clamp(max=len(images) - 1)
        columns = (images[place] == self.keys.image_ids).nonzero().squeeze(1)
        return columns, self.keys[columns]
