"""Deals the parts of a cache to the machines of a Ray cluster, one task per part."""

import logging
import math
import os
import signal
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.store.location import Location
from kdpipe.pipelines.commands.options import RayOptions
from kdpipe.pipelines.commands.ray_tasks import PartJob, make_part, node_faults, own_versions
from kdpipe.pipelines.data.find import DataSource
from kdpipe.pipelines.data.options import DataOptions
from kdpipe.pipelines.runtime.console import ProgressBar, bytes_text
from kdpipe.pipelines.teacher.options import CacheOptions
from kdpipe.pipelines.teacher.parts import PartMaker

__all__ = ["deal_parts", "part_job"]

_WAITING = 2  # tasks that wait, per task that can run
_ATTEMPTS = 3
_POLL_SECONDS, _LOOK_SECONDS = 0.5, 5.0
_LONG_PATH = 40  # of a temporary folder, in which Ray's sockets have names of at most 107 characters
_STORE_BYTES = 128 << 20  # of Ray's object store on this machine, which holds counts


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
    with _cluster(options.address or "auto") as ray:
        gpus = float("GPU" in ray.cluster_resources()) if options.gpus is None else options.gpus
        cpus = 1.0 if options.cpus is None else options.cpus
        return _Deal(ray, maker, job.to_json(), cpus, gpus, console).run()


class _Deal:
    """The parts of one run, each of which is waiting, being made, or done."""

    def __init__(self, ray: Any, maker: PartMaker, job: str, cpus: float, gpus: float, console: Console) -> None:
        self._ray, self._writer, self._job, self._console = ray, maker.writer, job, console
        self._cpus, self._gpus = cpus, gpus
        # Ray by itself ends a worker with a GPU after each task, and with it the teacher that it loaded.
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=0, max_retries=0)
        self._make = remote(make_part)
        self._todo = deque(maker.missing)
        self._tasks: dict[Any, int] = {}
        self._lost: Counter[int] = Counter()
        self._slots_before = 1
        self.images = self.bytes = 0

    def run(self) -> int:
        """Returns how many images were added."""
        images = sum(map(len, self._writer.parts))
        todo = sum(len(self._writer.parts[index]) for index in self._todo)
        if todo < images:
            self._console.print(f"{images - todo} of {images} images are cached already")
        self._check_nodes()
        done, start, look, slots = 0, time.monotonic(), 0.0, 0
        with ProgressBar(self._console, "cache teacher", todo) as progress:
            while self._todo or self._tasks:
                if time.monotonic() >= look:
                    slots, look = self._slots(), time.monotonic() + _LOOK_SECONDS
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
        what, reason = "worker", (str(error).strip().splitlines() or [type(error).__name__])[0]
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

    def _slots(self) -> int:
        """How many tasks can run at once."""
        slots = sum(self._slots_of(node) for node in self._nodes())
        if not slots and self._slots_before:
            self._console.print(f"No node has {self._cpus:g} CPUs and {self._gpus:g} GPUs: waiting for one.")
        self._slots_before = slots
        return slots

    def _slots_of(self, node: dict[str, Any]) -> int:
        needs = {"CPU": self._cpus, "GPU": self._gpus}
        fits: int = min(math.floor(node["Resources"].get(name, 0) / need) for name, need in needs.items() if need)
        return fits

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def _check_nodes(self) -> None:
        """Ask each node that tasks may run on whether it can make parts.

        Raises:
            KdpipeError: Some cannot, for the reasons that are named.
        """
        asked = {}
        for node in self._nodes():
            if self._slots_of(node):
                strategies = self._ray.util.scheduling_strategies
                here = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(node_faults)
                asked[remote.remote(self._job, own_versions())] = node
        faults = []
        for task, node in asked.items():
            try:
                problems = self._ray.get(task)
            except self._ray.exceptions.RayError as error:  # without kdpipe, it cannot even be asked
                if node["NodeID"] not in {each["NodeID"] for each in self._nodes()}:
                    continue
                problems = [(str(getattr(error, "cause", error)).strip().splitlines() or ["no answer"])[-1]]
            if problems:
                faults.append(
                    f"\n  {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {'; '.join(problems)}"
                )
        if faults:
            raise KdpipeError(
                f"{len(faults)} of {len(asked)} nodes of the cluster cannot make parts:{''.join(faults)}\nEach needs "
                "the same kdpipe and torch, and checkpoint, images and cache under the same paths (a shared disk, or "
                "an object store for the cache)."
            )


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


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected to a cluster; `local` starts one on this machine, which ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {}
    if address == "local":
        options = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}
        if len(tempfile.gettempdir()) > _LONG_PATH:
            options["_temp_dir"] = "/tmp/ray"
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # as there: all of it listens on 127.0.0.1 only
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: all else on the machine would go first
    try:
        import ray  # reads these variables
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise KdpipeError(f"--ray needs Ray, which cannot be imported ({error}): pip install 'kdpipe[ray]'.") from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise KdpipeError(
            f"There is no Ray cluster at {address}: {reason}\nStart one (ray start --head), run this "
            "by `ray job submit`, or use --ray local."
        ) from error
    finally:
        for number, handler in handlers.items():  # Ray puts its own in their place
            signal.signal(number, handler)
    try:
        yield ray
    finally:
        ray.shutdown()
