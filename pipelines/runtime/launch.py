"""Which of several processes this one is, as its environment says. Nothing heavy is imported here."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kdpipe.cache.errors import KdpipeError

__all__ = ["LaunchError", "Rank", "check_alone", "doubts", "find_rank", "find_shard", "is_first"]


class LaunchError(KdpipeError):
    """The variables of torchrun, Slurm or Kubernetes do not say what they should, or other processes did not come."""


@dataclass(frozen=True)
class Rank:
    """Number of a process among those that were started together.

    Attributes:
        index: From 0 to `count` - 1.
        count: Number of processes.
        variables: What says so, to be named in messages.
    """

    index: int = 0
    count: int = 1
    variables: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def source(self) -> str:
        """The variables as words."""
        return " and ".join(self.variables)


def find_shard(environment: Mapping[str, str], given: tuple[int | None, int] | None = None) -> Rank:
    """The shard of a cache that is this process's.

    Args:
        environment: Of torchrun, srun, and of a job array around them, whose tasks each have so many shards.
        given: `--shard`: index and count. Without the index it is that of an indexed Kubernetes job.

    Raises:
        LaunchError: A variable is missing or makes no sense.
    """
    if given is None:
        outer = _array_task(environment)
    elif given[0] is not None:
        return Rank(given[0], given[1], ("--shard",))
    else:
        if not environment.get("JOB_COMPLETION_INDEX"):
            raise LaunchError(
                f"--shard /{given[1]} takes the number of this pod from JOB_COMPLETION_INDEX, which Kubernetes sets in "
                "a job with completionMode: Indexed, and it is not set. Elsewhere give the number: "
                f"--shard 0/{given[1]}, from 0 to {given[1] - 1}."
            )
        index = _number(environment, "JOB_COMPLETION_INDEX", 0, given[1] - 1, f"--shard says {given[1]}")
        outer = Rank(index, given[1], ("JOB_COMPLETION_INDEX",))
    inner = find_rank(environment)
    return Rank(outer.index * inner.count + inner.index, outer.count * inner.count, outer.variables + inner.variables)


def find_rank(environment: Mapping[str, str]) -> Rank:
    """The rank among processes of one torchrun, or of one step of Slurm (srun); the only one where there is neither.

    Raises:
        LaunchError: A variable is missing or makes no sense.
    """
    if not environment.get("RANK") and environment.get("SLURM_PROCID"):
        return _task_of_step(environment)
    if not environment.get("WORLD_SIZE"):
        return Rank()
    count = _number(environment, "WORLD_SIZE", 1)
    if count == 1:
        return Rank()
    if not environment.get("RANK"):
        raise LaunchError(f"WORLD_SIZE is {count}, and RANK is not set. {_advice('WORLD_SIZE')}")
    return Rank(_number(environment, "RANK", 0, count - 1, f"WORLD_SIZE is {count}"), count, ("RANK", "WORLD_SIZE"))


def is_first() -> bool:
    """Whether this is the first process of its torchrun or step; one that cannot find out says yes."""
    try:
        return find_rank(os.environ).index == 0
    except LaunchError:
        return True


def check_alone(environment: Mapping[str, str], subject: str) -> None:
    """Refuse to be one of several processes of a torchrun or a step of Slurm.

    Args:
        environment: Of this process.
        subject: What runs in one process, as a message begins.

    Raises:
        LaunchError: It is.
    """
    rank = find_rank(environment)
    if rank.count > 1:
        raise LaunchError(
            f"{subject} runs in one process, and this is one of {rank.count}. Start it without torchrun and srun; "
            f"where it is alone, unset {rank.source}."
        )


def doubts(rank: Rank, environment: Mapping[str, str], *, is_interactive: bool) -> list[str]:
    """What looks as if a process was started alone, where there should be several, or the other way round.

    Args:
        rank: As `find_shard` gives it.
        environment: That it was found in.
        is_interactive: Somebody can type at this process, as in a shell.
    """
    is_certain = "--shard" in rank.variables or environment.get("TORCHELASTIC_RUN_ID")  # torchrun's own
    if rank.count > 1 and not is_certain and (is_interactive or "RANK" in rank.variables):
        return [f"If no other process was started (a shell in a job or container), unset {rank.source}."]
    if rank.variables:
        return []
    if environment.get("JOB_COMPLETION_INDEX"):
        return ["JOB_COMPLETION_INDEX is set: without --shard /COMPLETIONS each pod of this job makes the whole cache."]
    is_script = environment.get("SLURM_PROCID") and not environment.get("SLURM_STEP_ID")
    if is_script and environment.get("SLURM_NTASKS", "1").isdecimal() and int(environment["SLURM_NTASKS"]) > 1:
        tasks = environment["SLURM_NTASKS"]
        return [f"This job has {tasks} tasks, and this is one process: start it by srun to use them."]
    return []


def _task_of_step(environment: Mapping[str, str]) -> Rank:
    if not environment.get("SLURM_STEP_ID"):
        return Rank()  # the script of sbatch: one process, whatever SLURM_NTASKS says
    # of the step, where Slurm tells it apart from the job: a shell within a job is one process
    name = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    count = _number(environment, name, 1) if environment.get(name) else 1
    if count == 1:
        return Rank()
    return Rank(_number(environment, "SLURM_PROCID", 0, count - 1, f"{name} is {count}"), count, ("SLURM_PROCID", name))


def _array_task(environment: Mapping[str, str]) -> Rank:
    if not environment.get("SLURM_ARRAY_TASK_ID"):
        return Rank()
    first, step, count = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}", least)
        if environment.get(f"SLURM_ARRAY_TASK_{name}")
        else other
        for name, least, other in (("MIN", 0, 0), ("STEP", 1, 1), ("COUNT", 1, 1))
    )
    index, rest = divmod(_number(environment, "SLURM_ARRAY_TASK_ID", 0) - first, step)
    if rest or not 0 <= index < count:
        raise LaunchError(
            f"SLURM_ARRAY_TASK_ID is {environment['SLURM_ARRAY_TASK_ID']} in an array of {count} tasks from {first} in "
            f"steps of {step}: the numbers of the array have gaps. Submit it as --array=0-{count - 1}, or give --shard."
        )
    if count == 1:
        return Rank()
    return Rank(index, count, ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"))


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None, why: str = "") -> int:
    """A variable as a whole number from `least` to `most`; `why` says where the bound comes from."""
    text = environment[name].strip()
    if re.fullmatch("[0-9]{1,9}", text) and least <= int(text) <= (int(text) if most is None else most):
        return int(text)
    bound = "" if most is None else f" to {most}, since {why}"
    raise LaunchError(
        f"The environment variable {name} is {environment[name]!r}; expected is a whole number from {least}{bound}. "
        f"{_advice(name)}"
    )


def _advice(name: str) -> str:
    return f"torchrun, Slurm or Kubernetes sets it; for one process alone, unset {name}."
