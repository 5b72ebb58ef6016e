"""What this machine has."""

import os

__all__ = ["cores", "shared_memory"]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def shared_memory() -> int | None:
    """Bytes of /dev/shm; None where there is none."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return None
    return space.f_frsize * space.f_blocks
