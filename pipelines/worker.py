"""Loader workers: what they need, imported once in the fork server, and what each does first."""

import multiprocessing
import os
import threading

import cv2
from mmengine.registry import FUNCTIONS

__all__ = ["init_worker", "preload_workers"]


def preload_workers() -> None:
    """Let the fork server import this module, so that starting a worker costs a fork, not an import."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])


@FUNCTIONS.register_module()  # type: ignore[untyped-decorator]
def init_worker(worker_id: int) -> None:
    """Leave the cores to the training process, and end with it even where it is killed.

    A worker of a fork server is no child of the training process, so torch's own watch over the parent does not see it
    die.
    """
    cv2.setNumThreads(0)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="kdpipe-parent-watch", daemon=True).start()
