"""How long does it take to open a cache of a million images, and how much memory?

    python tests/benchmarks/opening.py --out /tmp/opening

Makes a cache of many images as far as opening it goes: the root, and each part's commit record, index and file names,
as `cache-teacher` would write them; the arrays of the targets are only named in the records. Then opens it in a new
process and looks images up.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from zarr.storage import LocalStore

from kdpipe.cache import CacheSpec, ImageInfo
from kdpipe.cache.format.layout import index_columns, part_layout
from kdpipe.cache.format.record import write_record
from kdpipe.cache.format.zarr_arrays import WrittenFiles
from kdpipe.cache.plan import level_shapes, plan_parts, raw_bytes
from kdpipe.cache.read.root import read_root
from kdpipe.cache.spec import MAX_OBJECTS, TIERS
from kdpipe.cache.store.location import open_location, part_key
from kdpipe.cache.write.arrays import write_array
from kdpipe.cache.write.root import create_root

# Images as they are in COCO: 640 x 480, with 7 boxes, at 1333 x 800.
HEIGHT, WIDTH, BOXES = 480, 640, 7
INPUT = (800, 1067)

OPEN = """
import json, sys, time
from pathlib import Path
from kdpipe.cache import open_cache
def status(name):
    return next(int(x.split()[1]) for x in Path("/proc/self/status").open() if x.startswith(name)) * 1024
Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
before, start = status("VmRSS"), time.perf_counter()
cache = open_cache(sys.argv[1])
seconds, memory, peak = time.perf_counter() - start, status("VmRSS") - before, status("VmHWM") - before
ids = cache.image_ids[:: max(1, len(cache) // 1000)].tolist()
start = time.perf_counter()
found = sum(image_id in cache for image_id in ids)
look_up = (time.perf_counter() - start) / len(ids)
start = time.perf_counter()
for image_id in ids[:200]:
    assert cache.index(image_id).image_id == image_id
first = (time.perf_counter() - start) / len(ids[:200])
start = time.perf_counter()
for image_id in ids[:200]:
    cache.index(image_id)
again = (time.perf_counter() - start) / len(ids[:200])
assert found == len(ids)
print(json.dumps([len(cache), seconds, memory, peak, look_up, first, again]))
"""


def make_spec(tier: str, dtype: str) -> CacheSpec:
    return CacheSpec(
        tier=tier,
        dtype=dtype,
        codec="zstd",
        class_names=tuple(f"class {n}" for n in range(80)),
        category_ids=tuple(range(1, 81)),
        channels=256,
        strides=(4, 8, 16, 32, 64),
        roi_levels=4,
        finest_scale=56,
        roi_size=7,
        roi_sampling_ratio=0,
        roi_aligned=True,
        embedding_dim=1024,
        box_means=(0.0, 0.0, 0.0, 0.0),
        box_stds=(0.1, 0.1, 0.2, 0.2),
        class_agnostic=False,
        proposals=512,
        views=("identity",),
        scale=(1333, 800),
    )


def make_part(out: Path, number: int, span: range, images: list[ImageInfo], spec: CacheSpec, root: str) -> None:
    """A part's record, list of files, index and names."""
    folder = out / part_key(number)
    layout, columns = part_layout(spec), index_columns(spec)
    shapes = level_shapes(INPUT, spec.strides)
    count, boxes, objects = len(span), spec.proposals + BOXES, MAX_OBJECTS if spec.object_arrays() else 0
    elements = sum(spec.stored_elements(level, height * width) for level, (height, width) in enumerate(shapes))
    elements = elements if "features" in spec.fields else 0
    rows = np.arange(count)
    names = [images[n].file_name.encode() for n in span]
    ends = np.cumsum([len(name) for name in names])
    values: dict[str, Any] = {
        **{"image_id": [images[n].image_id for n in span], "height": HEIGHT, "width": WIDTH},
        **{"input_height": INPUT[0], "input_width": INPUT[1], "num_proposals": spec.proposals},
        **{"box_start": rows * boxes, "box_stop": (rows + 1) * boxes},
        **{"object_start": rows * objects, "object_stop": (rows + 1) * objects, "element_start": rows * elements},
        **{"name_start": ends - [len(name) for name in names], "name_stop": ends},
        **{f"level{n}_height": height for n, (height, _) in enumerate(shapes)},
        **{f"level{n}_width": width for n, (_, width) in enumerate(shapes)},
    }
    index = np.zeros((count, len(columns)), dtype=np.int64)
    for position, column in enumerate(columns):
        index[:, position] = values.get(column, 0)
    written = WrittenFiles(LocalStore(folder / "new"))
    write_array(written, "index", layout["index"], index)
    write_array(written, "file_names", layout["file_names"], np.frombuffer(b"".join(names), np.uint8))
    per = {"view": count, "box": count * boxes, "object": count * objects, "element": count * elements}
    per["byte"] = int(ends[-1])
    files = dict(written.files)
    for name in layout.keys() - {"index", "file_names"}:
        for file in ("zarr.json", *layout[name].files(per[layout[name].per])):
            files[f"{name}/{file}"] = (12_345_678, hashlib.sha256(f"{number} {name} {file}".encode()).hexdigest())
    content = {"part": number, "images": [span.start, span.stop], "rows": per, "skipped": [], "root": root}
    write_record(folder, content, files)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder for the data.")
@click.option("--images", type=int, default=1_000_000, show_default=True)
@click.option("--tier", type=click.Choice(TIERS), default="pyramid", show_default=True)
@click.option("--dtype", type=click.Choice(["int8", "float16"]), default="int8", show_default=True)
@click.option("--part-size", type=int, default=1 << 30, show_default=True, help="Bytes before compression.")
@click.option("--rounds", type=int, default=3, show_default=True)
def main(out: Path, images: int, tier: str, dtype: str, part_size: int, rounds: int) -> None:
    """Make the cache, open it, print a table."""
    listed = [ImageInfo(1 + 3 * n, f"train/{n:012d}.jpg", HEIGHT, WIDTH, BOXES) for n in range(images)]
    click.echo("| tier, dtype | raw TB | parts of 1 GiB |\n|---|---|---|")
    for each, kind in [(t, d) for t in TIERS for d in ("int8", "float16")]:
        spec = make_spec(each, kind)
        parts = plan_parts(listed, spec, part_size)
        click.echo(f"| {each}, {kind} | {sum(raw_bytes(listed, spec).values()) / 1e12:.2f} | {len(parts)} |")
    spec = make_spec(tier, dtype)
    parts = plan_parts(listed, spec, part_size)
    os.fsync = lambda handle: None  # type: ignore[assignment]  # nothing here has to survive a power cut
    start = time.perf_counter()
    location = open_location(out)
    create_root(location, spec, listed, parts, part_size, {"teacher": "made up"}, {})
    digest = read_root(location).digest
    for number, span in enumerate(parts):
        make_part(out, number, span, listed, spec, digest)
    try:
        sizes = {file: file.stat().st_size for file in out.rglob("*") if file.is_file()}
        root = sum(size for file, size in sizes.items() if "parts" not in file.relative_to(out).parts[:1])
        records = sum(
            size for file, size in sizes.items() if file.name == "zarr.json" and file.parent.parent.name == "parts"
        )
        click.echo(
            f"\n{tier}, {dtype}: {images} images in {len(parts)} parts, made in {time.perf_counter() - start:.0f} s. "
            f"Root and plan {root / 1e6:.1f} MB, commit records {records / 1e6:.1f} MB, lists of files, indices "
            f"and names of the parts {(sum(sizes.values()) - root - records) / 1e6:.1f} MB, in {len(sizes)} files.\n"
        )
        click.echo("| images | open, s | memory, MB | peak, MB | `id in cache`, us | first index(id), us | again, us |")
        click.echo("|---|---|---|---|---|---|---|")
        for _ in range(rounds):
            answer = subprocess.run(
                [sys.executable, "-c", OPEN, str(out)], check=True, stdout=subprocess.PIPE, text=True
            )
            count, seconds, memory, peak, *times = json.loads(answer.stdout)
            cells = " | ".join(f"{1e6 * value:.1f}" for value in times)
            click.echo(f"| {count} | {seconds:.2f} | {memory / 1e6:.0f} | {peak / 1e6:.0f} | {cells} |")
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
