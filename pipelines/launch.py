"""How this process was started: alone, by torchrun, or by Slurm's srun. Nothing heavy is imported here."""

import os
import subprocess
from collections.abc import MutableMapping

from kdpipe.cache.errors import KdpipeError

__all__ = ["ToldError", "adopt_slurm", "is_first"]


class ToldError(KdpipeError):
    """The run failed, and another of its processes has told the user why."""


def is_first() -> bool:
    """Whether this is the process that speaks for its run."""
    return os.environ.get("RANK", "0") == "0"


def adopt_slurm(environment: MutableMapping[str, str]) -> None:
    """Say in torchrun's variables what srun said in its own; mmengine's names and defaults, where it has some.

    Does nothing for a process that torchrun started, or that is alone.

    Args:
        environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set in it.

    Raises:
        KdpipeError: The first of several nodes cannot be found out.
    """
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if "RANK" in environment or "SLURM_PROCID" not in environment or tasks < 2:
        return
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
        return  # the script of sbatch: one process, whatever SLURM_NTASKS says; srun sets SLURM_STEP_ID, too
    # Jobs that share a node must not share the port.
    port = 20_000 + int(environment.get("SLURM_JOB_ID", "9500")) % 10_000
    environment.setdefault("MASTER_PORT", str(port))
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = _first_node(environment)
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["WORLD_SIZE"], environment["RANK"] = str(tasks), environment["SLURM_PROCID"]


def _first_node(environment: MutableMapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "localhost"))
    if "," not in nodes and "[" not in nodes:
        return nodes
    try:
        found = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise KdpipeError(
            f"The first node of {nodes} cannot be found out (scontrol show hostnames: {error}). Set MASTER_ADDR to it."
        ) from error
