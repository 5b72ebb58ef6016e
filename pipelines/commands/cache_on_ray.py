"""Deals the parts of a cache to the machines of a Ray cluster, one task per part."""

import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.store.location import Location
from kdpipe.pipelines.commands.options import RayOptions
from kdpipe.pipelines.commands.ray_tasks import PartJob, make_part, node_faults
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text, first_line
from kdpipe.pipelines.runtime.ray_cluster import Nodes, ray_cluster
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.parts import PartMaker

__all__ = ["deal_parts", "part_job"]

_WAITING = 2  # tasks that wait, per task that can run
_ATTEMPTS = 3
_POLL_SECONDS, _LOOK_SECONDS = 0.5, 5.0


def deal_parts(maker: PartMaker, job: PartJob, options: RayOptions, console: Console) -> int:
    """Make all parts that are missing, as tasks of a cluster.

    A task whose worker or node is lost is dealt again. Stopped at any moment, the cache stays valid.

    Args:
        maker: Made ready on this machine, which makes no part; root and head of the cache are there.
        job: The same for other machines.
        options: Which cluster, and what a task needs.
        console: Where progress is shown.

    Returns:
        How many images were added.

    Raises:
        KdpipeError: There is no cluster, nodes cannot take part, an image is bad, or a part ended its worker again and
            again.
    """
    with ray_cluster(options.address or "auto") as ray:
        return _Deal(ray, maker, job.to_json(), Nodes(ray, options.cpus, options.gpus, console), console).run()


class _Deal:
    """The parts of one run, each of which is waiting, being made, or done."""

    def __init__(self, ray: Any, maker: PartMaker, job: str, nodes: Nodes, console: Console) -> None:
        self._ray, self._writer, self._job, self._nodes, self._console = ray, maker.writer, job, nodes, console
        # Ray by itself ends a worker with a GPU after each task, and with it the teacher that it loaded.
        remote = ray.remote(num_cpus=nodes.cpus, num_gpus=nodes.gpus, max_calls=0, max_retries=0)
        self._make = remote(make_part)
        self._todo = deque(maker.missing)
        self._tasks: dict[Any, int] = {}
        self._lost: Counter[int] = Counter()
        self.images = self.bytes = 0

    def run(self) -> int:
        """Returns how many images were added."""
        images = sum(map(len, self._writer.parts))
        todo = sum(len(self._writer.parts[index]) for index in self._todo)
        if todo < images:
            self._console.print(f"{images - todo} of {images} images are cached already")
        needs = "checkpoint, images and cache under the same paths (a shared disk, or an object store for the cache)"
        self._nodes.check(node_faults, self._job, verb="make parts", needs=needs)
        done, start, look, slots = 0, time.monotonic(), 0.0, 0
        with ProgressBar(self._console, "cache teacher", todo) as progress:
            while self._todo or self._tasks:
                if time.monotonic() >= look:
                    slots, look = self._nodes.slots(), time.monotonic() + _LOOK_SECONDS
                while self._todo and len(self._tasks) < max(1, slots) * (1 + _WAITING):
                    index = self._todo.popleft()
                    self._tasks[self._make.remote(self._job, index)] = index
                ready, _ = self._ray.wait(list(self._tasks), timeout=_POLL_SECONDS)
                for task in ready:
                    done += self._end(task, self._tasks.pop(task))
                seconds = time.monotonic() - start
                rate = f"{self.images / seconds:.1f} images/s {bytes_text(self.bytes / seconds)}/s"
                progress.update(done, f"{rate}, {slots} at once")
        return self.images

    def _end(self, task: Any, index: int) -> int:
        """Take what a task gives; returns how many images are done by it."""
        errors = self._ray.exceptions
        try:
            result = self._ray.get(task)
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except errors.RayError as error:
            self._deal_again(index, error)
            return 0
        if "error" in result:
            raise KdpipeError(result["error"])
        for line in result["lines"]:
            self._console.print(line)
        self.images, self.bytes = self.images + result["images"], self.bytes + result["bytes"]
        return len(self._writer.parts[index])

    def _deal_again(self, index: int, error: Exception) -> None:
        """Put a part back whose worker was lost.

        Raises:
            KdpipeError: It ended too many.
        """
        what, reason = "worker", first_line(error)
        if isinstance(error, self._ray.exceptions.NodeDiedError):
            what = "node"
        else:
            self._lost[index] += 1
        if self._lost[index] == _ATTEMPTS:
            raise KdpipeError(
                f"Part {index} ended the process that made it {_ATTEMPTS} times, most likely because memory ran out "
                f"({reason}) What is cached is valid. Let fewer tasks run at once on a node (--ray-cpus, --ray-gpus), "
                "use machines with more memory, or make it here, without --ray."
            )
        self._console.print(f"A {what} was lost while it made part {index}, which is dealt again: {reason}")
        self._todo.appendleft(index)


def part_job(
    source: DataSource,
    out: Location,
    options: CacheOptions,
    *,
    ckpt: Path,
    config: str | None,
    trust: bool,
    store_options: dict[str, str],
    device: str | None,
) -> PartJob:
    """The job of a command, whose paths may be relative to this folder.

    Args:
        source: Images and annotations.
        out: Where the cache is or will be.
        options: What is kept.
        ckpt: The teacher's checkpoint.
        config: Its config, a name of mmdet's zoo or a file; None takes the checkpoint's own.
        trust: Unpickle the checkpoint even where it holds more than weights.
        store_options: Of the object store of the cache.
        device: Where the teacher runs; None lets each worker choose.
    """
    named = source.named
    ann_file, img_dir, voc, bdd = (
        path and path.absolute() for path in (named.ann_file, named.img_dir, named.voc, named.bdd)
    )
    data = DataOptions(ann_file, img_dir, voc, named.split, bdd)
    val = source.val and (source.val[0].absolute(), source.val[1].absolute())
    limit, address = source.limit, out.address
    return PartJob(ckpt.absolute(), config, trust, data, limit, val, address, store_options, options, device)
