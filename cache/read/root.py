"""Reads the root of a cache."""

import json

from kdpipe.cache.errors import CacheError
from kdpipe.cache.format.record import files_key, parse_root_record, read_files
from kdpipe.cache.format.root import PLAN, PLAN_LAYOUT, Root, starts_fault
from kdpipe.cache.read.arrays import DamagedError, read_array
from kdpipe.cache.spec import CacheSpec, check_version
from kdpipe.cache.store.location import RECORD, Location


def read_root(location: Location) -> Root:
    """Read and check the root of a cache.

    Raises:
        CacheError: nothing is there, it is no cache, has another format version, or is damaged.
    """
    with location.explained("Reading the cache"):
        data = location.read(RECORD)
        if data is None and location.is_absent():
            raise CacheError(
                f"There is no cache at {location}: make one with `kdpipe cache-teacher --out {location} ...`."
            )
        if data is None:
            raise CacheError(f"{location} is not a kdpipe cache: it has no {RECORD}.")
        return _parse(location, data)


def _parse(location: Location, data: bytes) -> Root:
    advice = f"restore it, or move {location} away and cache the teacher again"
    damaged = f"The file {RECORD} of the cache {location} is damaged: {advice}."
    try:
        version = json.loads(data)["attributes"]["kdpipe"]["spec"]["version"]
    except (ValueError, RecursionError):
        raise CacheError(damaged) from None
    except (KeyError, TypeError):
        raise CacheError(f"{location} is not a kdpipe cache: its {RECORD} has no `kdpipe` attribute.") from None
    check_version(version)
    record = parse_root_record(data)
    if record is None:
        raise CacheError(f"{damaged} (its checksum does not fit, or an entry is missing or of another type)")
    spec = CacheSpec.from_json(record["spec"])
    plan, key = record["plan"], files_key(PLAN, record)
    rows = {"image_ids": plan["images"], "part_starts": plan["parts"] + 1}
    files = read_files(location, key, record["files"])
    try:
        if files is None:
            raise DamagedError(PLAN, "its list of files is missing or has other content than was written")
        arrays = [read_array(location, key, name, PLAN_LAYOUT, rows[name], files) for name in rows]
        if fault := starts_fault(arrays[1], plan["images"]):
            raise DamagedError("part_starts", fault)
    except DamagedError as error:
        raise CacheError(f"The plan of the cache {location} is damaged ({error}): {advice}.") from error
    return Root(spec, record["identity"], record["metadata"], plan, arrays[0], arrays[1])
