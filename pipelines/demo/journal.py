"""What the steps of a demo came to, kept beside what they made, so that a demo can go on where it was stopped."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdpipe.cache.errors import KdpipeError
from kdpipe.cache.identity import digest_json

__all__ = ["Journal", "Outcome"]

_NAME = "demo.json"


@dataclass(frozen=True)
class Outcome:
    """What a step came to.

    Attributes:
        ap: COCO AP of what it trained.
        seconds_per_step: Of its training.
        size: Bytes of what it made.
        seconds: Duration of all attempts at it.
        finished: Whether it got to its end.
    """

    ap: float | None = None
    seconds_per_step: float | None = None
    size: int | None = None
    seconds: float = 0.0
    finished: bool = True


class Journal:
    """The file `demo.json` in the folder of a demo.

    Args:
        folder: Of the demo.
        settings: JSON values that its steps depend on; a demo of others is not continued.
        made: By step, the name of what it makes in the folder.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], made: Mapping[str, str]) -> None:
        self.folder, self.made = folder, made
        self._identity = digest_json(dict(settings))

    def read(self) -> dict[str, Outcome]:
        """Outcomes by step; begins a journal in a new or empty folder.

        Raises:
            KdpipeError: The folder holds something else, a demo of other settings, or a journal that cannot be read.
        """
        path = self.folder / _NAME
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise KdpipeError(f"{self.folder} is there and holds no demo: choose another folder with --out.")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.write({})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            identity = content["identity"]
            outcomes = {name: Outcome(**values) for name, values in content["steps"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise KdpipeError(f"{path} cannot be read ({error}): begin anew with --fresh.") from error
        if identity != self._identity:
            raise KdpipeError(
                f"{self.folder} holds a demo of another version or size: begin anew with --fresh, or choose another "
                "folder with --out."
            )
        return outcomes

    def begin(self, step: str, outcomes: Mapping[str, Outcome]) -> Outcome:
        """Keep that a step is begun, whose folder is the demo's from then on.

        Returns:
            Its outcome so far.

        Raises:
            KdpipeError: Its folder is there, and the demo did not make it.
        """
        place = self.folder / self.made[step]
        if step not in outcomes and place.exists():
            raise KdpipeError(
                f"{place} is there, and this demo did not make it: move it away, or choose another --out."
            )
        outcome = outcomes.get(step, Outcome(finished=False))
        self.write({**outcomes, step: outcome})
        return outcome

    def write(self, outcomes: Mapping[str, Outcome]) -> None:
        """Keep the outcomes by step."""
        self._write(self._identity, outcomes)

    def clear(self) -> None:
        """Delete what a demo made; a folder without a journal holds none and is left alone.

        Raises:
            KdpipeError: What is there has the journal's name and is none.
        """
        path = self.folder / _NAME
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        if not re.match(r'\s*\{\s*"identity"', text):
            raise KdpipeError(f"{path} is not the journal of a demo, and stays as it is: choose another --out.")
        try:
            begun = json.loads(text)["steps"].keys() & self.made.keys()
        except (ValueError, KeyError, AttributeError):  # damaged
            begun = self.made.keys()
        outcomes = {step: Outcome(finished=False) for step in begun}
        self._write("half deleted", outcomes)
        for step in begun:
            if (self.folder / self.made[step]).exists():
                shutil.rmtree(self.folder / self.made[step])
        self.write({})

    def _write(self, identity: str, outcomes: Mapping[str, Outcome]) -> None:
        steps = {name: asdict(outcome) for name, outcome in outcomes.items()}
        aside = self.folder / f"{_NAME}.tmp"
        aside.write_text(json.dumps({"identity": identity, "steps": steps}, indent=2), encoding="utf-8")
        aside.replace(self.folder / _NAME)
