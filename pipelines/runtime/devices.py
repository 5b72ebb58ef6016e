"""Which devices there are, and which one a command runs on."""

import os
import re

import torch

from kdpipe.cache.errors import KdpipeError

__all__ = ["DeviceError", "describe_device", "torch_device"]


class DeviceError(KdpipeError):
    """There is no such device here."""


def torch_device(name: str | None) -> torch.device:
    """The device of `--device`.

    Args:
        name: `cpu`, `cuda:N`, or `cuda`: the GPU with this process's number on its machine. None takes that, or the CPU
            where there is no GPU. GPUs are counted from 0, those of `CUDA_VISIBLE_DEVICES` only.

    Raises:
        DeviceError: There is no such device.
        KdpipeError: It is there, and cannot be used.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name is None and not count):
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", "cuda" if name is None else name)
    number = int(match[1] or _number_here()) if match else 0
    if match and not match[1] and count:
        number %= count
    if match is None or number >= count:
        raise DeviceError(f"--device {name}: kdpipe runs on cpu, cuda and cuda:N. Here {_devices(count)}.")
    device = torch.device("cuda", number)
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:  # such as one that another process has for itself
        raise KdpipeError(f"{device} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def describe_device(device: torch.device | str) -> str:
    """A device with the name of its GPU."""
    device = torch.device(device)
    if device.type != "cuda":
        return str(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"cuda:{index} ({torch.cuda.get_device_name(index)})"


def _number_here() -> str:
    return os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"


def _devices(count: int) -> str:
    """What there is, for a message."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limit = "" if visible is None else f", as CUDA_VISIBLE_DEVICES={visible} has it"
    if not count:
        return f"is the cpu alone{limit}; kdpipe doctor says more"
    return "are " + ", ".join(["cpu", *(describe_device(f"cuda:{index}") for index in range(count))]) + limit
