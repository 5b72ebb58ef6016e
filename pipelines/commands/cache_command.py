"""The command that made a cache, from what the cache records, to make what is missing of it."""

from typing import Any

from kdpipe.cache.read.reader import TeacherCache

__all__ = ["cache_command", "recorded_section"]


def cache_command(cache: TeacherCache, part_size: int) -> list[str] | None:
    """The words of a `kdpipe cache-teacher` that goes on with a cache.

    Options that may not be recorded (`--store-option`, `--trust-checkpoint`) are not among them.

    Args:
        cache: Parts may be missing.
        part_size: As its root records it.

    Returns:
        None where `kdpipe cache-teacher` did not make the cache.
    """
    spec, metadata = cache.spec, cache.metadata
    teacher, data, options = (recorded_section(metadata, name) for name in ("teacher", "data", "options"))
    if "checkpoint" not in teacher:
        return None
    named = {
        "--ckpt": teacher["checkpoint"],
        "--config": options.get("config"),
        "--voc": data.get("voc"),
        "--split": data.get("split"),
        "--bdd": data.get("bdd"),
        "--ann-file": data.get("ann_file"),
        "--img-dir": None if "voc" in data else data.get("img_dir"),
        "--limit": data.get("limit"),
        "--out": cache.location.address,
        "--targets": spec.tier,
        "--dtype": spec.dtype,
        "--levels": ",".join(map(spec.level_name, spec.levels)) if len(spec.levels) < len(spec.strides) else None,
        "--codec": spec.codec,
        "--proposals": spec.proposals,
        "--scale": "x".join(map(str, spec.scale)),
        "--views": ",".join(spec.views),
        "--part-size": part_size,
    }
    words = ["kdpipe", "cache-teacher"]
    for name, value in named.items():
        words += [] if value is None else [name, str(value)]
    return words + ["--skip-bad-images"] * bool(options.get("skip_bad_images") or cache.skipped)


def recorded_section(metadata: Any, name: str) -> dict[str, Any]:
    """An entry of what a cache records beside its data, which may be anything; empty where it is no mapping."""
    value = metadata.get(name)
    return value if isinstance(value, dict) else {}
