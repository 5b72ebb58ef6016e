"""What is cached of a teacher, as the command line says it. Nothing heavy is imported here."""

from dataclasses import dataclass

from kdpipe.cache.spec import VIEWS

__all__ = ["CacheOptions", "TierDefaults", "tier_defaults"]


@dataclass(frozen=True)
class TierDefaults:
    """What a cache of a tier holds of each image where nothing is said; `tests/benchmarks/tiers.md` has the trainings.

    Attributes:
        dtype: One of `DTYPES`.
        proposals: The teacher's best proposals.
        jittered: Boxes near the objects, at most.
        views: Some of `VIEWS`.
    """

    dtype: str = "int8"
    proposals: int = 512
    jittered: int = 0
    views: tuple[str, ...] = ("identity",)


_DEFAULTS = {
    "pyramid": TierDefaults(dtype="int4"),
    "objects": TierDefaults(proposals=128, jittered=128, views=VIEWS),
}


def tier_defaults(tier: str) -> TierDefaults:
    """What a cache of a tier, one of `TIERS`, holds where nothing is said."""
    return _DEFAULTS.get(tier, TierDefaults())


@dataclass(frozen=True)
class CacheOptions:
    """What is cached of a teacher, and how.

    Attributes:
        tier: One of `TIERS`.
        dtype: One of `DTYPES`; None takes what suits the tier.
        codec: One of `CODECS`.
        proposals: The teacher's best proposals kept per image; None takes what suits the tier.
        views: Some of `VIEWS`; None takes what suits the tier.
        levels: Names of the pyramid levels that are kept, such as P3; None keeps all.
        scale: `(w, h)` of the teacher's view; None takes the test-time scale of its config.
        part_size: Raw bytes per part, the unit of commit and of resuming.
        skip_bad_images: Go on past unreadable images, and record them.
        strict_data: Refuse data of which some would be left out.
    """

    tier: str = "pyramid"
    dtype: str | None = None
    codec: str = "zstd"
    proposals: int | None = None
    levels: tuple[str, ...] | None = None
    views: tuple[str, ...] | None = None
    scale: tuple[int, int] | None = None
    part_size: int = 1 << 30
    skip_bad_images: bool = False
    strict_data: bool = False
