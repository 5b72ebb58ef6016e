"""What can go wrong while a training runs, told as what to do about it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch

from kdpipe.cache.errors import KdpipeError

__all__ = ["training_faults"]


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
            f"{torch.hub.get_dir()}/checkpoints, or start from scratch: -o model.backbone.init_cfg=None"
        ) from error
    except torch.OutOfMemoryError as error:
        raise KdpipeError(
            f"The device has too little memory: {str(error).splitlines()[0]}\n"
            "Make steps smaller (--batch-size, --scale, --amp), and go on with --resume where an epoch was finished."
        ) from error
    except RuntimeError as error:
        if runner.iter > first_step:
            raise
        raise KdpipeError(
            f"The first training step failed: {str(error).strip()}\nDo the layers of the config fit each other "
            "(channels of backbone, neck and heads, levels, strides)? kdpipe --debug shows where it happened."
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise KdpipeError(
            f"The disk or quota of {work_dir} is full ({error.strerror}). What was saved before is intact: free space "
            "and go on with --resume, or begin anew where nothing was saved yet."
        ) from error
