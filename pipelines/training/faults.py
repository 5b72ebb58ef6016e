"""What can go wrong while a training runs, told as what to do about it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.detectors.start_weights import pretrained_options
from kdpipe.pipelines.runtime.console import bytes_text, nobody_reads
from kdpipe.pipelines.runtime.machine import shared_memory
from kdpipe.pipelines.runtime.memory import memory_shortage
from kdpipe.pipelines.training.process_group import lost_others

__all__ = ["training_faults"]

_GO_ON = "What was saved is good: go on with --resume, or begin anew where no epoch was finished yet."
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")
_DEAD_WORKER = (
    "A loader worker{} was killed, most likely because the machine's memory ran out. Use fewer --workers (0 reads "
    f"images in the training process) or a smaller --batch-size. {_GO_ON}"
)
_SHARED_MEMORY = re.compile(
    r"Bus error|shared memory|unable to (?:write to|open|resize|mmap \d+ bytes from) file </torch_"
)
_SMALLER_STEPS = (
    "Make steps smaller: --batch-size, --scale, --amp, or fewer RoIs (-o model.train_cfg.rcnn.sampler.num=256 of a "
    "two-stage detector, -o distill.rois.num=256 of others and with --rois teacher)."
)


@contextmanager
def training_faults(runner: Any, work_dir: Path) -> Iterator[None]:
    """Turn errors of a training that are not kdpipe's into a `KdpipeError`.

    Args:
        runner: mmengine's, before its first step.
        work_dir: The work directory.
    """
    first_step = runner.iter
    try:
        yield
    except URLError as error:
        raise KdpipeError(
            f"The pretrained weights that the config names could not be downloaded ({error.reason}). Put them into "
            f"{torch.hub.get_dir()}/checkpoints, or start from scratch: "
            + " ".join(f"-o {option}" for option in pretrained_options(runner.cfg.model))
        ) from error
    except RuntimeError as error:
        if message := _machine_fault(error):
            raise KdpipeError(message) from error
        if runner.iter > first_step or lost_others(error):
            raise
        raise KdpipeError(
            f"The first training step failed: {str(error).strip()}\nDo the layers of the config fit each other "
            "(channels of backbone, neck and heads, levels, strides)? kdpipe --debug shows where it happened."
        ) from error
    except OSError as error:
        if _is_of_worker(error):
            raise KdpipeError(_DEAD_WORKER.format("")) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise KdpipeError(
            f"The disk or quota of {work_dir} is full ({error.strerror}). What was saved before is intact: free space "
            "and go on with --resume, or begin anew where nothing was saved yet."
        ) from error


def _machine_fault(error: RuntimeError) -> str:
    """What to say of an error for which the machine is too small; empty for any other."""
    text = str(error).strip()
    if (shortage := memory_shortage(error)) is not None:
        return f"There is too little memory: {shortage}\n{_SMALLER_STEPS} {_GO_ON}"
    if _SHARED_MEMORY.search(text):
        size = shared_memory()
        state = "there is no /dev/shm" if size is None else f"/dev/shm has {bytes_text(size)}"
        return (
            f"The shared memory through which loader workers hand over images is too small: {state}. Make it larger "
            f"(docker run --shm-size 8g), or read images in the training process (--workers 0). {_GO_ON}"
        )
    if match := _WORKER.search(text):
        return _DEAD_WORKER.format(f" (process {match[1]})")
    return ""


def _is_of_worker(error: OSError) -> bool:
    """Whether a socket or pipe to a loader worker broke, and not that to what reads the output."""
    if isinstance(error, BrokenPipeError) and nobody_reads():
        return False
    return isinstance(error, ConnectionError) or (isinstance(error, FileNotFoundError) and not error.filename)
