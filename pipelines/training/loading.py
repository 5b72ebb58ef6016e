"""mmdet's LoadImageFromFile, which reads JPEGs that lack their last bytes, too."""

from typing import Any

import mmcv
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmdet.registry import TRANSFORMS
from mmengine import fileio

from kdpipe.pipelines.data.images import ImageError
from kdpipe.pipelines.data.truncation import completed
from kdpipe.pipelines.detectors.mmdet2 import dictionaries
from kdpipe.pipelines.training.transform_types import transform_class

__all__ = ["LoadCompletedImage", "complete_images"]


@TRANSFORMS.register_module()
class LoadCompletedImage(LoadImageFromFile):  # type: ignore[misc]
    """As mmdet's, with the same options; the pixels are those of `load_picture`."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Adds `img`, `img_shape` and `ori_shape`.

        Raises:
            ImageError: It cannot be decoded.
        """
        path = results["img_path"]
        data = completed(fileio.get(path, backend_args=self.backend_args))
        pixels = mmcv.imfrombytes(data, flag=self.color_type, backend=self.imdecode_backend)
        if pixels is None:
            raise ImageError(f"image {path} ({len(data):,} bytes) cannot be decoded. Replace it.")
        results["img"] = pixels.astype(np.float32) if self.to_float32 else pixels
        results["img_shape"] = results["ori_shape"] = pixels.shape[:2]
        return results


def complete_images(part: Any) -> None:
    """Lets all pipelines in a part of a config read images so, in place.

    Steps stay that read from elsewhere than files, or leave out what they cannot read.
    """
    for step in dictionaries(part):
        if "type" not in step or step.get("file_client_args") or step.get("ignore_empty"):
            continue
        if transform_class(step) is LoadImageFromFile:
            step["type"] = f"mmdet.{LoadCompletedImage.__name__}"
            step.pop("_scope_", None)
