"""`kdpipe inspect`: what a cache is, what it holds, and which losses it serves."""

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from kdpipe.cache.errors import present
from kdpipe.cache.format.head import HEAD
from kdpipe.cache.format.layout import part_layout
from kdpipe.cache.format.record import Files, read_head_record, read_part_record, whole_files
from kdpipe.cache.read.choice import evenly_chosen
from kdpipe.cache.read.reader import TeacherCache, open_cache
from kdpipe.cache.read.root import read_root
from kdpipe.cache.records import TeacherTargets
from kdpipe.cache.spec import FIELD_OF_ARRAY, FORMAT_VERSION, MAX_OBJECTS, CacheSpec
from kdpipe.cache.store.location import Location, part_key
from kdpipe.distill.methods import HEAD_METHODS, METHODS, ContractError, check_contract, expand_methods, needed_fields
from kdpipe.distill.teacher.heads.build import FrozenTeacher
from kdpipe.distill.teacher.heads.fc import TeacherHeadError
from kdpipe.pipelines.commands.cache_command import cache_command, recorded_section
from kdpipe.pipelines.runtime.console import bytes_text, plain

__all__ = ["describe_cache", "describe_image", "inspect_cache"]

_TOP_BOXES = 10
_SHOWN = 20
_LOOKED_AT = 256  # images, evenly chosen


