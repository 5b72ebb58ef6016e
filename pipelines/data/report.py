"""What a command says of its data before it begins: nothing is left out without a line."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from kdpipe.pipelines.data.coco_entries import DataError
from kdpipe.pipelines.data.datasets import DetectionData
from kdpipe.pipelines.runtime.console import plain

__all__ = ["report_data"]


def report_data(
    data: DetectionData,
    console: Console,
    *,
    trained: bool,
    strict: bool,
    filter_cfg: Mapping[str, Any] | None = None,
) -> None:
    """Prints a line per kind of annotations and images that are left out, and how classes were matched.

    Args:
        data: the data set.
        console: where it is shown.
        trained: training is what it is for; otherwise AP, which counts all boxes as pycocotools does.
        strict: refuse what would be left out.
        filter_cfg: which images are not trained on, as mmdet has it; None: those without a usable annotation.

    Raises:
        DataError: `strict`, and something is left out.
    """
    for note in data.notes:
        console.print(plain(f"{data.ann_file}: {note}."), markup=False)
    if data.is_federated and not trained:
        console.print(
            plain(
                f"{data.ann_file}: this looks like LVIS (it has neg_category_ids). What is measured is COCO AP, "
                "which takes every image as annotated in full; LVIS AP is another measure."
            ),
            markup=False,
        )
    left_out = [*(f"left out: {kind}" for kind in data.absent)]
    if trained:
        left_out += [f"not trained on: {kind}" for kind in data.left_out(**(filter_cfg or {}))]
    if left_out and strict:
        raise DataError(
            f"{data.ann_file}, with --strict-data:\n  "
            + "\n  ".join(left_out)
            + "\nCorrect or remove these, or leave --strict-data away to go on without them."
        )
    for line in left_out:
        console.print(plain(f"{data.ann_file}: {line}."), markup=False)
