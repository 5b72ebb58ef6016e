"""A teacher sees the pixels that its test pipeline makes, wherever it looks at an image; what cannot be is refused."""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import mmdet.datasets.transforms as mmdet_transforms
import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import TwoStageDetector
from mmdet.registry import TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.data.images import read_image
from kdpipe.pipelines.teacher.pixel_pipeline import PixelPipeline, teacher_pixels
from kdpipe.pipelines.training.reading import check_seen_alike
from kdpipe.pipelines.training.transforms import set_scale

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

SCALE = (96, 80)
READ = {"type": "LoadImageFromFile"}
RESIZE = {"type": "Resize", "scale": SCALE, "keep_ratio": True}
PACK = {"type": "PackDetInputs", "meta_keys": ("img_id",)}
GRAY = {"type": "RandomGrayscale", "prob": 1.0, "keep_channels": True, "channel_weights": (0.1, 0.6, 0.3)}
NORMALIZE = {"type": "Normalize", "mean": [103.0, 116.0, 123.0], "std": [57.0, 57.0, 57.0], "to_rgb": True}

# test pipelines, and whether a teacher that has one can also run beside a student
APPLIED: list[tuple[list[Any], bool]] = [
    ([READ, RESIZE, {"type": "LoadAnnotations", "with_bbox": True}, PACK], True),
    ([READ, {**RESIZE, "type": "mmdet.Resize"}, {"type": "RandomFlip", "prob": 0.0}, PACK], True),
    ([READ, {**RESIZE, "type": mmdet_transforms.Resize, "interpolation": "nearest"}, PACK], True),
    ([READ, {**RESIZE, "interpolation": "area"}, PACK], True),
    ([READ, {**RESIZE, "backend": "pillow"}, PACK], True),
    ([{**READ, "imdecode_backend": "pillow"}, RESIZE, PACK], True),
    ([{**READ, "color_type": "color_ignore_orientation"}, RESIZE, PACK], True),
    ([{**READ, "to_float32": True, "backend_args": {"backend": "local"}}, RESIZE, PACK], True),
    ([READ, RESIZE, {"type": "mmdet.Color", "level": 0, "min_mag": 0.0}, PACK], True),
    ([READ, RESIZE, {"type": "Brightness", "prob": 1.0, "min_mag": 0.5, "max_mag": 0.5}, PACK], True),
    ([READ, RESIZE, {"type": "Sharpness", "level": 9}, {"type": "Solarize", "level": 5}, PACK], True),
    ([READ, RESIZE, {"type": "Equalize"}, {"type": "Invert"}, {"type": "AutoContrast"}, PACK], True),
    ([READ, RESIZE, GRAY, {"type": "Posterize", "level": 3}, {"type": "Contrast", "level": 8}, PACK], True),
    ([READ, GRAY, RESIZE, PACK], False),
    ([READ, RESIZE, NORMALIZE, PACK], True),
    ([READ, NORMALIZE, RESIZE, PACK], False),
    ([READ, RESIZE, {"type": "Pad", "size_divisor": 64, "pad_val": {"img": (114, 114, 114)}}, PACK], True),
    ([READ, RESIZE, NORMALIZE, {"type": "mmengine.Pad", "pad_to_square": True}, PACK], True),
    ([READ, RESIZE, {"type": "Pad", "size": (128, 96), "padding_mode": "reflect"}, PACK], False),
]
REFUSED: list[tuple[list[Any], str]] = [
    ([{"type": "LoadImageFromNDArray"}, RESIZE, PACK], "LoadImageFromNDArray"),
    ([{"type": "LoadMultiChannelImageFromFiles"}, RESIZE, PACK], "LoadMultiChannelImageFromFiles"),
    ([{**READ, "color_type": "grayscale"}, RESIZE, PACK], "color_type='grayscale'"),
    ([{**READ, "color_type": "unchanged"}, RESIZE, PACK], "color_type='unchanged'"),
    ([{**READ, "imdecode_backend": "turbojpeg"}, RESIZE, PACK], "turbojpeg"),
    ([{**READ, "backend_args": {"backend": "petrel"}}, RESIZE, PACK], "petrel"),
    ([{**READ, "file_client_args": "petrel"}, RESIZE, PACK], "petrel"),
    ([READ, RESIZE, np.ascontiguousarray, PACK], "ascontiguousarray"),
    ([read_image, RESIZE, PACK], "read_image"),
    ([READ, {"type": "TestTimeAug", "transforms": [[RESIZE], [PACK]]}], "TestTimeAug"),
    ([READ, RESIZE, RESIZE, PACK], "2 resizing transforms"),
    ([READ, PACK], "0 resizing transforms"),
    *(
        ([READ, RESIZE, step, PACK], named)
        for step, named in (
            ({"type": "Color"}, "Color()"),  # of random strength
            ({"type": "Color", "level": 3, "prob": 0.5}, "prob=0.5"),
            ({"type": "Equalize", "prob": 0.5}, "Equalize(prob=0.5)"),
            ({**GRAY, "prob": 0.1}, "RandomGrayscale"),
            ({**GRAY, "keep_channels": False}, "keep_channels=False"),
            ({"type": "RandomFlip", "prob": 1.0}, "RandomFlip(prob=1.0)"),
            ({"type": "RandomFlip", "prob": 0.5, "direction": "vertical"}, "vertical"),
            ({"type": "mmdet.Expand", "prob": 1.0}, "Expand(prob=1.0)"),
            ({"type": "CenterCrop", "crop_size": 32}, "CenterCrop(crop_size=32)"),
            ({"type": "PhotoMetricDistortion"}, "PhotoMetricDistortion()"),
            ({"type": "MyGray"}, "MyGray()"),
            ({"type": "RandomApply", "transforms": [GRAY], "prob": 1.0}, "RandomApply"),
        )
    ),
    ([READ, {"type": "Pad", "size_divisor": 32}, RESIZE, PACK], "Pad(size_divisor=32)"),
]


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    register_all_modules(init_default_scope=True)


