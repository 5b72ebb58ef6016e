"""How long is an epoch that is read from an object store, beside one that is read from a disk?

    python tests/benchmarks/remote.py --out /tmp/remote

Makes a cache of made-up targets in a folder, copies it to SeaweedFS on this machine, and reads all images in a shuffled
order with loader workers, as a training does, from the folder and from the server by turns. A step of the training is
simulated by waiting.
"""

import json
import multiprocessing
import shutil
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import obstore
import torch
from torch.utils.data import DataLoader, Dataset

from kdpipe.cache import CacheSpec, CacheWriter, ImageInfo, TeacherCache, TeacherRecord, open_cache
from kdpipe.cache.plan import level_shapes
from kdpipe.cache.store.bucket import Bucket
from kdpipe.cache.store.location import Location, open_location

SIZE = (800, 1067)
OBJECTS = 8  # annotated per image
RECORDS = 4  # different ones, by turns
URL = "s3://bench/cache.zarr"
KEYS = {"access_key_id": "bench", "secret_access_key": "bench-bench"}


class Targets(Dataset[float]):
    """Reads what a training would read of an image."""

    def __init__(self, cache: TeacherCache, fields: tuple[str, ...]) -> None:
        self.cache, self.fields = cache, fields

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> float:
        targets = self.cache.targets(int(self.cache.image_ids[index]), fields=self.fields)
        return float(targets.boxes[0, 0])


def make_cache(place: Location, tier: str, count: int, part_size: int) -> CacheSpec:
    """Targets of a Faster R-CNN R50-FPN with 80 classes at 800 pixels; features compress as those of a trained one."""
    values: dict[str, Any] = {
        **{"tier": tier, "dtype": "int8", "codec": "zstd", "class_names": tuple(map(str, range(80)))},
        **{"category_ids": tuple(range(80)), "channels": 256, "strides": (4, 8, 16, 32, 64), "roi_levels": 4},
        **{"finest_scale": 56, "roi_size": 7, "roi_sampling_ratio": 0, "roi_aligned": True, "embedding_dim": 1024},
        **{"box_means": (0.0,) * 4, "box_stds": (0.1, 0.1, 0.2, 0.2), "class_agnostic": False},
        **{"proposals": 256, "views": ("identity",), "scale": (max(SIZE), min(SIZE))},
    }
    spec = CacheSpec(**values)
    images = [ImageInfo(n, f"{n:06d}.jpg", *SIZE, OBJECTS) for n in range(count)]
    generator = torch.Generator().manual_seed(0)

    def peaked(*shape: int) -> torch.Tensor:
        uniform = torch.rand(shape, generator=generator).sub_(0.5)
        return (uniform.abs() * 2).clamp_(max=1 - 1e-6).neg_().log1p_().neg_().pow_(1.85).mul_(uniform.sign())

    rows = spec.proposals + OBJECTS
    records: list[dict[str, Any]] = []
    for _ in range(RECORDS):
        corners = torch.rand(rows, 2, generator=generator) * 500
        boxes = torch.cat([corners, corners + 100], dim=1)
        near = boxes[spec.proposals :].repeat(5, 1)  # positive boxes
        boxes[: len(near)] = near + torch.rand(near.shape, generator=generator) * 10
        record: dict[str, Any] = {"boxes": boxes, "logits": peaked(rows, 81), "deltas": peaked(rows, 80, 4)}
        record["embeddings"] = peaked(rows, 1024).clamp_(min=0)
        if tier == "pyramid":
            record["features"] = [peaked(256, *shape) for shape in level_shapes(SIZE, spec.strides)]
        else:
            record["roi_features"] = peaked(rows, 256, 7, 7)
        records.append(record)
    writer = CacheWriter(place, spec, images, part_size, {}, {})
    for index in writer.pending():
        with writer.part(index) as part:
            for position in writer.parts[index]:
                image = images[position]
                part.add(
                    TeacherRecord(
                        image_id=image.image_id,
                        view="identity",
                        file_name=image.file_name,
                        original_size=SIZE,
                        input_size=SIZE,
                        num_proposals=spec.proposals,
                        gt_labels=torch.zeros(OBJECTS, dtype=torch.int64),
                        **records[position % RECORDS],
                    )
                )
    return spec


