"""Boxes of a batch in the frames of the original images: the same whatever view a student is shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdpipe.cache.errors import KdpipeError


class FrameError(KdpipeError):
    """A sample does not say which image it is of, or where its pixels come from."""


@dataclass(frozen=True)
class ImageFrames:
    """Which image each of B network inputs is of, and the way back to its original pixels.

    Attributes:
        image_ids: Tensor[B] int64.
        to_original: Tensor[B, 2, 3] float32: network input (x, y, 1) -> original (x, y), pixels.
    """

    image_ids: Tensor
    to_original: Tensor

    @classmethod
    def of(cls, samples: Sequence[Any], device: torch.device) -> "ImageFrames":
        """Those of mmdet's samples.

        Args:
            samples: B `DetDataSample` whose meta keys have `img_id`, and `homography_matrix` where pixels were moved.
            device: Where boxes will be.

        Raises:
            FrameError: A sample lacks these.
        """
        ids = [_image_id(sample) for sample in samples]
        back = np.stack([np.linalg.inv(_matrix(sample))[:2] for sample in samples])  # [B, 2, 3] float64
        tensors = torch.tensor(ids), torch.from_numpy(back).float()
        return cls(*(tensor.to(device, non_blocking=True) for tensor in tensors))

    def original_boxes(self, rois: Tensor) -> Tensor:
        """Boxes in the frames of their original images; upright ones around them where a view was rotated.

        Args:
            rois: Tensor[R, 5] (index in the batch, x1, y1, x2, y2), pixels of the network input.

        Returns:
            Tensor[R, 4] float32 (x1, y1, x2, y2).
        """
        matrices = self.to_original[rois[:, 0].long()]  # [R, 2, 3]
        _, x1, y1, x2, y2 = rois.float().unbind(dim=1)  # no list as an index: copying it waits for a GPU
        corners = torch.stack([x1, y1, x2, y1, x1, y2, x2, y2], dim=1).unflatten(1, (4, 2))  # [R, 4, 2] (x, y)
        # no matrix product: autocast would round its pixels to half precision
        moved = (corners[:, :, None] * matrices[:, None, :, :2]).sum(dim=3) + matrices[:, None, :, 2]  # [R, 4, 2]
        return torch.cat([moved.amin(dim=1), moved.amax(dim=1)], dim=1)


def _image_id(sample: Any) -> int:
    image_id = sample.metainfo.get("img_id")
    if isinstance(image_id, bool) or not isinstance(image_id, int | np.integer):
        raise FrameError(
            f"A sample's img_id is {image_id!r}; expected a whole number, by which boxes of one image are told from "
            "those of others. Name img_id in meta_keys of the pipeline's PackDetInputs, for a data set with such ids."
        )
    return int(image_id)


def _matrix(sample: Any) -> Any:
    """[3, 3] float64, original pixels -> network input."""
    info = sample.metainfo
    matrix = info.get("homography_matrix")
    if matrix is not None:
        return np.asarray(matrix, dtype=np.float64)
    if info.get("flip") or tuple(info.get("ori_shape", ())[:2]) != tuple(info.get("img_shape", ())[:2]):
        raise FrameError(
            f"The sample of image {info.get('img_id')} was moved, and lacks homography_matrix, which says where from. "
            "Name homography_matrix in meta_keys of the pipeline's PackDetInputs."
        )
    return np.eye(3)  # no step of the pipeline moved its pixels
