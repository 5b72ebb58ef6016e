"""The pixels that a teacher sees of an image: what the test pipeline of its config makes of them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mmcv
import mmcv.transforms as mmcv_transforms
import mmdet.datasets.transforms as mmdet_transforms
import numpy as np
import numpy.typing as npt
import torch
from mmengine.config import Config
from torch import Tensor

from kdpipe.cache.views import input_size
from kdpipe.pipelines.data.decoding import Decoding
from kdpipe.pipelines.detectors.building import building
from kdpipe.pipelines.detectors.mmdet2 import test_steps
from kdpipe.pipelines.teacher.family_checks import TeacherError
from kdpipe.pipelines.training.reading import RESIZE_DEFAULTS, decoding_of
from kdpipe.pipelines.training.transform_types import RESIZES, step_name, transform_class

__all__ = ["NetworkInput", "PixelPipeline", "teacher_pixels"]

_WHOSE = "The teacher's test pipeline"
_PADS = (mmdet_transforms.Pad, mmcv_transforms.Pad)
# Give the same values each time that they are applied, with these options.
_WITHOUT_STRENGTH = (mmdet_transforms.AutoContrast, mmdet_transforms.Equalize, mmdet_transforms.Invert)
_WITH_STRENGTH = (
    mmdet_transforms.Brightness,
    mmdet_transforms.Color,
    mmdet_transforms.Contrast,
    mmdet_transforms.Posterize,
    mmdet_transforms.Sharpness,
    mmdet_transforms.Solarize,
    mmdet_transforms.SolarizeAdd,
)
_VALUES = (*_WITHOUT_STRENGTH, *_WITH_STRENGTH, mmcv_transforms.RandomGrayscale, mmcv_transforms.Normalize)
_NO_PIXELS = (mmdet_transforms.LoadAnnotations, mmdet_transforms.PackDetInputs)
Image = npt.NDArray[Any]  # [h, w, 3], BGR unless a step says otherwise


@dataclass(frozen=True)
class NetworkInput:
    """What a detector's preprocessor is given of an image, on the host.

    Attributes:
        pixels: Tensor[h, w, 3], BGR; page-locked where it goes to a GPU.
        size: `(h, w)` of the resized image in its upper left corner; the rest is padding.
        original: `(h, w)` of the image before.
        flip: Whether it is mirrored.
    """

    pixels: Tensor
    size: tuple[int, int]
    original: tuple[int, int]
    flip: bool

    @property
    def metainfo(self) -> dict[str, Any]:
        """What mmdet's heads want to know of it."""
        return {"img_shape": self.size, "ori_shape": self.original, "flip": self.flip}

    def on(self, device: torch.device) -> Tensor:
        """The pixels on a device, Tensor[3, h, w]; a GPU copies them while the host goes on."""
        return self.pixels.to(device, non_blocking=True).permute(2, 0, 1).contiguous()


