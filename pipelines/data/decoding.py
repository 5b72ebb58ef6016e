"""How picture files become pixels: the options of mmdet's LoadImageFromFile that change them."""

from dataclasses import asdict, dataclass

__all__ = ["DEFAULT", "Decoding"]


@dataclass(frozen=True)
class Decoding:
    """How a picture file is decoded, to three channels of uint8, BGR.

    Attributes:
        color_type: In the orientation that EXIF says (`color`), or as it is stored (`color_ignore_orientation`).
        imdecode_backend: The library that decodes, `cv2` or `pillow`; they round differently.
    """

    color_type: str = "color"
    imdecode_backend: str = "cv2"

    @property
    def turns(self) -> bool:
        """Whether the EXIF orientation is applied."""
        return self.color_type in ("color", "grayscale")

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in asdict(self).items())


DEFAULT = Decoding()
