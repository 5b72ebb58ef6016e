"""Ends a process that waits for others in vain: inside NCCL, Python hears neither signals nor that another is gone."""

import os
import signal
import threading
import time
from collections.abc import Callable

from torch.distributed import DistError

from kdpipe.pipelines.runtime.heartbeat import Heartbeat

__all__ = ["Watchdog"]

_LOOK_SECONDS = 1.0
# A process that gave no sign of life for so long is gone. One that reads a large file may be silent for a minute.
_GONE_SECONDS = 300.0
# The same where this process has been asked to end (torchrun does that where one was killed), and did not for so long:
# longer than the main thread takes to find out by itself.
_ASKED_SECONDS, _SILENT_SECONDS = 10.0, 5.0


class Watchdog:
    """A thread beside the main one, which ends by itself wherever it can: with gloo, it does.

    Args:
        heart: Knows of the other processes.
        others: Their numbers.
        end: Ends the process; gets the numbers of those that are gone.
    """

    def __init__(self, heart: Heartbeat, others: list[int], end: Callable[[list[int]], None]) -> None:
        self._heart, self._end = heart, end
        now = time.monotonic()
        self._seen = dict.fromkeys(others, (-1, now))
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before = -1
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kdpipe-watchdog", daemon=True)

    def start(self) -> None:
        """Begin; in the main thread."""
        # What the system writes there when a signal comes does not wait for Python to handle it.
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """The main thread goes on by itself."""
        self._leaving.set()
        self._thread.join()
        signal.set_wakeup_fd(self._before)
        os.close(self._read)
        os.close(self._write)

    def _watch(self) -> None:
        asked = lost = None
        while not self._leaving.wait(_LOOK_SECONDS):
            now = time.monotonic()
            asked = asked or (now if self._signalled() else None)
            late = asked is not None and now - asked > _ASKED_SECONDS
            try:
                gone = self._silent(now, _SILENT_SECONDS if late else _GONE_SECONDS)
            except DistError:
                lost = lost or now
                gone = [0] if now - lost > _ASKED_SECONDS else []
            if gone or (late and self._heart.is_stopped):
                self._end(gone)
                return

    def _signalled(self) -> bool:
        try:
            return bool(set(os.read(self._read, 64)) & {signal.SIGINT, signal.SIGTERM})
        except BlockingIOError:
            return False

    def _silent(self, now: float, seconds: float) -> list[int]:
        for rank, (beats, _) in self._seen.items():
            if (found := self._heart.beats(rank)) != beats:
                self._seen[rank] = found, now
        return [
            rank for rank, (_, when) in self._seen.items() if now - when > seconds and not self._heart.has_left(rank)
        ]