@pytest.fixture(scope="module", params=[(100, 130), (120, 61)], ids=["wide", "tall"])
def picture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smooth photograph: JPEG, so that libraries decode it differently."""
    height, width = request.param
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("picture") / "p.jpg"
    cv2.imwrite(str(path), cv2.resize(noise, (width, height)))
    return path


def mmdets(steps: list[Any], path: Path) -> Tensor:
    """The image that mmdet's own pipeline hands to a preprocessor."""
    results = Compose([TRANSFORMS.build(step) for step in steps if "Annotations" not in str(step["type"])])(
        {"img_path": str(path), "img_id": 1}
    )
    image: Tensor = results["inputs"]
    return image


def tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


@pytest.mark.parametrize(("steps", "live"), APPLIED)
def test_the_teacher_is_shown_what_mmdet_shows_it(steps: list[Any], live: bool, picture: Path) -> None:
    """Bit for bit: from a file as for a cache, and from a student's resized image as beside a student."""
    pipeline, expected = PixelPipeline(steps), mmdets(steps, picture)
    assert pipeline.own_scale() == SCALE
    pipeline.check_scale(SCALE)
    image = read_image(picture, decoding=pipeline.decoding)
    pixels, (height, width) = pipeline.view(image, SCALE, flip=False)
    actual = tensor(pixels)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    assert max(height, width) <= max(SCALE)
    assert height <= pixels.shape[0]

    # what a preprocessor makes of it is what it makes of mmdet's
    preprocessor = DetDataPreprocessor(mean=[1.0, 2, 3], std=[4.0, 5, 6], bgr_to_rgb=True, pad_size_divisor=32)
    inputs = [preprocessor({"inputs": [x], "data_samples": None})["inputs"] for x in (actual, expected)]
    assert torch.equal(*inputs)

    if not live:
        with pytest.raises(KdpipeError, match="beside a student"):
            pipeline.check_live()
        return
    pipeline.check_live()
    resize = next(step for step in steps if "keep_ratio" in step)
    student = [steps[0], resize, {"type": "PackDetInputs", "meta_keys": ("img_id",)}]
    check_seen_alike(student, pipeline.identity().get("pixels", {}))
    assert torch.equal(pipeline.of_resized(mmdets(student, picture)), expected)


