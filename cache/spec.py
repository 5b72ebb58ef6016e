"""What a cache holds: format version, tiers, storage types, and the specification every array follows."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

import numpy as np

from kdpipe.cache.errors import CacheError
from kdpipe.cache.typed_json import as_json, from_json_value

FORMAT_VERSION = 1
TIERS = ("predictions", "embeddings", "objects", "pyramid")
DTYPES = ("int4", "int8", "float16", "float32")
CODECS = ("zstd", "lz4", "none")
VIEWS = ("identity", "hflip")

# RoI features are stored of at most so many boxes of an image, and of all its ground-truth boxes.
MAX_OBJECTS = 56

# Of one row of an array, which is never divided: RoI features of the largest teachers have a hundredth of it.
MAX_ROW_BYTES = 64 << 20

# The format of development versions, which had other arrays.
_UNRELEASED = 2

# Entries of a specification that only some caches have.
_OPTIONAL = ("cascade_stds", "shared_style", "semantic", "delta_floor", "jittered")

# Arrays that belong to a field beside that of its own name.
FIELD_OF_ARRAY = {
    "scale": "features",
    "embedding_scale": "embeddings",
    "roi_scale": "roi_features",
    "roi_rows": "roi_features",
}

_FIELDS_OF_TIER = {
    "predictions": ("boxes", "logits", "deltas"),
    "embeddings": ("boxes", "logits", "deltas", "embeddings"),
    "objects": ("boxes", "logits", "deltas", "embeddings", "roi_features"),
    "pyramid": ("features", "boxes", "logits", "deltas", "embeddings"),
}


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides the shape, the storage type and the meaning of the arrays of a cache.

    Attributes:
        tier: one of `TIERS`; each holds the fields of those before it, except that `pyramid` has no `roi_features`.
        dtype: one of `DTYPES`, the storage type of `features` and `roi_features`. Embeddings are of that type, too, but
            int8 where it is int4. Boxes are always float32; logits and deltas are float16, or float32 where `dtype` is
            float32.
        codec: one of `CODECS`.
        class_names: names of the classes in label order.
        category_ids: COCO category id of each label, in label order.
        channels: channels of every pyramid level.
        strides: strides of the pyramid levels, in pixels of the network input.
        roi_levels: how many levels (the first ones) the teacher's RoI extractor reads.
        finest_scale: box side in pixels up to which the extractor reads the first level.
        roi_size: side of a RoI feature in cells.
        roi_sampling_ratio: sampling points per cell and side of RoIAlign; 0 adapts to the box.
        roi_aligned: whether RoIAlign shifts by half a pixel.
        embedding_dim: width of the input of the teacher's classifier layer.
        box_means: means of the box coder.
        box_stds: standard deviations of the box coder.
        class_agnostic: whether the teacher regresses one box per RoI instead of one per class.
        proposals: at most how many proposals per image and view precede the ground-truth boxes.
        views: views stored of every image, a subset of `VIEWS` in that order.
        scale: (width, height) of mmdet's `Resize(scale, keep_ratio=True)`, pixels.
        cascade_stds: of a cascade, standard deviations of the box coder of each of its stages, the first of which are
            `box_stds`; empty for a teacher with one box head.
        shared_style: of a shared residual stage between RoIAlign and box head (C4), where its blocks have their stride:
            "caffe" in the first convolution, "pytorch" in the second; empty where there is none.
        semantic: of a semantic branch (HTC), the level at whose size it fuses the pyramid, and the cells per side of
            its RoI features; empty where there is none.
        delta_floor: where the type is int8 or int4, classes to which the teacher gives a box less than this probability
            share the mean of their deltas, but for those of the objects that the box overlaps; 0 keeps all.
        jittered: at most how many boxes near annotated objects, which are no proposals, follow the proposals.
        levels: positions of the strides whose features are stored, all by default.

    The last six are left out of the specification in JSON where they are empty, 0, or all.

    Raises:
        CacheError: a value is not possible.
    """

    tier: str
    dtype: str
    codec: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    channels: int
    strides: tuple[int, ...]
    roi_levels: int
    finest_scale: int
    roi_size: int
    roi_sampling_ratio: int
    roi_aligned: bool
    embedding_dim: int
    box_means: tuple[float, float, float, float]
    box_stds: tuple[float, float, float, float]
    class_agnostic: bool
    proposals: int
    views: tuple[str, ...]
    scale: tuple[int, int]
    cascade_stds: tuple[tuple[float, float, float, float], ...] = ()
    shared_style: str = ""
    semantic: tuple[int, ...] = ()
    delta_floor: float = 0.0
    jittered: int = 0
    levels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("tier", self.tier, TIERS),
            ("dtype", self.dtype, DTYPES),
            ("codec", self.codec, CODECS),
            ("shared_style", self.shared_style, ("", "caffe", "pytorch")),
        ):
            if value not in allowed:
                raise CacheError(f"Unknown {name} {value!r} in a cache specification: use one of {', '.join(allowed)}.")
        if not self.views or tuple(v for v in VIEWS if v in self.views) != self.views:
            raise CacheError(f"The views of a cache are some of {VIEWS} in that order, found {self.views}.")
        if not self.class_names or len(self.class_names) != len(self.category_ids):
            raise CacheError(
                "A cache needs one category id per class name and at least one class, found "
                f"{len(self.class_names)} names and {len(self.category_ids)} ids."
            )
        positive = {
            name: getattr(self, name) for name in ("channels", "finest_scale", "roi_size", "embedding_dim", "proposals")
        }
        positive |= {"strides": min(self.strides, default=0), "scale": min(self.scale), "box_stds": min(self.box_stds)}
        positive |= {"cascade_stds": min((std for stds in self.cascade_stds for std in stds), default=1.0)}
        if wrong := [f"{name} = {getattr(self, name)}" for name, value in positive.items() if value <= 0]:
            raise CacheError(f"Numbers of a cache specification must be positive, found {', '.join(wrong)}.")
        numbers = (self.channels, self.roi_size, self.embedding_dim, self.proposals, self.finest_scale, *self.scale)
        if max(*numbers, *self.strides, len(self.strides) << 24, abs(self.roi_sampling_ratio)) >= 1 << 30:
            raise CacheError("A number of a cache specification is larger than that of any teacher.")
        if largest := [name for name, size in self.row_bytes().items() if size > MAX_ROW_BYTES]:
            raise CacheError(f"One row of {largest[0]} takes more than {MAX_ROW_BYTES >> 20} MiB: no teacher's does.")
        if not 0 < self.roi_levels <= len(self.strides):
            raise CacheError(
                f"The RoI extractor reads 1 to {len(self.strides)} of the stored levels, found {self.roi_levels}."
            )
        if self.cascade_stds and self.cascade_stds[0] != self.box_stds:
            raise CacheError(
                f"The box_stds of a cascade are those of its first stage {self.cascade_stds[0]}, found {self.box_stds}."
            )
        every = tuple(range(len(self.strides)))
        if self.semantic and (len(self.semantic) != 2 or self.semantic[0] not in every or self.semantic[1] < 1):
            raise CacheError(
                f"The entry semantic is one of the {len(every)} levels and a number of cells, found {self.semantic}."
            )
        if not 0 <= self.delta_floor < 1:
            raise CacheError(f"The entry delta_floor is a probability below 1, found {self.delta_floor}.")
        if self.jittered < 0:
            raise CacheError(f"The entry jittered is a number of boxes, found {self.jittered}.")
        object.__setattr__(self, "levels", self.levels or every)
        if tuple(level for level in every if level in self.levels) != self.levels:
            raise CacheError(f"The stored levels are some of {every} in that order, found {self.levels}.")
        if self.levels != every and "features" not in self.fields:
            raise CacheError(f"Levels are chosen of a feature pyramid, and the tier {self.tier!r} holds none.")

    @property
    def head_levels(self) -> int:
        """How many levels (the first ones) what the teacher says of a box depends on."""
        return len(self.strides) if self.semantic else self.roi_levels

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields stored per image: some of features, boxes, logits, deltas, embeddings, roi_features."""
        return _FIELDS_OF_TIER[self.tier]

    @property
    def num_classes(self) -> int:
        """Object classes, background not counted."""
        return len(self.class_names)

    def field_dtype(self, field: str) -> str:
        """Storage type of a field: one of `DTYPES`."""
        if field == "boxes" or self.dtype == "float32":
            return "float32"
        if field in ("features", "roi_features"):
            return self.dtype
        return "int8" if self.is_quantized and field == "embeddings" else "float16"

    @property
    def is_quantized(self) -> bool:
        """Whether features, RoI features and embeddings are stored as whole numbers with a scale."""
        return self.dtype in ("int4", "int8")

    @property
    def element_dtype(self) -> str:
        """Type of the arrays `features` and `roi_features`: "uint8" holds two values of int4."""
        return "uint8" if self.dtype == "int4" else self.dtype

    @property
    def stored_channels(self) -> int:
        """Channels as they are stored: in int4 those of the second half lie in the bytes of the first."""
        return -(-self.channels // 2) if self.dtype == "int4" else self.channels

    def stored_elements(self, level: int, cells: int) -> int:
        """Entries of the array `features` that a level of so many cells takes; 0 for one that is not stored."""
        return self.stored_channels * cells if level in self.levels else 0

    def level_name(self, level: int) -> str:
        """Name of the level at a position of `strides`: "P2" is that of stride 4."""
        return f"P{self.strides[level].bit_length() - 1}"

    def arrays_of(self, field: str) -> list[str]:
        """Names of the arrays that hold a field: its own, and those that belong to it."""
        names = {*self.box_arrays(), *self.object_arrays()} | ({"scale"} if self.is_quantized else set())
        return [field, *(name for name, owner in FIELD_OF_ARRAY.items() if owner == field and name in names)]

    def box_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one row and storage type of each array that has one row per box."""
        num_classes = self.num_classes
        shapes: dict[str, tuple[int, ...]] = {
            "boxes": (4,),
            "logits": (num_classes + 1,),
            "deltas": (1 if self.class_agnostic else num_classes, 4),
            "embeddings": (self.embedding_dim,),
        }
        arrays = {field: (shapes[field], self.field_dtype(field)) for field in self.fields if field in shapes}
        if "embeddings" in arrays and self.is_quantized:
            arrays["embedding_scale"] = ((), "float32")
        return arrays

    def object_arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape of one row and storage type of each array that has one row per box with RoI features."""
        if "roi_features" not in self.fields:
            return {}
        shape = (self.stored_channels, self.roi_size, self.roi_size)
        arrays = {"roi_rows": ((), "int32"), "roi_features": (shape, self.element_dtype)}
        if self.is_quantized:
            arrays["roi_scale"] = ((self.channels,), "float16")
        return arrays

    def row_bytes(self) -> dict[str, int]:
        """Raw bytes of one row of each array that has a row per box, or per box with RoI features."""
        arrays = self.box_arrays() | self.object_arrays()
        return {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in arrays.items()}

    def to_json(self) -> dict[str, Any]:
        """The specification as JSON values; `from_json` gives it back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if value or name not in _OPTIONAL}
        if len(self.levels) == len(self.strides):
            del values["levels"]
        values = {name: as_json(value) for name, value in values.items()}
        return {"version": FORMAT_VERSION, **values}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CacheSpec":
        """Read a specification back.

        Raises:
            CacheError: another format version, a missing or unknown entry, or a value of the wrong type or range.
        """
        check_version(values.get("version"))
        entries = {name: value for name, value in values.items() if name != "version"}
        hints = {field.name: get_type_hints(cls)[field.name] for field in dataclasses.fields(cls)}
        hints = {name: hint for name, hint in hints.items() if name in entries or name not in (*_OPTIONAL, "levels")}
        if entries.keys() != hints.keys():
            missing, unknown = sorted(hints.keys() - entries.keys()), sorted(entries.keys() - hints.keys())
            raise CacheError(
                f"The specification in the cache is damaged: missing entries {missing}, unknown entries {unknown}. "
                "Cache the teacher again."
            )
        return cls(**{name: from_json_value(name, entries[name], hint) for name, hint in hints.items()})


def check_version(version: object) -> None:
    """Refuse a format version that this kdpipe cannot read.

    Raises:
        CacheError: the version is newer or older, or is no version at all.
    """
    if type(version) is not int or version < 1:
        raise CacheError(f"Expected format version {FORMAT_VERSION} in the cache, found {version!r}.")
    if version > _UNRELEASED:
        raise CacheError(
            f"The cache has format version {version}, and this kdpipe reads version {FORMAT_VERSION}: "
            "install a newer kdpipe (pip install -U kdpipe)."
        )
    if version != FORMAT_VERSION:
        raise CacheError(
            "The cache was made by a development version of kdpipe, whose format this one does not read: move the "
            "cache away and cache the teacher again."
        )
