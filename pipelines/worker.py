"""Loader workers: what they need, imported once in the fork server, what each does first, and how they end."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from typing import Any

import cv2
from mmengine.registry import FUNCTIONS

__all__ = ["end_workers", "init_worker", "preload_workers"]

_JOIN_SECONDS = 10.0


def preload_workers() -> None:
    """Let the fork server import this module, so that starting a worker costs a fork, not an import."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])


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
