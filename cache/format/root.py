"""The root of a cache: specification, identity and plan, written once and before anything else."""

import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdpipe.cache.codecs import group_metadata
from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import check_digests, parse_record, write_record
from kdpipe.cache.identity import digest_json
from kdpipe.cache.plan import ImageInfo, digest_images
from kdpipe.cache.read.array_reader import read_array
from kdpipe.cache.spec import CacheSpec, check_version
from kdpipe.cache.store.files import FileRecord, publish, temporary_folder, write_file
from kdpipe.cache.write.arrays import write_array

_ARRAYS = ("image_ids", "part_starts")
_CODEC = "zstd"  # of these arrays


@dataclass(frozen=True)
class Root:
    """What the root of a cache says.

    Attributes:
        spec: what is stored.
        identity: of teacher, data and options, as given by the writer's caller.
        metadata: free-form, as given by the writer's caller.
        plan: number of images and parts, part size, digest of the images.
        image_ids: [N] int64, of all images in the order of the plan.
        part_starts: [P + 1] int64; part p has the images [part_starts[p], part_starts[p + 1]).
    """

    spec: CacheSpec
    identity: dict[str, Any]
    metadata: dict[str, Any]
    plan: dict[str, Any]
    image_ids: npt.NDArray[np.int64]
    part_starts: npt.NDArray[np.int64]

    @property
    def parts(self) -> list[range]:
        """Indices into `image_ids` of each part."""
        starts = self.part_starts.tolist()
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]

    @property
    def digest(self) -> str:
        """Says of parts and head which cache they were made for: `digest_root`."""
        return digest_root(self.spec, self.identity, self.plan)


def digest_root(spec: CacheSpec, identity: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    """sha256 of all that decides the content of a cache."""
    return digest_json({"spec": spec.to_json(), "identity": identity, "plan": plan})


def describe_plan(images: Sequence[ImageInfo], parts: Sequence[range], part_size: int) -> dict[str, Any]:
    """The plan as JSON values, as far as two plans are compared."""
    return {"images": len(images), "parts": len(parts), "part_size": part_size, "digest": digest_images(images)}


def create_root(
    path: Path,
    spec: CacheSpec,
    images: Sequence[ImageInfo],
    parts: Sequence[range],
    part_size: int,
    identity: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> bool:
    """Make an empty cache at `path`, which is absent or an empty folder, in one atomic act.

    Returns:
        False where another process was first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = temporary_folder(path)
    try:
        (folder / "plan").mkdir()
        (folder / "parts").mkdir()
        ids = np.array([image.image_id for image in images], dtype=np.int64)
        starts = np.array([0, *(part.stop for part in parts)], dtype=np.int64)
        files: dict[str, FileRecord] = {}
        for name, values in zip(_ARRAYS, (ids, starts), strict=True):
            written = write_array(folder / "plan" / name, values, _CODEC)
            files |= {f"plan/{name}/{file}": entry for file, entry in written.items()}
        for name in ("plan", "parts"):
            files[f"{name}/zarr.json"] = write_file(folder / name / "zarr.json", group_metadata())
        content = {
            **{"spec": spec.to_json(), "identity": identity, "metadata": metadata},
            "plan": describe_plan(images, parts, part_size),
        }
        write_record(folder, content, files)
        created = publish(folder, path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not created:
        shutil.rmtree(folder, ignore_errors=True)
    return created


def read_root(path: Path) -> Root:
    """Read and check the root of a cache.

    Raises:
        CacheError: `path` is not there, is no cache, has a newer format version, or is damaged.
    """
    if not path.exists():
        raise CacheError(f"There is no cache at {path}: make one with `kdpipe cache-teacher --out {path} ...`.")
    try:
        content = (path / "zarr.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CacheError(f"{path} is not a kdpipe cache: it has no zarr.json.") from None
    except OSError as error:
        raise CacheError(f"The cache {path} cannot be read: {error.strerror} (zarr.json).") from error
    damaged = f"The file {path / 'zarr.json'} is damaged: restore it, or move {path} away and cache the teacher again."
    try:
        record = json.loads(content)["attributes"]["kdpipe"]
    except (ValueError, RecursionError) as error:
        raise CacheError(f"{damaged} ({error})") from None
    except (KeyError, TypeError):
        raise CacheError(f"{path} is not a kdpipe cache: its zarr.json has no `kdpipe` attribute.") from None
    if not isinstance(record, dict) or not isinstance(record.get("spec"), dict):
        raise CacheError(damaged)
    check_version(record["spec"].get("version"))
    if parse_record(content) is None:
        raise CacheError(f"{damaged} (its checksum does not fit)")
    plan = {name: entry for name, entry in record["files"].items() if name.startswith("plan/")}
    if wrong := check_digests(path, {"files": plan}):
        raise CacheError(
            f"The plan of the cache {path} is damaged: {'; '.join(wrong)}. Restore it, or move {path} away and cache "
            "the teacher again."
        )
    arrays = [read_array(path / "plan" / name, _CODEC) for name in _ARRAYS]
    spec = CacheSpec.from_json(record["spec"])
    return Root(spec, record["identity"], record["metadata"], record["plan"], arrays[0], arrays[1])