@pytest.mark.parametrize(("steps", "live"), APPLIED)
def test_the_mirrored_view_is_the_pipeline_of_the_mirrored_image(steps: list[Any], live: bool, picture: Path) -> None:
    """Mirrored behind its resizing, as a student's pipeline does it: padding stays on the right."""
    pipeline = PixelPipeline(steps)
    place = next(i for i, step in enumerate(steps) if "keep_ratio" in step)
    expected = mmdets([*steps[: place + 1], {"type": "RandomFlip", "prob": 1.0}, *steps[place + 1 :]], picture)
    expected = (
        expected if {"type": "RandomFlip", "prob": 0.0} not in steps else mmdets([READ, RESIZE, PACK], picture).flip(-1)
    )
    pixels, _ = pipeline.view(read_image(picture, decoding=pipeline.decoding), SCALE, flip=True)
    assert torch.equal(tensor(pixels), expected)


@pytest.mark.parametrize(("steps", "name_in_message"), REFUSED)
def test_other_steps_are_refused_by_name(steps: list[Any], name_in_message: str) -> None:
    with pytest.raises(KdpipeError) as caught:
        PixelPipeline(steps)
    assert name_in_message in str(caught.value)


def test_what_is_not_usual_is_part_of_the_identity() -> None:
    usual = [READ, {**RESIZE, "interpolation": "bilinear", "clip_object_border": False}, PACK]
    assert PixelPipeline().identity() == PixelPipeline(usual).identity() == {}
    actual = [str(PixelPipeline(steps).identity()) for steps, _ in APPLIED]
    same = [APPLIED[0], APPLIED[1]]
    assert [text for (_, _), text in zip(same, actual, strict=False)] == ["{}", "{}"]
    assert len(set(actual)) == len(APPLIED) - 1


def test_scales_that_do_not_fit() -> None:
    pad = PixelPipeline([READ, RESIZE, {"type": "Pad", "size": (96, 96)}, PACK])
    pad.check_scale(SCALE)
    with pytest.raises(KdpipeError, match="pads images to 96x96"):
        pad.check_scale((128, 96))
    stretched = PixelPipeline([READ, {"type": "Resize", "scale": SCALE}, PACK])
    with pytest.raises(KdpipeError, match=r"without keeping the ratio\. Give --scale"):
        stretched.own_scale()
    for resize in (
        {"type": "FixScaleResize", "scale": SCALE, "keep_ratio": True},
        {"type": "Resize", "scale_factor": 0.5},
    ):
        with pytest.raises(KdpipeError, match="Give --scale"):
            PixelPipeline([READ, resize, PACK]).own_scale()


@pytest.mark.parametrize(
    "resize",
    [
        {**RESIZE, "interpolation": "nearest"},
        {"type": "Resize", "scale": (50, 50), "interpolation": "area"},
        {"type": "mmdet.FixScaleResize", "scale": (50, 50), "backend": "pillow"},
        {"type": "ResizeShortestEdge", "scale": 70, "max_size": 90},
        {"type": "RandomChoiceResize", "scales": [(50, 50), (60, 60)], "keep_ratio": True},
    ],
)
def test_another_scale_is_the_same_for_evaluation_and_cache(resize: dict[str, Any], picture: Path) -> None:
    steps = [READ, resize, {"type": "Equalize"}, PACK]
    pixels, _ = PixelPipeline(steps).view(read_image(picture), (80, 64), flip=False)
    assert torch.equal(tensor(pixels), mmdets(set_scale(steps, (80, 64)), picture))


def old(*transforms: Any, **view: Any) -> Config:
    """A test pipeline of mmdet 2.x."""
    steps = [{"type": "Resize", "keep_ratio": True}, {"type": "RandomFlip"}, *transforms]
    steps += [{"type": "ImageToTensor", "keys": ["img"]}, {"type": "Collect", "keys": ["img"]}]
    flips = {"type": "MultiScaleFlipAug", "img_scale": SCALE, "flip": False, "transforms": steps, **view}
    return Config({"data": {"test": {"type": "CocoDataset", "pipeline": [READ, flips]}}})


