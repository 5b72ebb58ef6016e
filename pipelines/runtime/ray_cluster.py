"""A Ray cluster: how a command reaches it, and what its nodes have. Nothing heavy is imported here."""

import logging
import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from kdpipe.cache.errors import KdpipeError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Nodes", "own_versions", "ray_cluster", "version_faults"]

_LONG_PATH = 40  # of a temporary folder, in which Ray's sockets have names of at most 107 characters
_STORE_BYTES = 128 << 20  # of Ray's object store on this machine, which holds counts


def own_versions() -> dict[str, str]:
    """What has to be the same on all machines."""
    versions_found = {}
    for name in ("kdpipe", "torch"):
        try:
            versions_found[name] = version(name)
        except PackageNotFoundError:
            versions_found[name] = "none"
    return versions_found


def version_faults(versions: dict[str, str]) -> list[str]:
    """How this machine differs from the one where a run was started.

    Args:
        versions: As `own_versions` gives them there.
    """
    return [f"{name} {own}, not {versions[name]}" for name, own in own_versions().items() if own != versions[name]]


class Nodes:
    """The nodes of a cluster, as far as tasks may run on them.

    Args:
        ray: The module, connected.
        cpus: Of a task; None is one.
        gpus: Of a task; None is one where the cluster has any.
        console: Told where tasks have to wait for a node.

    Attributes:
        cpus: Of a task.
        gpus: Of a task.
    """

    def __init__(self, ray: Any, cpus: float | None, gpus: float | None, console: "Console") -> None:
        self._ray, self._console = ray, console
        self.cpus = 1.0 if cpus is None else cpus
        self.gpus = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
        self._needs = {"CPU": self.cpus, "GPU": self.gpus}
        self._is_told = False

    def slots(self) -> int:
        """How many tasks can run at once."""
        slots = sum(self._slots_of(node) for node in self._alive())
        if not slots and not self._is_told:
            self._console.print(f"No node has {self.cpus:g} CPUs and {self.gpus:g} GPUs: waiting for one.")
        self._is_told = not slots
        return slots

    def _slots_of(self, node: dict[str, Any]) -> int:
        fits: list[int] = [
            math.floor(node["Resources"].get(name, 0) / need) for name, need in self._needs.items() if need
        ]
        return min(fits)

    def _alive(self) -> list[dict[str, Any]]:
        return [node for node in self._ray.nodes() if node["Alive"]]

    def check(self, look: Callable[[Any, dict[str, str]], list[str]], what: Any, *, verb: str, needs: str) -> None:
        """Ask each node that tasks may run on why it cannot take part.

        Args:
            look: Is run there with `what` and the versions of this machine, and says why; empty where it can.
            what: Of the tasks.
            verb: What nodes are to do, for a message.
            needs: What it needs beside the same versions, for a message.

        Raises:
            KdpipeError: Some cannot, for the reasons that are named.
        """
        asked, lines = {}, []
        for node in self._alive():
            if self._slots_of(node):
                strategies = self._ray.util.scheduling_strategies
                here = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                remote = self._ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=here)(look)
                asked[remote.remote(what, own_versions())] = node
        for task, node in asked.items():
            try:
                problems = self._ray.get(task)
            except self._ray.exceptions.RayError as error:  # without kdpipe, it cannot even be asked
                if node["NodeID"] not in {each["NodeID"] for each in self._alive()}:
                    continue
                problems = [(str(getattr(error, "cause", error)).strip().splitlines() or ["no answer"])[-1]]
            if problems:
                place = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                lines.append(f"\n  {place}: {'; '.join(problems)}")
        if lines:
            raise KdpipeError(
                f"{len(lines)} of {len(asked)} nodes of the cluster cannot {verb}:{''.join(lines)}\nEach needs the "
                f"same kdpipe and torch, and {needs}."
            )


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
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
