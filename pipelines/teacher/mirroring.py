"""How far a mirrored target is from the true one: the price of caching one view only, on a few images."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.views import mirror_deltas, mirror_features
from kdpipe.pipelines.data.datasets import DetectionData, ImageError
from kdpipe.pipelines.data.images import load_picture
from kdpipe.pipelines.teacher.teacher import Teacher

__all__ = ["MirrorError", "mirror_errors", "mirror_table"]

_FIELDS = {"features": "roi_features", "embeddings": "embeddings", "logits": "logits", "deltas": "deltas"}
_MIRRORED = {"features": mirror_features, "deltas": mirror_deltas}


@dataclass
class MirrorError:
    """How far what the teacher says of boxes, mirrored, is from what it says of the mirrored boxes.

    Attributes:
        boxes: How many were compared.
        cosines: Sum over boxes of the cosine between the two.
        squares: Sum of the squares of their difference.
        magnitude: Sum of the squares of the true one.
    """

    boxes: int = 0
    cosines: float = 0.0
    squares: float = 0.0
    magnitude: float = 0.0

    def add(self, mirrored: Tensor, true: Tensor) -> None:
        """Take in the boxes of an image; both are Tensor[R, ...]."""
        mirrored, true = mirrored.flatten(1).double(), true.flatten(1).double()
        self.boxes += len(true)
        self.cosines += float(functional.cosine_similarity(mirrored, true, dim=1).sum())
        self.squares += float((mirrored - true).square().sum())
        self.magnitude += float(true.square().sum())

    @property
    def cosine(self) -> float:
        """Mean over boxes."""
        return self.cosines / max(1, self.boxes)

    @property
    def relative(self) -> float:
        """Norm of the difference, relative to that of the true one."""
        return float((self.squares / self.magnitude) ** 0.5) if self.magnitude else 0.0


@torch.inference_mode()
def mirror_errors(teacher: Teacher, data: DetectionData, spec: CacheSpec, sample: int) -> dict[str, MirrorError]:
    """Ask the teacher about some images, evenly chosen, in the cached view and in the other one, at the same boxes.

    Args:
        teacher: The teacher.
        data: The images.
        spec: Of the cache, which has one view.
        sample: How many images; those that cannot be read are left out.

    Returns:
        Field -> errors, for the fields that a student is told of.
    """
    cached = spec.views[0]
    other = next(view for view in VIEWS if view != cached)
    fields = {name: field for name, field in _FIELDS.items() if name in spec.fields or field in spec.fields}
    errors = {name: MirrorError() for name in fields}
    asked = replace(spec, jittered=0)
    places = np.unique(np.linspace(0, len(data.images) - 1, min(sample, len(data.images))).round().astype(int))
    for info in (data.images[place] for place in places):
        try:
            size = (info.height, info.width)
            image = load_picture(data.img_dir / info.file_name, size, spec.scale, teacher.pixels.decoding).pixels
        except ImageError:
            continue  # said before, where it was skipped
        truth, about = data.gt_boxes(info.image_id), {"image_id": info.image_id, "file_name": info.file_name}
        said = teacher.record(image, truth, spec=asked, view=cached, **about)
        true = teacher.record(image, said.boxes.cpu().numpy(), spec=asked, view=other, **about)
        for name, field in fields.items():
            mirrored = getattr(said, field)
            if name in _MIRRORED:
                mirrored = _MIRRORED[name](mirrored)
            errors[name].add(mirrored, getattr(true, field)[true.num_proposals :])
    return errors


def mirror_table(errors: Mapping[str, MirrorError], sample: int) -> Table:
    """The errors of each field."""
    table = Table("mirrored target", "cosine", "relative error", title=f"against the true one, {sample} images")
    for name, error in errors.items():
        table.add_row(name, f"{error.cosine:.2f}", f"{100 * error.relative:.0f} %")
    return table
