"""A data set that says which image it was where reading one fails."""

from typing import Any

from mmdet.registry import DATASETS

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.images import ImageError, image_problem

__all__ = ["CheckedDataset", "read_item"]


@DATASETS.register_module()
class CheckedDataset:
    """An mmdet data set whose errors name the image.

    Args:
        dataset: Config of the mmdet data set.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        self.dataset = DATASETS.build(dataset)
        self.dataset.full_init()

    @property
    def metainfo(self) -> dict[str, Any]:
        return dict(self.dataset.metainfo)

    def __len__(self) -> int:
        return len(self.dataset)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Annotation record of an item, without reading its image."""
        return dict(self.dataset.get_data_info(index))

    def __getitem__(self, index: int) -> Any:
        """The image as the pipeline makes it.

        Raises:
            KdpipeError: as `read_item` does.
        """
        return read_item(self.dataset, index)


def read_item(dataset: Any, index: int) -> Any:
    """An item of an mmdet data set.

    Raises:
        KdpipeError: An image cannot be read, has another size than is annotated, or fails in the pipeline: which one.
    """
    try:
        item = dataset[index]
    except KdpipeError:
        raise
    except Exception as error:  # of mmdet's pipeline, which does not always say which image it was
        info = dataset.get_data_info(index)
        path, width, height = info["img_path"], info["width"], info["height"]
        if problem := image_problem(path, width, height):
            raise ImageError(problem) from error
        raise ImageError(
            f"image {path} ({width} x {height} pixels) can be read, and fails in the pipeline of the config "
            f"({type(error).__name__}: {error}). Correct the pipeline, or take the image out of the annotations; "
            "kdpipe --debug shows where it happened."
        ) from error
    shape = getattr(item.get("data_samples"), "ori_shape", None) if isinstance(item, dict) else None
    if shape is not None:
        info = dataset.get_data_info(index)
        if tuple(shape) != (info["height"], info["width"]) and (
            problem := image_problem(info["img_path"], info["width"], info["height"])
        ):
            raise ImageError(problem)  # its header said otherwise
    return item
