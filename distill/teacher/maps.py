"""The teacher's feature maps of an image, and how they look in the student's view."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.errors import present
from kdpipe.cache.quantize import dequantize
from kdpipe.cache.spec import CacheSpec
from kdpipe.distill.losses.numeric import no_autocast
from kdpipe.distill.outputs import TeacherMap


@dataclass(frozen=True)
class StoredMaps:
    """Some levels of the teacher's pyramid of one image.

    Attributes:
        matrix: `[3, 3]` float64, pixels of the student's network input -> pixels of the teacher's.
        levels: Per stride of the teacher Tensor[C, h_l, w_l] in storage type, or None for levels that are not needed.
        scale: Tensor[L, C] float32 of int8 levels, or None.
        size: (height, width) of the teacher's network input without padding, pixels.
    """

    matrix: npt.NDArray[np.float64]
    levels: tuple[Tensor | None, ...]
    scale: Tensor | None
    size: tuple[int, int]


class WarpedMaps(Mapping[int, TeacherMap]):
    """The teacher's maps of a batch in the student's view, by stride; each level is made when it is asked for.

    Args:
        images: Of each image; None of one that is left out.
        spec: What the teacher is.
        student_maps: By stride Tensor[B, C of the student, h, w].
        student_sizes: (height, width) of the student's network input without padding, pixels, of each image.
    """

    def __init__(
        self,
        images: Sequence[StoredMaps | None],
        spec: CacheSpec,
        student_maps: Mapping[int, Tensor],
        student_sizes: Sequence[tuple[int, int]],
    ) -> None:
        self._images, self._spec, self._student_maps, self._sizes = images, spec, student_maps, student_sizes
        self._made: dict[int, TeacherMap] = {}

    def __getitem__(self, stride: int) -> TeacherMap:
        if stride not in self._made:
            self._made[stride] = self._warped(stride)
        return self._made[stride]

    def __iter__(self) -> Iterator[int]:
        return iter([stride for stride in self._spec.strides if stride in self._student_maps])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @torch.no_grad()
    def _warped(self, stride: int) -> TeacherMap:
        level, student = self._spec.strides.index(stride), self._student_maps[stride]
        height, width = student.shape[-2:]
        values, inside = [], []
        with no_autocast(student):
            for image, student_size in zip(self._images, self._sizes, strict=True):
                if image is None:
                    values.append(student.new_zeros(self._spec.channels, height, width, dtype=torch.float32))
                    inside.append(student.new_zeros(height, width, dtype=torch.float32))
                else:
                    stored = present(image.levels[level], f"the feature map of stride {stride}")
                    features = dequantize(stored, None if image.scale is None else image.scale[level])
                    sizes = image.size, student_size
                    warped, is_inside = warp_map(features, stride, image.matrix, *sizes, (height, width))
                    values.append(warped)
                    inside.append(is_inside.float())
            return TeacherMap(torch.stack(values), torch.stack(inside))


def warp_map(
    features: Tensor,
    stride: int,
    matrix: npt.NDArray[np.float64],
    size: tuple[int, int],
    other_size: tuple[int, int],
    shape: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """A level of a pyramid as it looks in another view of the image: scaled, cropped, mirrored.

    Bilinear between the centres of cells, cell (i, j) having its own at ((j + 0.5) * stride, (i + 0.5) * stride) pixels
    of its view, as RoIAlign takes it. In the same view, that is the level itself.

    Args:
        features: Tensor[C, h, w] floating point.
        stride: Pixels per cell, in either view.
        matrix: `[3, 3]`, pixels of the other view -> pixels of the view that the features are of.
        size: (height, width) of the view that the features are of without padding, pixels.
        other_size: The same of the other view.
        shape: (height, width) of the result, cells.

    Returns:
        Tensor[C, *shape], and Tensor[*shape] bool, which cells have their centre in both views.
    """
    axes, inside = [], []
    for axis in (0, 1):  # x, y
        cells, limit, other_limit = shape[1 - axis], size[1 - axis], other_size[1 - axis]
        seen = (torch.arange(cells, device=features.device, dtype=torch.float64) + 0.5) * stride
        centres = seen * float(matrix[axis, axis]) + float(matrix[axis, 2])  # pixels of the features' view
        inside.append((centres > 0) & (centres < limit) & (seen < other_limit))
        axes.append((2 * centres / (stride * features.shape[2 - axis]) - 1).to(features.dtype))
    grid = torch.stack([axes[0].expand(shape), axes[1][:, None].expand(shape)], dim=-1)  # [h, w, 2]
    warped = functional.grid_sample(features[None], grid[None], padding_mode="border", align_corners=False)
    return warped[0], inside[1][:, None] & inside[0]
