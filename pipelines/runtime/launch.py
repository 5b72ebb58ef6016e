"""How this process was started: alone, by torchrun, or by Slurm's srun. Nothing heavy is imported here."""

import functools
import os
import re
import subprocess
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from kdpipe.cache.errors import KdpipeError

__all__ = ["Launch", "LaunchError", "ToldError", "find_launch", "is_first", "trained_together"]


class LaunchError(KdpipeError):
    """The variables of torchrun or Slurm do not say what they should, or the other processes did not come."""


class ToldError(KdpipeError):
    """The run failed, and another of its processes has told the user why."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of its run.

    Attributes:
        rank: Number of this process; the first, 0, speaks for the run.
        size: Number of processes.
        host, port: Where they meet; empty and 0 for one process alone.
        variables: What says so in the environment, to be named in messages.
        is_hosted: Whether torchrun keeps the meeting place, which then outlives every process.
        attempt: How often torchrun has started these processes before.
    """

    rank: int = 0
    size: int = 1
    host: str = ""
    port: int = 0
    variables: tuple[str, ...] = ()
    is_hosted: bool = False
    attempt: str = "0"

    @property
    def alone_advice(self) -> str:
        """What to do where one process was started with the variables of several."""
        return _advice(self.variables)


def is_first() -> bool:
    """Whether this is the process that speaks for its run; one that cannot find out speaks."""
    try:
        return _place(os.environ)[0] == 0
    except LaunchError:
        return True


def find_launch(environment: MutableMapping[str, str]) -> Launch:
    """Read the variables of torchrun, or else those of srun; for commands whose processes work together.

    Args:
        environment: Where srun started this process, torchrun's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
            MASTER_PORT are set in it, as torch and mmengine read them.

    Raises:
        LaunchError: A variable is missing or makes no sense, or the first of several nodes cannot be found out.
    """
    rank, size, variables = _place(environment)
    if size == 1:
        return Launch(variables=variables)
    if "RANK" not in variables:
        # Jobs that share a node must not share the port. Names and defaults are mmengine's.
        job = environment.get("SLURM_JOB_ID", "9500")
        port = 20_000 + (int(job) if job.isdecimal() else zlib.crc32(job.encode())) % 10_000
        if not environment.get("MASTER_ADDR"):
            environment["MASTER_ADDR"] = _first_node(environment)
        if not environment.get("MASTER_PORT"):
            environment["MASTER_PORT"] = str(port)
        environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
        environment["RANK"], environment["WORLD_SIZE"] = str(rank), str(size)
    if not environment.get("LOCAL_RANK"):
        environment["LOCAL_RANK"] = "0"  # Kubernetes: one process on each machine
    _number(environment, "LOCAL_RANK", 0)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise LaunchError(f"WORLD_SIZE is {size}, and {name!r} is not set. {_advice(variables)}")
    return Launch(
        rank,
        size,
        host=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT", 1, 65_535),
        variables=variables,
        is_hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _place(environment: Mapping[str, str]) -> tuple[int, int, tuple[str, ...]]:
    """Number of this process, of all, and the variables that say so."""
    if environment.get("RANK") or not environment.get("SLURM_PROCID"):
        return _torch_place(environment)
    if environment.get("SLURM_JOB_ID") and not environment.get("SLURM_STEP_ID"):
        return 0, 1, ()  # the script of sbatch: one process, whatever SLURM_NTASKS says; srun sets SLURM_STEP_ID, too
    # of the step, where Slurm tells it apart from the job: a shell within a job is one process
    name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    size = _tasks(environment, name)
    if size == 1:
        return 0, 1, ()
    return _number(environment, "SLURM_PROCID", 0, size - 1, name), size, ("SLURM_PROCID", name)


def _torch_place(environment: Mapping[str, str]) -> tuple[int, int, tuple[str, ...]]:
    variables = tuple(name for name in ("RANK", "WORLD_SIZE") if environment.get(name))
    size = _number(environment, "WORLD_SIZE", 1) if "WORLD_SIZE" in variables else 1
    if size > 1 and "RANK" not in variables:
        raise LaunchError(f"WORLD_SIZE is {size}, and 'RANK' is not set. {_advice(variables)}")
    rank = _number(environment, "RANK", 0, size - 1, "WORLD_SIZE") if "RANK" in variables else 0
    return rank, size, variables


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None, other: str = "") -> int:
    """A variable as a whole number from `least` to `most`, which is one less than the variable `other` says."""
    text = environment[name].strip()
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= (int(text) if most is None else most):
        return int(text)
    bound = "" if most is None else f" to {most}"
    why = f", since {other} is {environment.get(other) or 'not set'}" if other else ""
    raise LaunchError(
        f"The environment variable {name} is {environment[name]!r}; expected is a whole number from {least}{bound}"
        f"{why}. {_advice((name, other) if environment.get(other) else (name,))}"
    )


def _tasks(environment: Mapping[str, str], name: str) -> int:
    """A number of tasks; also in Slurm's notation per node, `4(x2),1` for 4, 4 and 1."""
    text = environment.get(name, "1").replace(" ", "") or "1"
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text):
        raise LaunchError(
            f"The environment variable {name} is {environment[name]!r}; expected is a number of tasks. "
            f"{_advice((name, 'SLURM_PROCID'))}"
        )
    counts = [entry.rstrip(")").split("(x") for entry in text.split(",")]
    return max(1, sum(int(count) * int(times[0] if times else 1) for count, *times in counts))


def _advice(names: tuple[str, ...]) -> str:
    return f"Start several processes with torchrun or srun; for one process alone, unset {' and '.join(names)}."


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST") or "localhost"
    if "," not in nodes and "[" not in nodes:
        return nodes
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise LaunchError(
            f"The first node of {nodes} cannot be found out (scontrol show hostnames: {error}). Set MASTER_ADDR to it."
        ) from error


def trained_together(command: Callable[..., Any]) -> Callable[..., Any]:
    """For commands that train: where several processes were started, they meet before it begins, and end together."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> Any:
        launch = find_launch(os.environ)
        if launch.size == 1:
            return command(*args, **options)
        from kdpipe.pipelines.runtime.training_ranks import TrainingRanks

        with TrainingRanks(launch):
            return command(*args, **options)

    return run
