"""Finished trainings of the tiny student, with and without distillation, in one folder; tests do not change them."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit

EVIL = "<img src=x onerror=alert(1)>&\"'$_{"


@pytest.fixture(scope="session")
def trainings(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainings")
    for name, methods in (("plain", "none"), ("distilled", "sgfi,ckd,pred")):
        options = ("--methods", methods, *kit.val, "--epochs", 2, "-o", "default_hooks.logger.interval=1")
        queue = ("-o", "distill.ckd.queue_size=256") if methods != "none" else ()
        kit.train_student(folder / name, *options, *queue)
    return folder


@pytest.fixture
def evil_trainings(trainings: Path, tmp_path: Path) -> Path:
    """The same with names of classes, files, folders and students that would be markup, were they not text."""
    folder = tmp_path / "evil"
    folder.mkdir()
    for name in ("plain", "distilled"):
        work = folder / f"{name} {EVIL.replace('/', '')}"
        shutil.copytree(trainings / name, work)
        truth = json.loads((work / "kdpipe/val.json").read_text())
        truth["categories"][0]["name"] = EVIL
        (work / "kdpipe/val.json").write_text(json.dumps(truth))
        record = json.loads((work / "kdpipe/recipe.json").read_text())
        record["command"] = {"options": {"student": EVIL, "cache": EVIL}}
        (work / "kdpipe/recipe.json").write_text(json.dumps(record))
    return folder
