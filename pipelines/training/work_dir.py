"""The folder of a training: what of it is kdpipe's own, who trains there, and what it holds.

Checkpoints, `result.json` and logs lie in the folder itself, all else in `kdpipe/` below it. The record in there
(`recipe.json`) marks the folder as one of kdpipe's; without it, nothing that lies there is replaced.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rich.console import Console

from kdpipe.cache.errors import KdpipeError
from kdpipe.pipelines.runtime.launch import is_first

__all__ = ["DETECTIONS", "WorkDir"]

DETECTIONS = "detections.bbox.json"  # of the last validation, in the folder that is kdpipe's own

_FOLDER, _RECORD, _LOCK = "kdpipe", "recipe.json", "lock"
_OWN = (  # all that a training writes, but for logs in folders named after the second
    *(f"{name}.{suffix}" for name in ("student", "teacher") for suffix in ("pth", "partial")),
    *("epoch_*.pth", "epoch_*.partial", "best_*.pth", "best_*.partial"),
    *("last_checkpoint", "result.json", "report.html", _FOLDER),
)
_LOG = re.compile(r"\d{8}_\d{6}")


class WorkDir:
    """The work directory of a training.

    Args:
        path: The directory, which need not be there.

    Attributes:
        path: The directory.
        folder: Of what is neither a checkpoint nor a log.
        begun: Whether the training got to its first step; before, it leaves nothing behind when it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path / _FOLDER
        self.begun = False

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is something to resume."""
        return (self.path / "last_checkpoint").exists()

    @property
    def is_finished(self) -> bool:
        """Whether a training was trained to its end."""
        return self.record() is not None and self.read("result.json") is not None

    def is_busy(self) -> bool:
        """Whether a training is running there."""
        if not (self.folder / _LOCK).exists():
            return False
        try:
            with self._locked():
                return False
        except KdpipeError:
            return True

    def check(self, resume: bool) -> None:
        """Refuse to begin where there is something else or a training already, and to resume where there is none.

        Reads only.

        Raises:
            KdpipeError: Naming what is there.
        """
        self._check_place()
        if is_first() and self.record() is not None and (self.folder / _LOCK).exists():
            with self._locked():
                pass
        self._check_content(resume)

    def _check_content(self, resume: bool) -> None:
        foreign = self._foreign()
        if foreign:
            raise KdpipeError(
                f"{self.path} holds {', '.join(foreign[:8])}{' and more' if len(foreign) > 8 else ''}, which no "
                f"training of this version of kdpipe left there (by {_FOLDER}/{_RECORD}). Nothing of it is replaced: "
                "choose another --work-dir, or move these away."
            )
        if resume:
            if not self.has_checkpoint:
                raise KdpipeError(f"Nothing to resume: {self.path} has no checkpoint. Leave --resume away to start.")
            self.newest()
        if not resume and (self.has_checkpoint or self.is_finished):
            going_on = "Add --resume to go on with it, or choose" if self.has_checkpoint else "Choose"
            raise KdpipeError(f"{self.path} already holds a training. {going_on} another --work-dir.")

    def _foreign(self) -> list[str]:
        """Files with names of kdpipe's own that no training can have left there."""
        if not self.path.exists():
            return []
        own_files = {path.name for path in self.path.iterdir() if any(fnmatchcase(path.name, name) for name in _OWN)}
        record = self.record()
        if record is None:
            return sorted(own_files)
        return [] if record.get("saved") else sorted(own_files - {_FOLDER})

    def _check_place(self) -> None:
        for place in (self.path, *self.path.resolve().parents):
            if place.exists() and not place.is_dir():
                raise KdpipeError(f"{place} is there and is no folder: choose another --work-dir.")
        for place in (self.path.resolve(), *self.path.resolve().parents):
            if (place / "zarr.json").exists():
                raise KdpipeError(f"{self.path} is, or lies in, the cache {place}: choose another --work-dir.")

    def record(self) -> dict[str, Any] | None:
        """What the training that is there was begun with; None where there is none.

        Raises:
            KdpipeError: It cannot be read.
        """
        content = self.read(f"{_FOLDER}/{_RECORD}")
        return content if content is not None and content.keys() >= {"kdpipe", "training"} else None

    def newest(self) -> Path:
        """The newest checkpoint, wherever the directory has been moved to.

        Raises:
            KdpipeError: It is not there.
        """
        newest = self.path / Path((self.path / "last_checkpoint").read_text().strip()).name
        saved = [path for path in self.path.glob("epoch_*.pth") if re.fullmatch(r"epoch_\d+\.pth", path.name)]
        if newest.is_file():
            return newest
        if newest == self.path and saved:  # the process ended while it wrote the name down
            return max(saved, key=lambda file: int(file.stem.split("_")[1]))
        raise KdpipeError(
            f"The newest checkpoint of {self.path} is missing: {newest.name or 'last_checkpoint is empty'}. There are: "
            f"{', '.join(sorted(file.name for file in saved)) or 'none'}. Restore it, or begin anew in another "
            "--work-dir."
        )

    @contextlib.contextmanager
    def opened(self, record: Mapping[str, Any], *, resume: bool, console: Console) -> Iterator[None]:
        """Make the directory that of a training, and keep others out while it runs; the first process does so.

        Args:
            record: What the training is begun with, as JSON values.
            resume: There is one already, and its record stays until this one has begun.
            console: Told where the file system has no locks.

        Raises:
            KdpipeError: As `check`; or the directory cannot be written.
        """
        if not is_first():
            yield
            return
        new = [place for place in (self.folder, self.path, *self.path.parents) if not place.exists()]
        logs = self._logs()
        if self.folder in new:
            self._publish(record)
        with self._locked(console):
            self._check_content(resume)
            if not resume:
                self.write_record(record, saved=False)
            try:
                yield
            except BaseException:
                if not self.begun:
                    self._leave_as_it_was(new, logs)
                raise

    def write_record(self, record: Mapping[str, Any], *, saved: bool) -> None:
        """Keep what the training is begun, or gone on, with.

        Args:
            record: That.
            saved: From now on there may be checkpoints; before, those that are there are not of this training.
        """
        self.write(f"{_FOLDER}/{_RECORD}", {**record, "saved": saved})

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write JSON values to a file of the directory in one atomic act."""
        aside = self.folder / f"{Path(name).name}.tmp"
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        aside.replace(self.path / name)

    def read(self, name: str) -> dict[str, Any] | None:
        """JSON values of a file of the directory; None where it is not there."""
        path = self.path / name
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise KdpipeError(
                f"{path} cannot be read ({error}). Restore it, or begin anew in another --work-dir."
            ) from error

    def _publish(self, record: Mapping[str, Any]) -> None:
        """Let the folder appear with its record, so that no other process sees one without."""
        aside = self.path / f".{_FOLDER}.{secrets.token_hex(4)}.tmp"
        try:
            aside.mkdir(parents=True)
            (aside / _RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
            aside.rename(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            if self.folder.exists():  # another training was faster; the lock tells
                return
            raise KdpipeError(
                f"{self.path} cannot be written ({error.strerror}): change its permissions, or choose another "
                "--work-dir."
            ) from error

    @contextlib.contextmanager
    def _locked(self, console: Console | None = None) -> Iterator[None]:
        """Hold the lock of the directory, which the system gives back when a process ends, however it does."""
        with (self.folder / _LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise KdpipeError(
                    f"Another training is running in {self.path}: {file.read().strip() or 'it has just begun'}. Wait "
                    "for it, end it, or choose another --work-dir."
                ) from None
            except OSError as error:
                if console is not None:
                    console.print(f"{self.path} cannot be locked ({error.strerror}): let no other training run there.")
            if console is not None:
                since = time.strftime("%Y-%m-%d %H:%M:%S")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
                file.flush()
            yield

    def _logs(self) -> set[Path]:
        if not self.path.is_dir():
            return set()
        return {path for path in self.path.iterdir() if _LOG.fullmatch(path.name)}

    def _leave_as_it_was(self, new: list[Path], logs: set[Path]) -> None:
        """Remove what a training made that did not get to its first step."""
        for log in self._logs() - logs:
            shutil.rmtree(log, ignore_errors=True)
        if self.folder in new:
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else has put something there
            for place in new[1:]:
                place.rmdir()
