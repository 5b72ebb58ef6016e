"""`--resume` runs nothing of what the checkpoint in the work directory holds beside weights and figures."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.pipelines.conftest import Kit


class Touch:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def training(kit: "Kit", folder: Path, epochs: int) -> tuple[object, ...]:
    options = ("--epochs", epochs, "--batch-size", 4, "--workers", 0, "--work-dir", folder)
    return ("train-teacher", "--config", kit.student, *kit.data, *options)


@pytest.fixture(scope="module")
def trained(kit: "Kit", tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "t"
    kit.run(*training(kit, folder, 1))
    return folder


def changed(trained: Path, work: Path, **meta: Any) -> Path:
    """A copy of a work directory, other things in the `meta` of its checkpoint."""
    folder = work / "t"
    shutil.copytree(trained, folder)
    content = torch.load(folder / "epoch_1.pth", weights_only=False)
    content["meta"] |= meta
    torch.save(content, folder / "epoch_1.pth")
    return folder


@pytest.mark.parametrize("key", ["config", "cfg"])
def test_texts_are_not_executed(kit: "Kit", work: Path, trained: Path, key: str) -> None:
    folder = changed(trained, work, **{key: f"import os\nos.system('touch {work}/ran')"})
    kit.run(*training(kit, folder, 2), "--resume")
    assert torch.load(folder / "teacher.pth")["meta"]["epoch"] == 2
    assert not (work / "ran").exists()


def test_calls_are_refused(kit: "Kit", work: Path, trained: Path) -> None:
    folder = changed(trained, work, hook_msgs=Touch(work / "ran"))
    before = kit.tree(folder)
    message = kit.refused(*training(kit, folder, 2), "--resume")
    assert "epoch_1.pth was refused: it holds posix.system" in message
    assert not (work / "ran").exists()
    after = kit.tree(folder)
    assert [name for name in before if name.endswith(".pth") and before[name] != after.get(name)] == []


def test_no_address_is_followed(kit: "Kit", work: Path, trained: Path) -> None:
    folder = changed(trained, work)
    (folder / "last_checkpoint").write_text("https://host.invalid/epoch_9.pth")
    assert "epoch_9.pth" in kit.refused(*training(kit, folder, 2), "--resume")