def free_port() -> int:
    """SeaweedFS also takes the port 10,000 above."""
    while True:
        with socket.socket() as free, socket.socket() as above:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
            with suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 10_000))
                return port


class Server:
    """SeaweedFS on 127.0.0.1, in a folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        credentials = {"accessKey": KEYS["access_key_id"], "secretKey": KEYS["secret_access_key"]}
        identity = {"name": "bench", "credentials": [credentials], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.port = free_port()
        command = [str(Path(sys.executable).with_name("weed")), "mini", "-dir=.", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false", f"-s3.port={self.port}"]
        command += [f"-{name}.port={free_port()}" for name in ("master", "volume", "filer")]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.config=s3.json", "-bucket=bench"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        while not self._is_ready():
            if self._process.poll() is not None:
                raise click.ClickException(f"SeaweedFS did not start: {folder / 'log'}")
            time.sleep(0.2)

    def _is_ready(self) -> bool:
        try:
            Bucket(URL, {**KEYS, "endpoint": f"http://127.0.0.1:{self.port}", "patience": "0"}).is_absent()
        except Exception:
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def epoch(loader: "DataLoader[float]", step: float) -> float:
    """Seconds of an epoch whose steps take at least so many seconds each."""
    start = time.perf_counter()
    for _ in loader:
        time.sleep(step)
    return time.perf_counter() - start


def one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for caches; removed at the end.")
@click.option("--tier", type=click.Choice(["objects", "pyramid"]), default="objects", show_default=True)
@click.option("--images", default=256, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--steps", default="0,50,100,200", show_default=True, help="Milliseconds per step, one epoch each.")
@click.option("--epochs", default=3, show_default=True, help="Of each; the median counts.")
def main(out: Path, tier: str, images: int, batch: int, workers: int, steps: str, epochs: int) -> None:
    """Print seconds per epoch from the folder and from the server, and their ratio."""
    server = Server(out / "server")
    try:
        folder = out / "cache.zarr"
        make_cache(open_location(folder), tier, images, 256 << 20)
        bucket = Bucket(URL, {**KEYS, "endpoint": f"http://127.0.0.1:{server.port}"})
        start, files = time.perf_counter(), [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            obstore.put(bucket._client.open(), file.relative_to(folder).as_posix(), file, use_multipart=False)
        size = sum(file.stat().st_size for file in files)
        print(f"{tier}: {images} images, {size / images / 1e6:.2f} MB each, {len(files)} files, ", end="")
        print(f"uploaded one by one in {time.perf_counter() - start:.1f} s; {workers} workers, batch {batch}")
        fields = ("boxes", "logits", "deltas", "embeddings") + (
            ("features",) if tier == "pyramid" else ("roi_features",)
        )
        loaders = {
            name: DataLoader(
                Targets(open_cache(place), fields),
                batch_size=batch,
                shuffle=True,
                num_workers=workers,
                persistent_workers=True,
                worker_init_fn=one_thread,
                multiprocessing_context=multiprocessing.get_context("forkserver"),
            )
            for name, place in (("disk", open_location(folder)), ("server", bucket))
        }
        for name, loader in loaders.items():
            print(f"first epoch, {name}: {epoch(loader, 0):.2f} s")
        print(f"{'step, ms':>10} {'disk, s':>10} {'server, s':>10} {'ratio':>6}")
        for step in map(float, steps.split(",")):
            times = {
                name: statistics.median(epoch(loader, step / 1000) for _ in range(epochs))
                for name, loader in loaders.items()
            }
            print(f"{step:10.0f} {times['disk']:10.2f} {times['server']:10.2f} {times['server'] / times['disk']:6.2f}")
        del loaders
    finally:
        server.stop()
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
