"""What the index of a part has to be like, whoever wrote it: what is read of the part goes by its numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kdpipe.cache.format.layout import Block, index_columns
from kdpipe.cache.spec import VIEWS, CacheSpec
from kdpipe.cache.views import ViewError, input_size

# Beyond these, a number is none that a teacher gives, and reading it would only take the memory.
_MOST_NAME_BYTES, _MOST_BOXES, _MOST_ELEMENTS = 1 << 16, 1 << 17, 1 << 32
# A network input is padded by at most so many pixels beyond the scale before the levels are made.
_MAX_PADDING = 256


def rows_fault(record: Mapping[str, Any], spec: CacheSpec) -> str | None:
    """What is wrong with the numbers of rows that a part's commit record gives; None where nothing is.

    Args:
        record: as `read_part_record` gives it.
        spec: of the cache.
    """
    rows, (start, stop) = record["rows"], record["images"]
    views = (stop - start - len(record["skipped"])) * len(spec.views)
    if rows["view"] != views:
        return f"should have {views} rows, and the commit record says {rows['view']}"
    most = {
        "box": _MOST_BOXES * views,
        "object": _MOST_BOXES * views if spec.object_arrays() else 0,
        "element": _MOST_ELEMENTS * views if "features" in spec.fields else 0,
        "byte": _MOST_NAME_BYTES * views,
    }
    for per, limit in most.items():
        if rows[per] > limit:
            return f"should have at most {limit} rows per {per}, and the commit record says {rows[per]}"
    return None


def index_fault(index: Block, names: Block, rows: Mapping[str, int], spec: CacheSpec) -> str | None:
    """What is wrong with an index, to follow its name; None where nothing is.

    Args:
        index: [V, columns] int64.
        names: [bytes] uint8, the file names.
        rows: of the part's arrays, which `rows_fault` takes no exception to.
        spec: of the cache.
    """
    columns: dict[str, Block] = dict(zip(index_columns(spec), index.T, strict=True))
    if not np.isin(columns["view"], [VIEWS.index(view) for view in spec.views]).all():
        return "has a view that is none of the cache's"
    if any(name.endswith(("height", "width")) and values.min(initial=1) < 1 for name, values in columns.items()):
        return "has a size that is not positive"
    elements = []
    for row in index.tolist():
        entry = dict(zip(columns, row, strict=True))
        if fault := row_fault(entry, spec):
            return f"is wrong about image {entry['image_id']}: {fault}"
        elements.append(_elements(entry, spec))
    return _runs_fault(columns, np.array(elements, dtype=np.int64), rows, spec) or _names_fault(columns, names)


def row_fault(entry: Mapping[str, int], spec: CacheSpec) -> str | None:
    """What is wrong with the sizes in a row, all of which are positive; None where nothing is.

    Args:
        entry: of the index, by column; those of sizes are looked at.
        spec: of the cache.
    """
    size = (entry["input_height"], entry["input_width"])
    try:
        expected = input_size((entry["height"], entry["width"]), spec.scale)
    except ViewError as error:
        return str(error)
    if size != expected:
        return f"a network input of {size}, expected {expected}"
    most = max(spec.scale) + _MAX_PADDING  # a Pad of the teacher's pipeline may make a square
    for level in range(len(spec.strides) if "features" in spec.fields else 0):
        shape = (entry[f"level{level}_height"], entry[f"level{level}_width"])
        if max(shape) > most:
            return f"a level of {shape} cells, and a network input of {size}"
    if _elements(entry, spec) > _MOST_ELEMENTS:
        return f"{_elements(entry, spec)} numbers of features"
    return None


def _elements(entry: Mapping[str, int], spec: CacheSpec) -> int:
    """Entries of `features` that a row's image has."""
    levels = range(len(spec.strides) if "features" in spec.fields else 0)
    cells = [entry[f"level{level}_height"] * entry[f"level{level}_width"] for level in levels]
    return sum(spec.stored_elements(level, count) for level, count in enumerate(cells))


def _runs_fault(columns: Mapping[str, Block], elements: Block, rows: Mapping[str, int], spec: CacheSpec) -> str | None:
    """Whether the rows of the other arrays are dealt to the images one after the other."""
    counts = {"element": ("element_start", elements)}
    for per, prefix in (("box", "box"), ("object", "object"), ("byte", "name")):
        start, stop = columns[f"{prefix}_start"], columns[f"{prefix}_stop"]
        if len(start) and (min(start.min(), stop.min()) < 0 or max(start.max(), stop.max()) > rows[per]):
            return f"has values of {prefix}_start or {prefix}_stop that are none of the {rows[per]} rows per {per}"
        counts[per] = (f"{prefix}_start", stop - start)
    for per, (name, count) in counts.items():
        if count.min(initial=0) < 0 or not np.array_equal(columns[name], np.cumsum(count) - count):
            return f"has values of {name} that leave gaps or overlap"
        if count.sum() != rows[per]:
            return f"has {count.sum()} rows per {per}, and the commit record {rows[per]}"
    proposals, jittered = columns["num_proposals"], columns["num_jittered"]
    if (
        min(proposals.min(initial=0), jittered.min(initial=0)) < 0
        or ((proposals > spec.proposals) | (jittered > spec.jittered) | (proposals + jittered > counts["box"][1])).any()
    ):
        return "has impossible numbers of proposals"
    return None


def _names_fault(columns: Mapping[str, Block], names: Block) -> str | None:
    for image_id, start, stop in zip(columns["image_id"], columns["name_start"], columns["name_stop"], strict=True):
        try:
            names[start:stop].tobytes().decode()
        except UnicodeDecodeError as error:
            return f"is wrong about image {image_id}: its name is no text ({error})"
    return None
