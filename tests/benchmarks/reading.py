"""How fast are targets read, beside what people use instead, and who notices damage?

    python -m tests.benchmarks.reading --out /tmp/reading

Makes up targets of the size of a Faster R-CNN R50-FPN at 800 pixels, stores the same arrays in every way of stores.py,
and prints a table for whole images and RoI fields of the pyramid tier, and one for the objects tier. Every reader gives
tensors with memory of their own. What is not installed is left out; `pip install 'kdpipe[bench]'` installs all of it.
`--beside` takes the Python of an environment with another kdpipe, which then writes and reads the same records. About
2 GB are written below `--out`, and removed at the end.
"""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from tests.benchmarks import stores
from tests.benchmarks.stores import STORES, samples

CODECS = ("zstd", "lz4", "none")
# Title, worker processes, threads of each, and whether files are in the page cache.
COLUMNS = (
    ("1 thread", 1, 1, True),
    ("2 threads", 1, 2, True),
    ("2 processes", 2, 1, True),
    ("cold, 1 thread", 1, 1, False),
)
FLIPS = 20
OTHER = "another "


class Worker:
    """A process that reads, in some Python, with so many threads."""

    def __init__(self, python: str, threads: int, out: Path) -> None:
        names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "BLOSC_NTHREADS")
        self._process = subprocess.Popen(
            [python, stores.__file__, str(out)],
            env={**os.environ, **dict.fromkeys(names, str(threads))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def send(self, do: str, **order: Any) -> None:
        """Begin something."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")

    def answer(self) -> Any:
        """Wait for its end."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise click.ClickException("A worker died.")
        return json.loads(line)

    def ask(self, do: str, **order: Any) -> Any:
        """Both."""
        self.send(do, **order)
        return self.answer()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    """The stores of a tier below a folder.

    Args:
        out: folder of all stores.
        tier: of the targets.
        count: number of images.
        beside: Python of another kdpipe.
    """

    def __init__(self, out: Path, tier: str, count: int, beside: str | None) -> None:
        self.out, self.tier, self.count, self._beside = out / tier, tier, count, beside
        self._workers: dict[tuple[str, int, int], Worker] = {}
        self.out.mkdir(parents=True)
        for codec in CODECS:
            self.worker("kdpipe", 1).ask("make", folder=codec, tier=tier, codec=codec, images=count)
        self.names = []
        for name, store in STORES.items():
            if store.module is not None and importlib.util.find_spec(store.module) is None:
                click.echo(f"{name}: left out, {store.module} is not installed.")
                continue
            self.names.append(name)
            if store.write is not None:
                self.folder(name).mkdir()
                store.write(self.folder(name), samples(self.out / "none"))
            elif beside is not None and name.startswith("kdpipe"):
                self.names.append(other := OTHER + name)
                codec = name.partition("@")[2]
                self.worker(other, 1).ask("make", folder=self.folder(other).name, tier=tier, codec=codec, images=count)

    def worker(self, name: str, threads: int, number: int = 0) -> Worker:
        """A process for a store."""
        python = self._beside if name.startswith(OTHER) else None
        key = (python or sys.executable, threads, number)
        if key not in self._workers:
            self._workers[key] = Worker(key[0], threads, self.out)
        return self._workers[key]

    def folder(self, name: str) -> Path:
        """Where a store's files are."""
        codec = name.partition("@")[2] or name.replace(" ", "-")
        return self.out / (f"beside-{codec}" if name.startswith(OTHER) else codec)

    def megabytes(self, name: str) -> float:
        """On disk, per image."""
        return sum(file.stat().st_size for file in self.folder(name).rglob("*") if file.is_file()) / self.count / 1e6

    def measure(self, name: str, rois: bool, processes: int, threads: int, warm: bool) -> tuple[float, float]:
        """Milliseconds per image of the clock and of the processor; opening is not counted."""
        if not warm:
            drop_pages(self.folder(name))
        numbers = np.random.default_rng(0).permutation(self.count).tolist()
        workers = [self.worker(name, threads, number) for number in range(processes)]
        orders = [{"numbers": numbers[number::processes], "rois": rois} for number in range(processes)]
        for worker, order in zip(workers, orders, strict=True):
            worker.ask("open", store=name.removeprefix(OTHER), folder=self.folder(name).name)
            if warm:
                worker.ask("read", **order)
        for worker, order in zip(workers, orders, strict=True):
            worker.send("read", **order)
        spans = [worker.answer() for worker in workers]
        for worker in workers:
            worker.ask("close")
        wall = max(stop for _, stop, _ in spans) - min(start for start, _, _ in spans)
        return 1e3 * wall / self.count, 1e3 * sum(cpu for *_, cpu in spans) / self.count

    def table(self, rois: bool, rounds: int) -> str:
        """Medians of rounds in which all stores take turns."""
        taken: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for title, processes, threads, warm in COLUMNS:
            for _ in range(rounds):
                for name in self.names:
                    taken.setdefault((name, title), []).append(self.measure(name, rois, processes, threads, warm))
        titles = ["processor, 1 thread", *(title for title, *_ in COLUMNS)]
        lines = [f"| ms per image | MB on disk | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
        for name in self.names:
            figures = [statistics.median(cpu for _, cpu in taken[name, COLUMNS[0][0]])]
            figures += [statistics.median(wall for wall, _ in taken[name, title]) for title, *_ in COLUMNS]
            cells = " | ".join(f"{figure:.2f}" for figure in figures)
            lines.append(f"| {name} | {self.megabytes(name):.2f} | {cells} |")
        return "\n".join(lines)

    def damage(self) -> str:
        """What reading all images makes of single flipped bits in the largest file of each store."""
        lines = [f"| of {FLIPS} flipped bits | an error | wrong values | not seen | says |", "|---|---|---|---|---|"]
        for name in self.names:
            order: dict[str, Any] = {"store": name.removeprefix(OTHER), "folder": self.folder(name).name}
            order["numbers"] = list(range(self.count))
            whole = self.worker(name, 1).ask("digests", **order)
            assert isinstance(whole, list), whole
            files = [file for file in self.folder(name).rglob("*") if file.is_file()]
            largest = max(files, key=lambda file: file.stat().st_size)
            outcomes = [self._flipped(name, order, largest, (number + 0.5) / FLIPS) for number in range(FLIPS)]
            errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
            unseen = outcomes.count(whole)
            cells = f"{len(errors)} | {FLIPS - len(errors) - unseen} | {unseen}"
            lines.append(f"| {name} | {cells} | {errors[0].splitlines()[0][:80] if errors else ''} |")
        return "\n".join(lines)

    def _flipped(self, name: str, order: dict[str, Any], file: Path, share: float) -> Any:
        place = int(file.stat().st_size * share)
        with file.open("r+b") as handle:
            handle.seek(place)
            byte = handle.read(1)
            handle.seek(place)
            handle.write(bytes([byte[0] ^ 16]))
        try:
            return self.worker(name, 1).ask("digests", **order)
        finally:
            with file.open("r+b") as handle:
                handle.seek(place)
                handle.write(byte)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def drop_pages(folder: Path) -> None:
    """Write a folder's files to disk and take them out of the page cache (posix_fadvise, DONTNEED)."""
    for file in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new folder for the data.")
@click.option("--images", type=int, default=8, show_default=True)
@click.option("--rounds", type=int, default=7, show_default=True)
@click.option("--beside", help="Python of an environment with another kdpipe.")
def main(out: Path, images: int, rounds: int, beside: str | None) -> None:
    """Make the data, measure, and print the tables."""
    try:
        for tier in ("pyramid", "objects"):
            bench = Bench(out, tier, images, beside if tier == "pyramid" else None)
            try:
                click.echo(f"\nWhole images, tier {tier}.\n\n{bench.table(False, rounds)}")
                if tier == "pyramid":
                    click.echo(f"\nRoI fields.\n\n{bench.table(True, rounds)}\n\n{bench.damage()}")
            finally:
                bench.close()
    finally:
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