class PixelPipeline:
    """The steps of a test pipeline from a decoded image to what a detector's preprocessor is given.

    Args:
        steps: Configs of transforms, from LoadImageFromFile to PackDetInputs; none stand for mmdet's defaults.

    Raises:
        TeacherError: A step cannot be applied in the same way to each image; it is named.
        ConfigError: The options of a step are wrong.
    """

    def __init__(self, steps: Sequence[Any] = ()) -> None:
        steps = list(steps) or [{"type": "LoadImageFromFile"}, {"type": "Resize", "keep_ratio": True}]
        self.decoding = decoding_of(steps[0], _WHOSE)
        self._to_float32 = bool(steps[0].get("to_float32", False))
        positions = [i for i, step in enumerate(steps) if transform_class(step) in RESIZES]
        if len(positions) != 1:
            raise TeacherError(
                f"{_WHOSE} has {len(positions)} resizing transforms ({', '.join(map(step_name, steps))}). Expected one "
                "Resize."
            )
        self._resize: Mapping[str, Any] = steps[positions[0]]
        self._resizing = {name: self._resize.get(name, default) for name, default in RESIZE_DEFAULTS.items()}
        self._before = _with_pixels(steps[1 : positions[0]], _VALUES)
        self._after = _with_pixels(steps[positions[0] + 1 :], (*_VALUES, *_PADS))
        self._run_before, self._run_after = _build(self._before), _build(self._after)

    def own_scale(self) -> tuple[int, int]:
        """`(w, h)` that its Resize fits images into.

        Raises:
            TeacherError: It resizes otherwise.
        """
        scale: Any = self._resize.get("scale")
        is_pair = isinstance(scale, list | tuple) and len(scale) == 2 and all(isinstance(side, int) for side in scale)
        if transform_class(self._resize) is not mmdet_transforms.Resize or not is_pair:
            raise TeacherError(
                f"{_WHOSE} has no Resize to one (width, height), but {step_name(self._resize)}. Give --scale WxH."
            )
        width, height = scale
        if not self._resize.get("keep_ratio", False):
            raise TeacherError(
                f"{_WHOSE} resizes to {width}x{height} without keeping the ratio. Give --scale WxH to cache it with "
                "the ratio kept."
            )
        return width, height

    def identity(self) -> dict[str, Any]:
        """Entry of a teacher's identity: `pixels`, what is not as mmdet does it by default; none where all is."""
        identity = {
            "decoding": {} if self.decoding == Decoding() else asdict(self.decoding),
            "to_float32": self._to_float32,
            "before_resize": [_text(step) for step in self._before],
            "resize": {} if self._resizing == RESIZE_DEFAULTS else self._resizing,
            "after_resize": [_text(step) for step in self._after],
        }
        different = {name: value for name, value in identity.items() if value}
        return {"pixels": different} if different else {}

    def view(self, image: Image, scale: tuple[int, int], flip: bool) -> tuple[Image, tuple[int, int]]:
        """What the detector's preprocessor is given of an image.

        Args:
            image: `[h, w, 3]` uint8, BGR, decoded as `decoding` says.
            scale: `(w, h)` that the image is fitted into, its ratio kept.
            flip: Mirror the resized image.

        Returns:
            `[h, w, 3]`, and `(h, w)` of the resized image in its upper left corner; the rest is padding.
        """
        if self._to_float32:
            image = image.astype(np.float32)
        image = self._run_before(image)
        height, width = input_size((image.shape[0], image.shape[1]), scale)
        image = mmcv.imresize(image, (width, height), **self._resizing)
        if flip:
            image = mmcv.imflip(image, "horizontal")
        return self._run_after(image), (height, width)

    def network_input(self, image: Image, scale: tuple[int, int], flip: bool, *, pin: bool) -> NetworkInput:
        """As `view`; several threads may do so at once.

        Args:
            image: As `view` takes it.
            scale: The same.
            flip: The same.
            pin: Page-lock the pixels, for a GPU.
        """
        pixels, size = self.view(image, scale, flip)
        tensor = torch.from_numpy(np.ascontiguousarray(pixels))
        return NetworkInput(tensor.pin_memory() if pin else tensor, size, (image.shape[0], image.shape[1]), flip)

    @property
    def pads_to_a_size(self) -> bool:
        """Whether images are padded by more than to a multiple of a small number."""
        return any(step.get("size") or step.get("pad_to_square") for step in self._after)

    def check_scale(self, scale: tuple[int, int]) -> None:
        """Make sure that images of a scale fit into what they are padded to.

        Raises:
            TeacherError: They may not.
        """
        for step in self._after:
            if (size := step.get("size")) and min(size) < max(scale):
                raise TeacherError(
                    f"{_WHOSE} pads images to {size[0]}x{size[1]}, and resized into {scale[0]}x{scale[1]} one may be "
                    "larger. Use a size_divisor in its Pad, or a smaller --scale."
                )

    def check_live(self) -> None:
        """Make sure that it can be applied to images that a student's pipeline has resized already.

        Raises:
            TeacherError: It cannot; the steps are named.
        """
        fixed = [step for step in self._after if step.get("size")]
        if wrong := [*self._before, *fixed]:
            raise TeacherError(
                f"{_WHOSE} has {', '.join(map(step_name, wrong))} before its Resize or to a fixed size, and beside a "
                "student the images come resized. Cache the teacher (kdpipe cache-teacher), or change its config."
            )

    def of_resized(self, image: Tensor) -> Tensor:
        """What the detector's preprocessor is given of an image that is resized already.

        Args:
            image: Tensor[3, h, w], BGR, 0 to 255.
        """
        if not self._after:
            return image
        pixels = self._run_after(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(image.device)


def teacher_pixels(config: Config) -> PixelPipeline:
    """What the test pipeline of a config makes of images.

    Raises:
        TeacherError: A step cannot be applied in the same way to each image; it is named.
        ConfigError: The pipeline is wrong.
    """
    return PixelPipeline(test_steps(config))


def _with_pixels(steps: Sequence[Any], allowed: tuple[Any, ...]) -> list[Mapping[str, Any]]:
    """Those of some steps that change pixels.

    Raises:
        TeacherError: Others than those that are allowed, or random ones; they are named.
    """
    wrong = [
        step for step in steps if not _is_neutral(step) and (transform_class(step) not in allowed or _is_random(step))
    ]
    if wrong:
        raise TeacherError(
            f"{_WHOSE} has {', '.join(map(_text, wrong))}. Expected LoadImageFromFile, one Resize and PackDetInputs, "
            "and between them nothing but Normalize, changes of colour that are not random, and, behind the Resize, "
            "Pad: of other steps it is not known what they do to the images that are cached. Take them out of the "
            "teacher's config."
        )
    return [step for step in steps if not _is_neutral(step)]


def _is_neutral(step: Any) -> bool:
    """Whether a step leaves pixels alone."""
    kind = transform_class(step)
    never = kind is mmdet_transforms.RandomFlip and step.get("prob") == 0
    return kind in _NO_PIXELS or never


def _is_random(step: Mapping[str, Any]) -> bool:
    """Whether a step does not do the same to each image, or leaves other than three channels."""
    kind = transform_class(step)
    if kind is mmcv_transforms.RandomGrayscale:
        return not (step.get("prob") == 1 and step.get("keep_channels"))
    strength_varies = kind in _WITH_STRENGTH and step.get("level") is None
    if strength_varies and not ("max_mag" in step and step["max_mag"] == step.get("min_mag")):
        return True
    return bool(step.get("prob", 1) != 1)


def _text(step: Any) -> str:
    """A step as a call, for people and to compare."""
    if not isinstance(step, Mapping):
        return step_name(step)
    options = sorted((key, value) for key, value in step.items() if key not in ("type", "_scope_"))
    name = getattr(transform_class(step), "__name__", step_name(step))
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in options)})"


def _build(steps: Sequence[Mapping[str, Any]]) -> Callable[[Image], Image]:
    """One function of steps."""
    with building(_WHOSE):
        transforms = [
            transform_class(step)(**{k: copy.deepcopy(v) for k, v in step.items() if k not in ("type", "_scope_")})
            for step in steps
        ]

    def run(image: Image) -> Image:
        results: dict[str, Any] = {"img": image, "img_shape": image.shape[:2]}
        for transform in transforms:
            results = transform(results)
        changed: Image = results["img"]
        return changed

    return run
