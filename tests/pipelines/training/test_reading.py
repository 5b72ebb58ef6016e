"""A student sees pictures as its teacher did: files are decoded, and beside a live teacher resized, alike."""

import pytest
from mmdet.utils import register_all_modules

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.teacher.pixel_pipeline import PixelPipeline
from kdpipe.pipelines.training.reading import check_read_alike, check_seen_alike

READ = {"type": "LoadImageFromFile"}
RESIZE = {"type": "Resize", "scale": (96, 80), "keep_ratio": True}
PACK = {"type": "PackDetInputs"}
NORMALIZE = {"type": "Normalize", "mean": [103.0, 116.0, 123.0], "std": [57.0, 57.0, 57.0]}


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_all_modules(init_default_scope=True)


@pytest.mark.parametrize("loading", [{"color_type": "color_ignore_orientation"}, {"imdecode_backend": "pillow"}])
def test_a_student_reads_pictures_as_its_teacher_did(loading: dict[str, str]) -> None:
    usual = [{"type": "mmengine.LoadImageFromFile", "to_float32": True}, RESIZE, PACK]
    other = [{**READ, **loading}, RESIZE, PACK]
    teacher_pixels = PixelPipeline(other).identity()["pixels"]
    check_read_alike(usual, {})
    check_read_alike(other, teacher_pixels)
    for pipeline, pixels in (
        (other, {}),
        (usual, teacher_pixels),
        ([[{"type": "RandomApply", "transforms": other}]], {}),
    ):
        with pytest.raises(KdpipeError, match=next(iter(loading.values()))):
            check_read_alike(pipeline, pixels)
    for kind in ("LoadImageFromNDArray", "mmdet.LoadMultiChannelImageFromFiles"):
        with pytest.raises(KdpipeError, match=kind):
            check_read_alike([{"type": kind}, RESIZE, PACK], {})


def test_a_live_teacher_is_not_shown_what_it_cannot_see() -> None:
    nearest = {**RESIZE, "interpolation": "nearest"}
    check_seen_alike([READ, nearest, PACK], PixelPipeline([READ, nearest, PACK]).identity()["pixels"])
    for steps in ([READ, nearest, PACK], [READ, {"type": "RandomChoice", "transforms": [[nearest]]}, PACK]):
        with pytest.raises(KdpipeError, match="nearest"):
            check_seen_alike(steps, {})
    with pytest.raises(KdpipeError, match="Normalize"):
        check_seen_alike([READ, RESIZE, NORMALIZE, PACK], {})