def test_pipelines_of_mmdet_2() -> None:
    """The preprocessor has their Normalize and Pad; other steps are treated as those of today."""
    padded = (NORMALIZE, {"type": "Pad", "size_divisor": 32})
    pipeline = teacher_pixels(old(*padded))
    assert (pipeline.identity(), pipeline.own_scale()) == ({}, SCALE)
    assert teacher_pixels(old(*padded, img_scale=[SCALE])).own_scale() == SCALE
    assert "Equalize" in str(teacher_pixels(old({"type": "Equalize"}, *padded)).identity())
    for config, name_in_message in (
        (old(*padded, flip=True), "several views"),
        (old(*padded, img_scale=[SCALE, (64, 64)]), "several views"),
        (old({"type": "Pad", "size": (96, 96)}), "size_divisor"),
        (old({"type": "Pad", "size_divisor": 32, "pad_val": 114}), "114"),
        (old({"type": "MyGray"}, *padded), "MyGray"),
    ):
        with pytest.raises(KdpipeError, match=name_in_message):
            teacher_pixels(config)


def test_all_commands_show_the_teacher_the_same(kit: "Kit", work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """evaluate, cache-teacher, verify --ckpt, and a training beside the teacher; another pipeline is not resumed."""
    config = kit.config()
    steps = [READ, {**RESIZE, "scale": (128, 96)}, {"type": "mmdet.Color", "level": 0, "min_mag": 0.0}, PACK]
    steps[-1] = {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")}
    steps.insert(-1, {"type": "Pad", "size_divisor": 64, "pad_val": {"img": (9, 9, 9)}})
    config.test_dataloader.dataset.pipeline = steps
    usual = kit.config().test_dataloader.dataset.pipeline  # validation during training; evaluate tests
    config.val_dataloader.dataset.pipeline = usual
    ckpt = kit.save_detector(work / "gray.pth", config)
    student = kit.config(channels=8, fc=24)
    flip = next(step for step in student.train_dataloader.dataset.pipeline if step["type"] == "RandomFlip")
    flip["prob"] = 0.0
    (work / "student.py").write_text(student.pretty_text)

    input_shapes: dict[str, tuple[int, ...]] = {}  # digest of a network input -> its shape
    look = TwoStageDetector.extract_feat

    def record(self: Any, inputs: Tensor) -> Any:
        if self.neck.out_channels == 16:  # the teacher
            input_shapes.update({sha256(image.numpy().tobytes()).hexdigest(): tuple(image.shape) for image in inputs})
        return look(self, inputs)

    monkeypatch.setattr(TwoStageDetector, "extract_feat", record)

    def images(*command: object) -> dict[str, tuple[int, ...]]:
        input_shapes.clear()
        kit.run(*command)
        return dict(input_shapes)

    data = ("--ckpt", ckpt, *kit.data)
    expected = images("evaluate", *data, "--batch-size", 1)
    assert len(expected) == 8
    assert set(expected.values()) == {(3, 128, 128)}
    training = ("--student", "student.py", "--methods", "cls", "--epochs", 1, "--batch-size", 4, "--workers", 0)
    commands: list[tuple[object, ...]] = [
        ("cache-teacher", *data, "--proposals", 40, "--out", "x.zarr"),
        ("verify", "x.zarr", "--ckpt", ckpt, "--sample", 8),
        ("train-student", "--teacher-ckpt", ckpt, *kit.data, *training, "--work-dir", "w"),
    ]
    for command in commands:
        assert expected.keys() <= images(*command).keys(), command[0]

    plain = kit.save_detector(work / "plain.pth", kit.config())
    message = kit.refused("cache-teacher", "--ckpt", plain, *kit.data, "--proposals", 40, "--out", "x.zarr")
    assert "pixels" in message
    (work / "plain.py").write_text(kit.config().pretty_text)
    message = kit.refused("verify", "x.zarr", "--ckpt", ckpt, "--config", work / "plain.py")
    assert "test pipeline is not the one" in message
    other = student.copy()
    other.train_dataloader.dataset.pipeline[0].imdecode_backend = "pillow"
    (work / "other.py").write_text(other.pretty_text)
    message = kit.refused(
        *kit.student_command(work / "w2", "--student", "other.py", "--methods", "cls", cache=work / "x.zarr")
    )
    assert "imdecode_backend='pillow'" in message