def inspect_cache(
    location: Location, image_id: int | None, view: str | None, *, as_json: bool, console: Console
) -> None:
    """Print what a cache is, or what it holds of one image.

    Args:
        location: Of the cache; parts may be missing.
        image_id: Of the image to show; None shows the cache.
        view: Of the image; None takes the first view of the cache.
        as_json: Print JSON.
        console: Where it is shown.

    Raises:
        CacheError: there is no cache, or its root is damaged; with an image also where that is not there, or damaged.
    """
    values = describe_cache(location) if as_json or image_id is None else {}
    if image_id is not None:
        cache = open_cache(location, allow_partial=True)
        values["image"] = describe_image(cache, image_id, view or cache.spec.views[0])
    if as_json:
        text = json.dumps(values, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
        console.print(text, markup=False, highlight=False)
    elif image_id is None:
        _show_cache(values, console)
    else:
        _show_image(values["image"], console)


def describe_cache(location: Location) -> dict[str, Any]:
    """What a cache is and holds, as JSON values. No data is read: sizes come from the commit records.

    Args:
        location: Of the cache; parts may be missing.

    Raises:
        CacheError: there is no cache, or its root is damaged.
    """
    cache, root = open_cache(location, allow_partial=True), read_root(location)
    missing, disk, raw = [], Counter({"index": 0}), Counter({"index": 0})
    parts, digest = root.parts, root.digest

    def look(number: int) -> tuple[dict[str, Any] | None, Files | None]:
        record = read_part_record(location, number, parts[number], digest)
        return record, record and whole_files(location, part_key(number), record)

    with location.explained("Reading the cache"):
        for number, (record, files) in enumerate(location.at_once(look, range(len(parts)))):
            if record is None or files is None:
                missing.append({"part": number, "images": len(parts[number])})
            else:
                _add_sizes(files, record, cache.spec, disk, raw)
        head = read_head_record(location)
        head_files = head and whole_files(location, HEAD, head)
    state = "missing" if head is None else "damaged" if head_files is None else "stored"
    fields = {name: {"raw": raw[name], "disk": disk[name]} for name in (*cache.spec.fields, "index") if name in disk}
    return {
        "path": location.name,
        "format_version": FORMAT_VERSION,
        "teacher": recorded_section(cache.metadata, "teacher"),
        "data": recorded_section(cache.metadata, "data"),
        "identity": cache.identity,
        "spec": cache.spec.to_json(),
        "images": {"planned": len(root.image_ids), "cached": len(cache), "skipped": cache.skipped},
        "parts": {"planned": len(parts), "committed": len(parts) - len(missing), "missing": missing},
        "part_size": root.plan["part_size"],
        "head": {
            "state": state,
            "parameters": 0 if head is None else len(head["parameters"]),
            "disk": sum(size for size, _ in (head_files or {}).values()),
        },
        "fields": fields,
        "objects": _objects(cache),
        "losses": _losses(cache.spec, state, _uncrossable(cache.spec, state, head)),
        "command": cache_command(cache, root.plan["part_size"]),
    }


def _uncrossable(spec: CacheSpec, state: str, head: Mapping[str, Any] | None) -> str | None:
    """Why the stored box head cannot serve `cross`; None where it can. Its record says that, without its numbers."""
    if head is None or state != "stored":
        return f"The loss cross needs the teacher's box head, which is {state}."
    parameters = {name: torch.empty(entry["shape"], device="meta") for name, entry in head["parameters"].items()}
    try:
        FrozenTeacher(spec, frozenset(), lambda: parameters).check_crossed()
    except TeacherHeadError as error:
        return f"The loss cross needs the teacher's box head. {error}"
    return None


def _objects(cache: TeacherCache) -> dict[str, Any] | None:
    """How many boxes have RoI features, and how often these are as many as may have; None in tiers without these."""
    if "roi_features" not in cache.spec.fields:
        return None
    indices = [
        cache.index(image_id, view) for image_id in evenly_chosen(cache, _LOOKED_AT) for view in cache.spec.views
    ]
    counts = [index.num_objects for index in indices]
    return {
        "limit": MAX_OBJECTS,
        "views": len(counts),
        "mean": sum(counts) / max(1, len(counts)),
        "at_limit": sum(count >= MAX_OBJECTS for count in counts),
    }


def _add_sizes(files: Files, record: dict[str, Any], spec: CacheSpec, disk: Counter[str], raw: Counter[str]) -> None:
    """Add the bytes of a part's files by field, and those of its arrays when decoded."""

    def field(array: str) -> str:
        return FIELD_OF_ARRAY.get(array, array if array in spec.fields else "index")

    for name, (size, _) in files.items():
        disk[field(name.split("/")[0])] += size
    for name, layout in part_layout(spec).items():
        row = math.prod(layout.row_shape) * np.dtype(layout.dtype).itemsize
        raw[field(name)] += record["rows"][layout.per] * row


def _losses(spec: CacheSpec, head: str, uncrossable: str | None) -> dict[str, dict[str, Any]]:
    """What each method needs, and why the cache cannot serve it where it cannot.

    Args:
        spec: Of the cache.
        head: Whether the teacher's heads are `stored`, `missing` or `damaged`.
        uncrossable: Why the box head cannot serve `cross`; None where it can.
    """
    losses: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        expanded = expand_methods([method])
        needs, reason = sorted(needed_fields(expanded)), None
        try:
            check_contract(spec, expanded)
        except ContractError as error:
            reason = str(error)
        if method in HEAD_METHODS:
            needs = ["head"]
            reason = (
                None if head == "stored" else f"Head transfer ({method}) needs the teacher's heads, which are {head}."
            )
        if method == "cross":
            needs, reason = [*needs, "head"], reason or uncrossable
        losses[method] = {"needs": needs, "served": reason is None, "reason": reason}
    return losses


def describe_image(cache: TeacherCache, image_id: int, view: str) -> dict[str, Any]:
    """What a cache holds of one image, as JSON values: sizes, levels, and its most probable boxes.

    Args:
        cache: The cache.
        image_id: Of the image.
        view: One of the cache's.

    Raises:
        CacheError: the image is not there, or its data is damaged.
    """
    targets = cache.targets(image_id, view)
    levels = []
    for stride, level in zip(cache.spec.strides, targets.pyramid() if targets.features else (), strict=False):
        if level is not None:
            figures = {"mean": _number(level.mean()), "max": _number(level.max())}
            levels.append({"stride": stride, "shape": list(level.shape), **figures})
    return {
        "image_id": targets.image_id,
        "view": targets.view,
        "file_name": targets.file_name,
        "original_size": list(targets.original_size),
        "input_size": list(targets.input_size),
        "proposals": targets.num_proposals,
        "jittered": targets.num_jittered,
        "ground_truth": len(targets.boxes) - targets.num_proposals - targets.num_jittered,
        "levels": levels,
        "boxes": _boxes(cache.spec, targets),
    }


def _boxes(spec: CacheSpec, targets: TeacherTargets) -> list[dict[str, Any]]:
    """The most probable proposals, best first, and all ground-truth boxes, each with its most probable class."""
    truth = targets.num_proposals + targets.num_jittered
    logits = present(targets.logits, f"the logits of image {targets.image_id}")
    best, label = logits.float().softmax(-1)[:, :-1].max(-1)  # [R]
    order = np.argsort(-best[: targets.num_proposals].numpy(), kind="stable")[:_TOP_BOXES].tolist()
    decoded = targets.class_boxes(spec)  # [R, K, 4]
    return [
        {
            "ground_truth": row >= truth,
            "box": [_number(x) for x in targets.boxes[row]],
            "class": spec.class_names[int(label[row])],
            "probability": _number(best[row]),
            "decoded": [_number(x) for x in decoded[row, int(label[row])]],
        }
        for row in (*order, *range(truth, len(targets.boxes)))
    ]


def _number(value: Tensor) -> float | None:
    """A float that JSON can hold."""
    return float(value) if math.isfinite(float(value)) else None


def _show_cache(values: dict[str, Any], console: Console) -> None:
    spec, parts, images = values["spec"], values["parts"], values["images"]
    skipped, names, head = images["skipped"], spec["class_names"], values["head"]
    data = values["data"]
    source = (
        f"{data['voc']}, split {data.get('split')}"
        if "voc" in data
        else data.get("ann_file") or data.get("bdd", "not recorded")
    )
    about = {
        "cache": f"{values['path']}, format version {values['format_version']}",
        "teacher": values["teacher"].get("checkpoint", "not recorded"),
        "data": f"{source}, {data.get('img_dir', '')}",
        "classes": f"{len(names)}: {', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)}",
        "view": f"{', '.join(spec['views'])} at {'x'.join(map(str, spec['scale']))}, {spec['proposals']} proposals"
        + (f", {spec['jittered']} boxes near objects" if "jittered" in spec else ""),
        "stored": f"tier {spec['tier']}, {spec['dtype']}, {spec['codec']}, {spec['channels']} channels, strides "
        + ", ".join(str(spec["strides"][level]) for level in spec.get("levels", range(len(spec["strides"])))),
        "images": f"{images['cached']} of {images['planned']}, {len(skipped)} skipped",
        "parts": f"{parts['committed']} of {parts['planned']}, up to {bytes_text(values['part_size'])} uncompressed",
        "head": f"{head['state']}, {head['parameters']} arrays, {bytes_text(head['disk'])}",
    }
    for name, text in about.items():
        console.print(Text(f"{name:8} {plain(text)}"))
    table = Table("field", "raw", "on disk", "ratio")
    total = {kind: sum(sizes[kind] for sizes in values["fields"].values()) for kind in ("raw", "disk")}
    for name, sizes in {**values["fields"], "total": total}.items():
        ratio = f"{100 * sizes['disk'] / sizes['raw']:.0f} %" if sizes["raw"] else ""
        table.add_row(name, bytes_text(sizes["raw"]), bytes_text(sizes["disk"]), ratio)
    console.print(table)
    if objects := values["objects"]:
        console.print(
            f"RoI features are of {objects['mean']:.1f} boxes on average; the limit of {objects['limit']} is reached "
            f"in {objects['at_limit']} of {objects['views']} views looked at"
        )
    served = [name for name, loss in values["losses"].items() if loss["served"]]
    console.print(Text(f"serves   {', '.join(served) or 'no loss'}"))
    for loss in values["losses"].values():
        if not loss["served"]:
            console.print(Text(plain(loss["reason"])))
    for entry in skipped[:_SHOWN]:
        console.print(Text(plain(f"skipped  image {entry['image_id']} ({entry['file_name']}): {entry['reason']}")))
    if len(skipped) > _SHOWN:
        console.print(Text(f"skipped  {len(skipped) - _SHOWN} more"))
    for part in parts["missing"][:_SHOWN]:
        console.print(Text(f"missing  part {part['part']} of {part['images']} images"))
    if parts["missing"]:
        line, command = f"missing  {len(parts['missing'])} parts", values["command"]
        if command is None:
            console.print(Text(f"{line}; the program that made the cache makes them"))
        else:
            stored = ", with the --store-option of before" if "://" in values["path"] else ""
            console.print(Text(f"{line}; this makes them{stored}:"))
            console.print(Text(plain(shlex.join(command))))


def _show_image(image: dict[str, Any], console: Console) -> None:
    size, input_size = ("x".join(map(str, reversed(image[name]))) for name in ("original_size", "input_size"))
    console.print(Text(plain(f"image {image['image_id']} ({image['file_name']}), view {image['view']}")))
    near = f"{image['jittered']} near objects, " if image["jittered"] else ""
    boxes = f"{image['proposals']} proposals, {near}{image['ground_truth']} annotated"
    console.print(Text(f"{size} pixels, seen at {input_size}; {boxes}"))
    if image["levels"]:
        table = Table("stride", "channels x height x width", "mean", "max")
        for level in image["levels"]:
            shape = " x ".join(map(str, level["shape"]))
            table.add_row(str(level["stride"]), shape, f"{level['mean']:.4g}", f"{level['max']:.4g}")
        console.print(table)
    table = Table("", "box", "class", "probability", "decoded box")
    for box in image["boxes"]:
        kind = "annotated" if box["ground_truth"] else "proposal"
        table.add_row(
            kind, _box(box["box"]), Text(plain(box["class"])), f"{box['probability']:.3f}", _box(box["decoded"])
        )
    console.print(table)


def _box(box: list[float]) -> str:
    return " ".join(f"{side:.1f}" for side in box)
