"""Who deals the parts of a cache, and what it costs: one process, two shards, torchrun, srun and Ray.

    python tests/benchmarks/machines.py

A small Faster R-CNN with random weights sees drawn pictures; each process has one thread. Every engine makes the same
cache, by turns, round after round. The pace is that between the first and the last tenth of the parts, by the times of
their records: what it takes to start and to load the teacher is told apart from it. Srun needs Slurm's programs and the
script that starts two nodes on this machine (`--slurm`); where these are not there it is left out, which is said.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import click
import torch
from rich.console import Console

from kdpipe.pipelines.demo.drawing import CLASS_NAMES, draw_shapes
from kdpipe.pipelines.detectors.configs import find_config, set_num_classes

ROOT = Path(__file__).resolve().parents[2]
KDPIPE = [sys.executable, "-m", "kdpipe.pipelines.cli"]
WIDTH, HEIGHT = 320, 240
ENGINES = ("one process", "two shards", "torchrun", "ray", "srun")


@dataclass(frozen=True)
class Run:
    """How an engine made the cache: parts per second, and seconds until the first part and in all."""

    pace: float
    first: float
    total: float


def teacher(path: Path) -> Path:
    """A checkpoint of an untrained detector, which takes some ten milliseconds for a picture."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    config = find_config("faster-rcnn_r50_fpn_1x_coco")
    config.model.backbone.update(depth=18, base_channels=32, frozen_stages=-1, init_cfg=None)
    config.model.neck.in_channels = [32, 64, 128, 256]
    set_num_classes(config.model, len(CLASS_NAMES))
    model = MODELS.build(config.model)
    meta = {"cfg": config.pretty_text, "dataset_meta": {"classes": CLASS_NAMES}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, path)
    return path


def processes(commands: list[list[str]], folder: Path, **env: str) -> None:
    """Run commands at once, each with one thread, and wait for all."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **env}
    started = [subprocess.Popen(command, cwd=folder, env=own, stdout=subprocess.DEVNULL) for command in commands]
    codes = [process.wait() for process in started]
    if any(codes):
        raise click.ClickException(f"{commands[0]} ended with {codes}")


def measured(start: Callable[[], None], cache: Path) -> Run:
    """Let an engine make the cache anew."""
    shutil.rmtree(cache, ignore_errors=True)
    begin = time.time()
    start()
    total = time.time() - begin
    times = sorted(record.stat().st_mtime for record in (cache / "parts").glob("*/zarr.json"))
    tenth = len(times) // 10
    inner = times[tenth : len(times) - tenth]
    return Run((len(inner) - 1) / (inner[-1] - inner[0]), times[0] - begin, total)


def digest(cache: Path) -> str:
    """Of all parts."""
    names = sorted(file for file in (cache / "parts").rglob("*") if file.is_file())
    return sha256(b"".join(sha256(file.read_bytes()).digest() for file in names)).hexdigest()


@contextmanager
def slurm(tool: Path, folder: Path) -> Iterator[dict[str, str] | None]:
    """The environment of a Slurm of two nodes; None where there is none."""
    if not tool.is_file() or not all(map(shutil.which, ("slurmctld", "slurmd", "srun", "munged"))):
        yield None
        return
    said = subprocess.run(["bash", str(tool), "start", str(folder)], check=True, capture_output=True, text=True).stdout
    try:
        yield {"SLURM_CONF": said.split("SLURM_CONF=")[1].strip()}
    finally:
        subprocess.run(["bash", str(tool), "stop", str(folder)], check=True, capture_output=True)


@click.command()
@click.option("--images", default=600, show_default=True, help="Drawn pictures; five go into a part.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(ENGINES), help="These engines, beside two shards.")
@click.option("--slurm", "tool", type=Path, default=ROOT.parent / "shared" / "tools" / "slurm.sh", help="See above.")
def main(images: int, rounds: int, only: Sequence[str], tool: Path) -> None:
    """Print a table, in Markdown."""
    with tempfile.TemporaryDirectory(prefix="kdpipe-machines-") as name, slurm(tool, Path(name) / "slurm") as env:
        folder = Path(name)
        data = folder / "shapes"
        draw_shapes(data, train=images, val=1, size=(HEIGHT, WIDTH))
        cache = folder / "x.zarr"
        source = ["--ckpt", str(teacher(folder / "teacher.pth")), "--img-dir", str(data / "train")]
        source += ["--ann-file", str(data / "annotations" / "train.json"), "--scale", f"{WIDTH}x{HEIGHT}"]
        command = ["cache-teacher", *source, "--proposals", "100", "--part-size", "9MiB", "--out", str(cache)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
        engines: dict[str, Callable[[], None]] = {
            "one process": lambda: processes([[*KDPIPE, *command]], folder),
            "two shards": lambda: processes([[*KDPIPE, *command, "--shard", f"{i}/2"] for i in range(2)], folder),
            "torchrun": lambda: processes([[*torchrun, KDPIPE[-1], *command]], folder),
            "ray": lambda: processes([[*KDPIPE, *command, "--ray", "local"]], folder),
        }
        if env is not None:
            engines["srun"] = lambda: processes([["srun", "-n2", *KDPIPE, *command]], folder, **env)
        else:
            click.echo(f"Without srun: it needs Slurm's programs, and {tool}.")
        if only:
            engines = {name: start for name, start in engines.items() if name in {"two shards", *only}}
        runs: dict[str, list[Run]] = {engine: [] for engine in engines}
        contents = set()
        for _ in range(rounds):
            for engine, start in engines.items():
                runs[engine].append(measured(start, cache))
                contents.add(digest(cache))
        parts = len(list((cache / "parts").glob("*/zarr.json")))
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"{images} images in {parts} parts, {rounds} rounds; all caches are equal: {len(contents) == 1}\n")
    console.print(
        "| | parts/s, median (all rounds) | of two shards | seconds to the first part | in all |\n|---|---|---|---|---|"
    )
    base = statistics.median(run.pace for run in runs["two shards"])
    for engine, found in runs.items():
        paces = [run.pace for run in found]
        first, total = (statistics.median(getattr(run, part) for run in found) for part in ("first", "total"))
        each = ", ".join(f"{pace:.2f}" for pace in paces)
        pace = statistics.median(paces)
        console.print(
            f"| {engine} | {pace:.2f} ({each}) | {pace / base:.3f} | {first:.1f} | {total:.1f} |", markup=False
        )


if __name__ == "__main__":
    main()
