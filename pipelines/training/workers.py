"""Loader workers: what they need, imported once in the fork server, what each does first, and how they end."""

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Iterable
from typing import Any

import cv2
import torch
from mmengine.registry import FUNCTIONS

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.machine import cores

__all__ = ["default_workers", "end_workers", "init_worker", "preload_workers"]

_JOIN_SECONDS = 10.0
_MOST_WORKERS, _MOST_FOR_GPU = 4, 8
_SHORT_FOLDERS = ("/tmp", "/var/tmp")
# The name of a socket has at most 107 bytes, of which multiprocessing adds `/pymp-01234567/listener-01234567`.
_MAX_FOLDER = 107 - 32
# Imports mmdet's data sets and all that reads an image with its targets: three seconds, once and not per worker.
_USED_BY_WORKERS = "kdpipe.pipelines.training.wrapping"


def default_workers() -> int:
    """How many loader workers a training process has: half the cores that are its own, at most 4, or 8 for a GPU.

    A GPU takes images faster than a CPU does, and leaves the cores to those who read them.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # torchrun's, of this machine
    own_cores = cores() // (max(int(processes), 1) if processes.isdecimal() else 1)
    return max(1, min(_MOST_FOR_GPU if torch.cuda.is_available() else _MOST_WORKERS, own_cores // 2))


def preload_workers() -> None:
    """Let the fork server import what workers use, so that starting a worker costs a fork, not an import.

    Raises:
        KdpipeError: There is no folder for the sockets, or no /dev/shm for the locks, that workers need.
    """
    _choose_socket_folder()
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        raise KdpipeError(
            f"Loader workers cannot be started: they need /dev/shm for their locks ({error.strerror}). Let the "
            "container have it (docker run --shm-size 1g), or read images in the training process (--workers 0)."
        ) from error
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, _USED_BY_WORKERS])


def _choose_socket_folder() -> None:
    """Where TMPDIR is too long for the name of a socket, multiprocessing gets a folder of its own in another place."""
    if len(os.fsencode(tempfile.gettempdir())) <= _MAX_FOLDER:
        return
    writable = [folder for folder in _SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if not writable:
        raise KdpipeError(
            f"The folder for temporary files {tempfile.gettempdir()} (TMPDIR) has a name of more than {_MAX_FOLDER} "
            f"bytes, too long for sockets, and {' and '.join(_SHORT_FOLDERS)} cannot be written. Set TMPDIR to a "
            "folder with a shorter name."
        )
    user_folder, tempfile.tempdir = tempfile.tempdir, writable[0]
    try:
        multiprocessing.util.get_temp_dir()  # made once, and removed in the end
    finally:
        tempfile.tempdir = user_folder


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def init_worker(worker_id: int) -> None:
    """Leave the cores to the training process, and end with it even where it is killed.

    A worker of a fork server is no child of the training process, so torch's own watch over the parent does not see it
    die.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the training process ends its workers
    cv2.setNumThreads(0)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="kdpipe-parent-watch", daemon=True).start()


def end_workers(loaders: Iterable[Any]) -> None:
    """End the workers of torch's `DataLoader`s now, and the threads that fed them.

    Left to the end of the program, such a thread can be cut off while it frees the locks of its queue, and Python warns
    of leaked semaphores.
    """
    for loader in loaders:
        iterator: Any = getattr(loader, "_iterator", None)
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
            loader._iterator = None
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":
            thread.join(_JOIN_SECONDS)
